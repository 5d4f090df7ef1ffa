"""One stage of m3BERT's training: a resumable run with transformers' Trainer, and what it came to."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.utils import logging

from hf_models.m3bert import M3BertForMaskedLM

from ..reliability.checkpoints import find_last_valid_checkpoint
from ..report import write_text_atomically
from .language_model import (
    LanguageData,
    require_writable,
    restore_weights,
    signature_of,
    steady_seconds,
    train_and_save,
)
from .m3bert_data import ResumableMasking
from .training import build_trainer


logger = logging.get_logger(__name__)
FIT_NAME = "fit.json"


@dataclasses.dataclass
class StageFit:
    """What a run came to. `held_out` is what learning rates are chosen by, lower is better; `measured` is what else
    was measured of the trained model, as JSON. `train_seconds` are those of optimizer steps in steady state, scaled to
    all steps."""

    name: str
    seed: int
    steps: int
    examples: int
    learning_rate: float
    train_seconds: float
    held_out: float
    parameters: int
    history: list[dict]
    measured: dict[str, Any]


@dataclasses.dataclass
class StageData:
    """Rows to train on and how they become batches. `description` is what decides the outcome beyond rows, model and
    training arguments, such as the loss."""

    train: Dataset | IterableDataset
    collator: Callable
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    description: str
    compute_loss_func: Callable | None = None


# The held-out score of a model, lower is better, and everything else that was measured.
Measure = Callable[[PreTrainedModel], tuple[float, dict[str, Any]]]


def fit_stage(
    name: str,
    model: PreTrainedModel,
    data: StageData,
    args: TrainingArguments,
    measure: Measure,
    callbacks: Sequence = (),
) -> StageFit:
    """Train `model` into `args.output_dir` and leave it in its trained state.

    Called again in the same folder with the same configuration it goes on from the last complete checkpoint, or, if
    the run was finished, only loads. Raises `ValueError` if the folder holds a run with another configuration.
    """
    folder = Path(args.output_dir)
    require_writable(folder)
    signature = _signature_of(model, data, args)
    known = _read_fit(folder, signature)
    if known is not None:
        logger.info(f"{name}: finished before, loaded from {folder}")
        restore_weights(model, folder)
        return known
    trainer = build_trainer(
        model,
        dataclasses.replace(args, remove_unused_columns=False),
        callbacks,
        train_dataset=data.train,
        data_collator=data.collator,
        processing_class=data.tokenizer,
        compute_loss_func=data.compute_loss_func,
    )
    if trainer.is_world_process_zero():
        write_text_atomically(folder / FIT_NAME, json.dumps({"signature": signature}))
    checkpoint = args.resume_from_checkpoint or find_last_valid_checkpoint(folder)
    train_and_save(trainer, Path(checkpoint) if checkpoint else None)
    result = _measured(name, trainer.model, args, trainer.state.log_history, trainer.state.global_step, measure)
    if trainer.is_world_process_zero():
        _write_fit(folder, signature, result)
    return result


def run_elsewhere(
    name: str,
    model: PreTrainedModel,
    data: StageData,
    args: TrainingArguments,
    train: Callable[[], list[dict]],
    measure: Measure,
) -> StageFit:
    """The same for another library's trainer: `train` changes `model` and gives the log history. Only a finished run
    is kept; an interrupted one starts anew. `ValueError` on several ranks, which would all write."""
    if args.world_size > 1:
        raise ValueError(f"{name} runs in one process, not in {args.world_size}: start it without a launcher.")
    folder = Path(args.output_dir)
    require_writable(folder)
    signature = _signature_of(model, data, args)
    known = _read_fit(folder, signature)
    if known is not None:
        restore_weights(model, folder)
        return known
    history = train()
    model.save_pretrained(folder)
    result = _measured(name, model, args, history, args.max_steps, measure)
    _write_fit(folder, signature, result)
    return result


def _measured(
    name: str, model: PreTrainedModel, args: TrainingArguments, history: list[dict], steps: int, measure: Measure
) -> StageFit:
    held_out, measured = measure(model)
    return StageFit(
        name=name,
        seed=args.seed,
        steps=steps,
        examples=steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        learning_rate=args.learning_rate,
        train_seconds=steady_seconds(history, steps),
        held_out=held_out,
        parameters=model.num_parameters(),
        history=history,
        measured=measured,
    )


def _write_fit(folder: Path, signature: str, result: StageFit) -> None:
    content = {"signature": signature, "fit": dataclasses.asdict(result)}
    write_text_atomically(folder / FIT_NAME, json.dumps(content, indent=1))


def _signature_of(model: PreTrainedModel, data: StageData, args: TrainingArguments) -> str:
    first = Dataset.from_list([next(iter(data.train))])
    rows = LanguageData({}, data.train, first, data.tokenizer, f"{data.fingerprint}\n{data.description}")
    return signature_of(model, rows, args, ())


def _read_fit(folder: Path, signature: str) -> StageFit | None:
    file = folder / FIT_NAME
    if not file.exists():
        if find_last_valid_checkpoint(folder) is not None:
            raise ValueError(f"{folder} holds checkpoints of another run. Choose another --output_dir, or delete it.")
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    if content["signature"] != signature:
        raise ValueError(
            f"{folder} holds a run with other options (model, data or training arguments). To go on with that run "
            "give its options; to start anew choose another --output_dir, or delete the folder."
        )
    return StageFit(**content["fit"]) if "fit" in content else None


def masking_data(
    train: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, fingerprint: str, mlm_probability: float
) -> StageData:
    """Blocks to mask."""
    collator = ResumableMasking(tokenizer, mlm_probability=mlm_probability)
    return StageData(train, collator, tokenizer, fingerprint, f"masking {mlm_probability}")


@torch.no_grad()
def measure_masked(
    model: M3BertForMaskedLM,
    blocks: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    mlm_probability: float,
    batch_size: int,
) -> tuple[float, dict[str, Any]]:
    """Held-out cross-entropy in nats per masked token: the mean over the model's cells, and `nats_per_token` of each,
    layers x dims. The masks are the same for every model. The model comes back in the mode it was in."""
    collator = ResumableMasking(tokenizer, mlm_probability=mlm_probability)
    was_training, total, count = model.training, 0.0, 0
    model.eval()
    for batch in DataLoader(blocks, batch_size=batch_size, collate_fn=collator):
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        masked = int((batch["labels"] != -100).sum())
        losses = model(**batch, return_logits=False).grid_losses.double().cpu()  # (layers, dims)
        total, count = total + losses * masked, count + masked
    model.train(was_training)
    cells = total / max(count, 1)
    return cells.mean().item(), {"nats_per_token": cells.tolist()}
