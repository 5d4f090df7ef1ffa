"""Fine-tune an encoder on query-document pairs: m3BERT at all its cells or at one, or any encoder at the end.

    accelerate launch -m trainers.recipes.finetune_m3bert --model_name runs/m3bert --pairs_name PAIRS.jsonl
    accelerate launch -m trainers.recipes.finetune_m3bert --model_name runs/m3bert --objective cell --layer 2 --dim 32
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.finetune_m3bert --preset paper \\
        --model_name ORG/M3BERT --pairs_name ORG/CLICKS

| `--objective` | loss |
|---|---|
| `grid` | in-batch negatives, summed over layers x dims |
| `cell` | in-batch negatives of one cell: the encoder is cut there first, and stays so |
| `matryoshka_2d` | Sentence Transformers' Matryoshka2dLoss, under its own trainer |

Retrieval is measured before and after, at every cell, on the pages that are held out. The folder ends up as a Hub
repository; a repeated command goes on.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import PreTrainedModel, TrainingArguments, set_seed

from ..evaluation.retrieval import RetrievalCell, grid_metrics
from ..evaluation.retrieval_figure import plot_pareto
from ..redaction import command_line
from ..report import FigureFile, Results, collect_versions, device_name, write_results
from .arguments import RecipeTrainingArguments, parse_arguments, refuse_options
from .comparison import print_metrics, wall_seconds_so_far
from .description import describe_data
from .language_model import require_writable
from .m3bert_data import EncoderData, EncoderDataArguments, prepare_encoder_data
from .m3bert_fit import StageData, StageFit, run_elsewhere
from .m3bert_pairs import PairCollator, cells_of, fit_pairs, grid_of, held_out_recall, load_encoder
from .pretrain_m3bert import SMALL_RUN, describe_encoder, splitting_note


@dataclasses.dataclass
class FinetuneArguments:
    """What is fine-tuned, and at which cells."""

    model_name: str = dataclasses.field(metadata={"help": "Folder or Hub id of an encoder with its tokenizer."})
    objective: Literal["grid", "cell", "matryoshka_2d"] = "grid"
    layer: int | None = dataclasses.field(default=None, metadata={"help": "Of the one cell; default: the last."})
    dim: int | None = dataclasses.field(default=None, metadata={"help": "Of the one cell; default: all."})
    layers: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "Exits of the grid; default: those of the model."}
    )
    dims: list[int] = dataclasses.field(default_factory=list, metadata={"help": "Its widths; default: the model's."})
    temperature: float = dataclasses.field(default=0.05, metadata={"help": "Of the similarities; the paper's."})
    distill: Literal["kl"] | None = dataclasses.field(
        default=None, metadata={"help": "kl: smaller cells also follow the largest one."}
    )


PRESETS = {
    "demo": SMALL_RUN
    | {
        "dataset_language": "en,de,fr,ja",
        "pairs_name": "libreoffice-help:en-us,de,fr,ja",
        "max_steps": 200,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 64,
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "output_dir": "runs/m3bert-finetuned",
    },
    # The released script of fine-tuning, for 100M pairs.
    "paper": {
        "query_length": 16,
        "document_length": 64,
        "num_train_epochs": 5,
        "learning_rate": 5e-4,
        "per_device_train_batch_size": 1024,
        "warmup_steps": 0.1,
        "max_grad_norm": 0.5,
        "bf16": True,
        "logging_steps": 50,
        "eval_strategy": "no",
        "save_steps": 1000,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
        "output_dir": "runs/m3bert-finetuned-paper",
    },
}


def load_for(args: FinetuneArguments) -> PreTrainedModel:
    """The encoder, with the grid that was asked for, and cut where one cell was. `ValueError` for an encoder that
    cannot be cut, or a cell that was not trained."""
    grid = {"mrl_layers": args.layers, "mrl_dims": args.dims}
    model = load_encoder(args.model_name, **{name: values for name, values in grid.items() if values})
    if args.objective == "cell" and (args.layer is not None or args.dim is not None):
        if not hasattr(model, "truncate"):
            raise ValueError(f"{args.model_name} is no m3BERT and cannot be cut: leave out --layer and --dim.")
        model = model.truncate(args.layer, args.dim)
    return model


def fit_encoder(
    name: str,
    model: PreTrainedModel,
    data: EncoderData,
    args: FinetuneArguments,
    training_args: TrainingArguments,
    data_args: EncoderDataArguments,
) -> StageFit:
    """Fine-tune `model` as `args.objective` says; of a cell, `model` is already cut there."""
    layers, dims = grid_of(model)
    if args.objective == "matryoshka_2d":
        return _fit_matryoshka_2d(name, model, data, args, training_args, data_args)
    if args.objective == "cell":
        layers, dims = layers[-1:], dims[-1:]
    return fit_pairs(
        name,
        model,
        data,
        training_args,
        data_args,
        layers=layers,
        dims=dims,
        temperature=args.temperature,
        distill=args.distill,
    )


def _fit_matryoshka_2d(name, model, data, args, training_args, data_args) -> StageFit:
    from .m3bert_peers import train_matryoshka_2d  # needs the extra `sentence-transformers`

    layers, dims = grid_of(model)
    pairs = data.train["contrastive"]
    description = f"Matryoshka2dLoss, temperature {args.temperature}, cells {layers} x {dims}"
    stage = StageData(pairs, PairCollator(data.tokenizer, model), data.tokenizer, data.fingerprint, description)

    def train() -> list[dict[str, Any]]:
        return train_matryoshka_2d(
            model,
            data.tokenizer,
            pairs,
            training_args,
            dims=dims,
            temperature=args.temperature,
            document_length=data_args.document_length,
        )

    return run_elsewhere(name, model, stage, training_args, train, held_out_recall(data, data_args, layers, dims))


def finetune(
    preset: str, args: FinetuneArguments, data_args: EncoderDataArguments, training_args: TrainingArguments
) -> Path:
    """Measure, fine-tune, measure, and write model, `results.json` and figure into the run folder, which is
    returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    data_args = dataclasses.replace(data_args, tokenizer_name=data_args.tokenizer_name or args.model_name)
    data = prepare_encoder_data(data_args, training_args, stages=["contrastive"])
    set_seed(training_args.seed)
    model, state = load_for(args), PartialState()
    layers, dims = grid_of(model)
    _, before = held_out_recall(data, data_args, layers, dims)(model)
    run_args = dataclasses.replace(training_args, output_dir=str(root / "training"))
    fit = fit_encoder(args.objective, model, data, args, run_args, data_args)
    if state.is_main_process:
        model.save_pretrained(root)
        data.tokenizer.save_pretrained(root)
        cells = {"before": cells_of(before["test"]), "after": cells_of(fit.measured["test"])}
        results = Results(
            method="m3bert",
            title="m3BERT, fine-tuned for retrieval",
            preset=preset,
            seeds=[training_args.seed],
            command=command_line(),
            device=device_name(),
            versions=collect_versions(),
            wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
            metrics=grid_metrics([cells["after"]], baselines={"before fine-tuning": [cells["before"]]}),
            evidence={
                "objective": args.objective,
                "temperature": args.temperature,
                "steps": fit.steps,
                "examples": fit.examples,
                "learning_rate": fit.learning_rate,
                "train_seconds": fit.train_seconds,
                "cells": {when: [cell.row() for cell in found] for when, found in cells.items()},
            },
            data=describe_data(data_args, data.fingerprint, splitting_note(data_args, data)),
            model=describe_encoder(model),
            figures=[_figure(root, cells)],
        )
        write_results(root, results)
        print_metrics(results)
    state.wait_for_everyone()
    return root


def _figure(root: Path, cells: dict[str, list[RetrievalCell]]) -> FigureFile:
    plot_pareto(cells["after"], root / "figures" / "pareto.png", others={"before fine-tuning": cells["before"]})
    caption = "Recall@10 of every exit and width over the index' size, after and, dashed, before fine-tuning."
    return FigureFile(path="figures/pareto.png", caption=caption)


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (FinetuneArguments, EncoderDataArguments, RecipeTrainingArguments)
    preset, (args, data_args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    if args.objective == "matryoshka_2d":
        because = "Sentence Transformers' own trainer has neither. Choose another --objective, or leave it out."
        refuse_options(training_args, "optimizer", "reliability", because=because)
    finetune(preset, args, data_args, training_args)


if __name__ == "__main__":
    main()
