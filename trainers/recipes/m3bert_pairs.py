"""Contrastive training of any encoder with transformers' Trainer: batches of query-document pairs, and their loss.

The Trainer's forward pass is that of the queries. The documents travel as `labels`, and the loss encodes them itself,
so that neither side is padded to the length of the other.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from hf_models.m3bert import M3BertForSentenceEmbedding

from ..evaluation.retrieval import RetrievalCell, evaluate_grid
from ..evaluation.retrieval_encoding import encode_with
from ..losses import MatryoshkaGridLoss, in_batch_negatives
from .m3bert_data import EncoderData, EncoderDataArguments
from .m3bert_fit import Measure, StageData, StageFit, fit_stage


Exits = Mapping[int, Tensor]  # layer -> (texts, H), pooled, not normalised
PairObjective = Callable[[Exits, Exits], Tensor]


class PairCollator:
    """Rows of `input_ids` (a query) and `document_ids` -> the queries as a model's inputs, documents as labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel):
        self.tokenizer, self.options = tokenizer, exit_options(model)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        queries, documents = (
            dict(self.tokenizer.pad({"input_ids": [row[name] for row in rows]}, return_tensors="pt"))
            for name in ("input_ids", "document_ids")
        )
        labels = {"documents": documents, "query_mask": queries["attention_mask"]}
        return queries | self.options | {"labels": labels}


class PairLoss:
    """Trainer's `compute_loss_func`: encodes the documents and applies `objective` to the exits of both sides.

    Under DDP the documents go through the bare model: gradients are reduced once both sides have contributed.
    """

    def __init__(self, model: PreTrainedModel, objective: PairObjective, *, accumulation_steps: int = 1):
        self.model, self.objective, self.accumulation_steps = model, objective, accumulation_steps

    def __call__(self, outputs: Any, labels: Mapping[str, Any], num_items_in_batch: Any = None) -> Tensor:
        documents = labels["documents"]
        encoded = self.model(**documents, **exit_options(self.model))
        query_exits = pooled_exits(self.model, outputs, labels["query_mask"])
        document_exits = pooled_exits(self.model, encoded, documents["attention_mask"])
        # Trainer takes the loss of a function like this one for scaled already.
        return self.objective(query_exits, document_exits) / self.accumulation_steps


def exit_options(model: PreTrainedModel) -> dict[str, bool]:
    """What makes a model put out its exits."""
    takes_exits = "output_exit_embeddings" in inspect.signature(model.forward).parameters
    return {"output_exit_embeddings": True} if takes_exits else {"output_hidden_states": True}


def pooled_exits(model: PreTrainedModel, outputs: Any, attention_mask: Tensor) -> dict[int, Tensor]:
    """The vectors of a batch by layer, with their graph: m3BERT's exits, or the mean of any other's hidden states."""
    if "output_exit_embeddings" in exit_options(model):
        return dict(zip(model.config.mrl_layers, outputs["exit_embeddings"], strict=True))
    weights = attention_mask[:, :, None]
    lengths = weights.sum(dim=1).clamp_min(1)
    states = enumerate(outputs["hidden_states"])
    return {layer: (state * weights).sum(dim=1) / lengths for layer, state in states if layer}


def grid_of(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """Layers and dims of a model's cells; of a model without any, its whole depth and width."""
    config = model.config
    whole = ([config.num_hidden_layers], [config.hidden_size])
    return (getattr(config, "mrl_layers", None) or whole[0], getattr(config, "mrl_dims", None) or whole[1])


def grid_objective(
    layers: Sequence[int], dims: Sequence[int], *, temperature: float = 0.05, gather: bool = False, **options: Any
) -> PairObjective:
    """In-batch negatives summed over a grid; of one layer and one dim, the loss of that cell."""
    base = partial(in_batch_negatives, temperature=temperature, gather=gather)
    return MatryoshkaGridLoss(base, layers=list(layers), dims=list(dims), **options)


def load_encoder(name: str, **overrides: Any) -> PreTrainedModel:
    """An encoder by folder or Hub id: m3BERT with its exits (`overrides` are fields of its config), or any that
    `AutoModel` knows."""
    if AutoConfig.from_pretrained(name).model_type == "m3bert":
        return M3BertForSentenceEmbedding.from_pretrained(name, **overrides)
    if overrides:
        raise ValueError(f"{name} is no m3BERT: {', '.join(overrides)} say nothing to it.")
    return AutoModel.from_pretrained(name)


@torch.no_grad()
def measure_cells(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: Any,
    *,
    layers: Sequence[int],
    dims: Sequence[int],
    query_length: int,
    document_length: int,
    batch_size: int = 64,
) -> list[RetrievalCell]:
    """Retrieval quality of every cell of `layers` x `dims` on a `RetrievalSet`."""
    encode = partial(encode_with, model, tokenizer, layers=layers, batch_size=batch_size)
    return evaluate_grid(
        partial(encode, max_length=document_length),
        queries.queries,
        queries.documents,
        queries.relevant,
        layers=layers,
        dims=dims,
        encode_queries=partial(encode, max_length=query_length),
        ks=(10, 100),
    )


def cells_of(rows: Sequence[Mapping[str, Any]]) -> list[RetrievalCell]:
    """Cells from their rows in a result, see [`RetrievalCell.row`]."""
    cells = []
    for row in rows:
        measures = {
            name: {int(key.partition("@")[2]): value for key, value in row.items() if key.startswith(f"{name}@")}
            for name in ("recall", "mrr", "ndcg")
        }
        plain = {name: value for name, value in row.items() if "@" not in name}
        cells.append(RetrievalCell(**plain, **measures))
    return cells


def fit_pairs(
    name: str,
    model: PreTrainedModel,
    data: EncoderData,
    args: TrainingArguments,
    data_args: EncoderDataArguments,
    *,
    layers: Sequence[int],
    dims: Sequence[int],
    temperature: float = 0.05,
    distill: str | None = None,
) -> StageFit:
    """Contrastive training of `model` at the cells `layers` x `dims`, see [`fit_stage`]; negatives are the documents
    of the batch, of all ranks. The held-out score is 1 minus the mean recall@10 of those cells on the pages that
    validate; `measured` has the cells of both held-out splits."""
    objective = grid_objective(layers, dims, temperature=temperature, gather=args.world_size > 1, distill=distill)
    stage = StageData(
        train=data.train["contrastive"],
        collator=PairCollator(data.tokenizer, model),
        tokenizer=data.tokenizer,
        fingerprint=data.fingerprint,
        description=f"in-batch negatives, temperature {temperature}, cells {layers} x {dims}, distill {distill}",
        compute_loss_func=PairLoss(model, objective, accumulation_steps=args.gradient_accumulation_steps),
    )
    return fit_stage(name, model, stage, args, held_out_recall(data, data_args, layers, dims))


def held_out_recall(
    data: EncoderData, data_args: EncoderDataArguments, layers: Sequence[int], dims: Sequence[int]
) -> Measure:
    """A measurement of the cells on both held-out splits; the score is that of the pages that validate."""

    def measure(model: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        found = {
            split: measure_cells(
                model,
                data.tokenizer,
                queries,
                layers=layers,
                dims=dims,
                query_length=data_args.query_length,
                document_length=data_args.document_length,
            )
            for split, queries in data.queries.items()
        }
        recalls = [cell.recall[10] for cell in found["validation"]]
        return 1 - sum(recalls) / len(recalls), {split: [c.row() for c in cells] for split, cells in found.items()}

    return measure
