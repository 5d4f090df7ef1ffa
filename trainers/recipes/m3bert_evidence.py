"""The evidence on m3BERT: does pre-training at every cell help the small ones after the same fine-tuning?

    python -m trainers.recipes.m3bert_evidence --preset evidence

Encoders are pre-trained on masked text, with the loss of the whole grid or plainly (last layer, full width), then
fine-tuned on the same pairs in the same order for the same number of steps, and measured on pages that neither has
seen in any language:

| arm | pre-training | fine-tuning |
|---|---|---|
| `grid` | grid | grid |
| `plain` | plain | grid |
| `plain_equal_seconds` | plain, for as long as the grid takes | grid |
| `plain_st2d` | plain | Sentence Transformers' Matryoshka2dLoss, all layers and dims in every step |
| `grid_cell_1x16`, `plain_cell_1x16`, ... | grid, plain | cut to that cell, then its loss alone |

Every arm searches the same learning rates on the first seed: of pre-training by its own held-out loss, of fine-tuning
by recall@10 on pages that validate; what is reported are other pages. A repeated command goes on.
"""

import dataclasses
import time
from collections.abc import Sequence
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed

from hf_models.m3bert import M3BertForMaskedLM, M3BertForSentenceEmbedding

from ..benchmarks.alternating_blocks import time_alternately
from ..evaluation.retrieval import RetrievalCell, grid_metrics
from ..evaluation.retrieval_figure import plot_pareto
from ..figures import comparison_figure
from ..redaction import command_line
from ..report import FigureFile, Metric, Results, collect_versions, device_name, summarise, write_results
from .arguments import RecipeTrainingArguments, parse_arguments, refuse_options, training_arguments_of
from .comparison import (
    Comparison,
    ComparisonArguments,
    Job,
    against_baselines,
    measured_once,
    print_metrics,
    require_one_rank,
    run_in_workers,
    search_rates,
    wall_seconds_so_far,
)
from .description import describe_data
from .finetune_m3bert import FinetuneArguments, fit_encoder
from .language_model import require_writable
from .m3bert_data import EncoderData, EncoderDataArguments, ResumableMasking, prepare_encoder_data
from .m3bert_fit import StageFit
from .m3bert_pairs import cells_of
from .pretrain_m3bert import (
    PRESETS as PRETRAINING,
)
from .pretrain_m3bert import (
    SHAPES,
    M3BertArguments,
    build_masked_model,
    describe_encoder,
    fit_masked,
    splitting_note,
)


@dataclasses.dataclass
class EvidenceArguments:
    """Pre-training of the arms, and the cells in question. Fine-tuning takes `max_steps`, `learning_rates` and
    `per_device_train_batch_size`."""

    shape: str = "small"
    exit_norm: str = "shared"
    pretrain_steps: int = 800
    pretrain_learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1.5e-3, 3e-3])
    pretrain_batch_size: int = 16
    corners: list[str] = dataclasses.field(
        default_factory=lambda: ["1x16", "2x32"], metadata={"help": "Cells fine-tuned alone, layers x dims."}
    )
    small_layers: int = dataclasses.field(default=2, metadata={"help": "The small corner: so many layers or fewer,"})
    small_dims: int = dataclasses.field(default=32, metadata={"help": "and so many dims or fewer."})
    temperature: float = 0.05


# Pre-training and objective of fine-tuning; arms of one cell are named by it.
ARMS = {
    "grid": ("mlm_grid", "grid"),
    "plain": ("mlm_plain", "grid"),
    "plain_equal_seconds": ("mlm_plain_equal_seconds", "grid"),
    "plain_st2d": ("mlm_plain", "matryoshka_2d"),
}
PRESETS = {
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": {
        name: value
        for name, value in PRETRAINING["evidence"].items()
        if name not in ("stages", "stage_steps", "stage_learning_rates", "stage_batch_sizes")
    }
    | {
        "arms": list(ARMS),
        "seeds": [0, 1, 2],
        "learning_rates": [5e-4, 1.5e-3],
        "max_steps": 120,
        "per_device_train_batch_size": 64,
        "max_eval_queries": 3000,
        "output_dir": "runs/m3bert_evidence",
    },
}


def arm_of(name: str) -> tuple[str, str, int | None, int | None]:
    """Pre-training, objective, and the cell if it is one, of an arm. `ValueError` for an unknown one."""
    if name in ARMS:
        return *ARMS[name], None, None
    source, separator, cell = name.partition("_cell_")
    layer, _, dim = cell.partition("x")
    if source not in ("grid", "plain") or not separator or not (layer.isdigit() and dim.isdigit()):
        raise ValueError(f"arm {name!r} is not known. Choose from {', '.join(ARMS)}, grid_cell_1x16, plain_cell_1x16.")
    return f"mlm_{source}", "cell", int(layer), int(dim)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a worker is told beside its job. `sources`: folder of the pre-trained model of an arm and a seed."""

    root: Path
    args: EvidenceArguments
    data_args: EncoderDataArguments
    training_args: TrainingArguments
    sources: dict[tuple[str, int], Path] = dataclasses.field(default_factory=dict)

    def arguments(self, job: Job, **changes: Any) -> TrainingArguments:
        """The training arguments of a run."""
        return training_arguments_of(
            self.training_args,
            output_dir=str(job.folder(self.root)),
            seed=job.seed,
            learning_rate=job.learning_rate,
            max_steps=job.steps,
            resume_from_checkpoint=None,
            **changes,
        )


@lru_cache(maxsize=1)
def _data(root: Path) -> EncoderData:
    return EncoderData.load(root / "data")


def pretrain_job(job: Job, plan: Plan) -> StageFit:
    """One run of pre-training."""
    data = _data(plan.root)
    objective = "grid" if job.arm == "mlm_grid" else "plain"
    args = M3BertArguments(shape=plan.args.shape, exit_norm=plan.args.exit_norm, objective=objective)
    model = build_masked_model(args, data, plan.data_args, job.seed)
    training_args = plan.arguments(job, per_device_train_batch_size=plan.args.pretrain_batch_size)
    return fit_masked(job.arm, "multilingual", model, data, training_args, plan.data_args)


def finetune_job(job: Job, plan: Plan) -> StageFit:
    """One run of fine-tuning, from the pre-trained model of its seed."""
    data = _data(plan.root)
    source, objective, layer, dim = arm_of(job.arm)
    grid = {name: SHAPES[plan.args.shape][name] for name in ("mrl_layers", "mrl_dims")}
    folder = plan.sources[source, job.seed]
    set_seed(job.seed)
    model = M3BertForSentenceEmbedding.from_pretrained(folder, **grid)
    if objective == "cell":
        model = model.truncate(layer, dim)
    # Another library's trainer shuffles otherwise: rows are shuffled here, and read in order by all.
    pairs = data.train["contrastive"].shuffle(seed=job.seed)
    own = dataclasses.replace(data, train=data.train | {"contrastive": pairs})
    args = FinetuneArguments(model_name=str(folder), objective=objective, temperature=plan.args.temperature)
    training_args = plan.arguments(job, train_sampling_strategy="sequential")
    return fit_encoder(job.arm, model, own, args, training_args, plan.data_args)


def run_all(jobs: Sequence[Job], run: Any, plan: Plan, workers: int) -> dict[Job, StageFit]:
    """`run` for every job; finished ones are only read."""
    if not workers:
        return {job: run(job, plan) for job in jobs}
    return run_in_workers(jobs, workers, partial(run, plan=plan))


def compare(
    preset: str,
    comparison_args: ComparisonArguments,
    args: EvidenceArguments,
    data_args: EncoderDataArguments,
    training_args: TrainingArguments,
) -> Results:
    """Run what is missing and write model, `results.json` and figures into the folder of the comparison."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    require_one_rank(comparison_args.workers, training_args)
    arms = comparison_args.arms + [f"{kind}_cell_{cell}" for cell in args.corners for kind in ("grid", "plain")]
    for arm in arms:
        arm_of(arm)
    data = prepare_encoder_data(data_args, training_args, stages=["multilingual", "contrastive"])
    data.save(root / "data")
    plan = Plan(root, args, data_args, training_args)
    pretrained = _pretrain(comparison_args, plan, arms)
    sources = {(arm, job.seed): job.folder(root).resolve() for arm, jobs in pretrained.jobs.items() for job in jobs}
    tuning = partial(
        run_all, run=finetune_job, plan=dataclasses.replace(plan, sources=sources), workers=comparison_args.workers
    )
    job_of = partial(Job, steps=training_args.max_steps)
    loss_of = attrgetter("held_out")
    tuned = search_rates(comparison_args, arms, tuning, root, job_of=job_of, loss_of=loss_of)
    cells = {arm: [cells_of(fit.measured["test"]) for fit in fits] for arm, fits in tuned.fits.items()}
    model = M3BertForSentenceEmbedding.from_pretrained(tuned.folders(arms[0])[0])
    model.save_pretrained(root)
    data.tokenizer.save_pretrained(root)
    results = Results(
        method="m3bert",
        title="m3BERT, a Matryoshka encoder over layers and dimensions",
        preset=preset,
        seeds=comparison_args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
        metrics=evidence_metrics(cells, args),
        evidence=_record(comparison_args, args, data_args, training_args, pretrained, tuned),
        data=describe_data(data_args, data.fingerprint, splitting_note(data_args, data)),
        model=describe_encoder(model),
        figures=_figures(root, cells, args),
    )
    write_results(root, results)
    print_metrics(results)
    return results


def _pretrain(comparison_args: ComparisonArguments, plan: Plan, arms: Sequence[str]) -> Comparison:
    """The pre-trained models that `arms` start from, each at its best learning rate."""
    sources = list(dict.fromkeys(arm_of(arm)[0] for arm in arms))
    searched = [source for source in sources if source != "mlm_plain_equal_seconds"]
    run = partial(run_all, run=pretrain_job, plan=plan, workers=comparison_args.workers)
    search = dataclasses.replace(comparison_args, learning_rates=plan.args.pretrain_learning_rates)
    job_of, loss_of = partial(Job, steps=plan.args.pretrain_steps), attrgetter("held_out")
    if "mlm_plain_equal_seconds" in sources and "mlm_plain" not in searched:
        searched.append("mlm_plain")
    comparison = search_rates(search, searched, run, plan.root, job_of=job_of, loss_of=loss_of)
    if "mlm_plain_equal_seconds" in sources:
        ratio = measured_once(plan.root / "relative_step_time.json", partial(relative_step_time, plan))
        rate, steps = comparison.learning_rates["mlm_plain"], round(plan.args.pretrain_steps * ratio)
        jobs = [Job("mlm_plain_equal_seconds", seed, rate, steps) for seed in comparison_args.seeds]
        comparison.add("mlm_plain_equal_seconds", jobs, run(jobs))
    return comparison


def relative_step_time(plan: Plan, *, blocks: int = 10, steps_per_block: int = 2) -> float:
    """Seconds of a step of grid pre-training over those of a plain one, in alternating blocks."""
    data = _data(plan.root)
    rows = data.train["multilingual"].select(range(plan.args.pretrain_batch_size)).to_list()
    batch = ResumableMasking(data.tokenizer, mlm_probability=plan.data_args.mlm_probability)(rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    steps = []
    for objective in ("grid", "plain"):
        args = M3BertArguments(shape=plan.args.shape, exit_norm=plan.args.exit_norm, objective=objective)
        steps.append(partial(_step, model := build_masked_model(args, data, plan.data_args, 0), _adamw(model), batch))
        steps[-1]()
    timing = time_alternately(*steps, blocks=blocks, steps_per_block=steps_per_block)
    torch.set_num_threads(threads)
    return timing["process"].ratio.median


def _adamw(model: M3BertForMaskedLM) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)


def _step(model: M3BertForMaskedLM, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> None:
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


Grids = dict[str, list[list[RetrievalCell]]]  # arm -> seed -> cells


def evidence_metrics(cells: Grids, args: EvidenceArguments) -> dict[str, Metric]:
    """Recall@10 of the small corner, of every cell, and of the cells that were fine-tuned alone: of the first arm,
    with the others as its baselines."""
    grids = {arm: seeds for arm, seeds in cells.items() if "_cell_" not in arm}
    metrics = {}
    limits = {"small_corner": (args.small_layers, args.small_dims), "all_cells": (10**6, 10**6)}
    for name, limit in limits.items():
        groups = {arm: [_mean_recall(seed, limit) for seed in seeds] for arm, seeds in grids.items()}
        metrics[f"recall_at_10_{name}"] = against_baselines(
            {arm: summarise(values, higher_is_better=True) for arm, values in groups.items()}
        )
    metrics[
        "recall_at_10_small_corner"
    ].note = f"mean over the cells of at most {args.small_layers} layers and {args.small_dims} dims"
    for cell in args.corners:
        alone = {
            kind: [seed[0].recall[10] for seed in cells[f"{kind}_cell_{cell}"]]
            for kind in ("grid", "plain")
            if f"{kind}_cell_{cell}" in cells
        }
        name = "recall_at_10_alone_layer_{}_dim_{}".format(*cell.split("x"))
        metrics[name] = against_baselines({a: summarise(v, higher_is_better=True) for a, v in alone.items()})
        metrics[name].note = "cut to the cell, then fine-tuned there alone"
    first, *others = grids
    return metrics | grid_metrics(grids[first], baselines={arm: grids[arm] for arm in others})


def _mean_recall(cells: Sequence[RetrievalCell], limit: tuple[int, int]) -> float:
    recalls = [cell.recall[10] for cell in cells if cell.layer <= limit[0] and cell.dim <= limit[1]]
    return sum(recalls) / len(recalls)


def _record(comparison_args, args, data_args, training_args, pretrained: Comparison, tuned: Comparison) -> dict:
    def runs(comparison: Comparison) -> dict[str, Any]:
        return {
            arm: {
                "learning_rate": comparison.learning_rates[arm],
                "steps": fits[0].steps,
                "examples": fits[0].examples,
                "train_seconds": [fit.train_seconds for fit in fits],
                "held_out": [fit.held_out for fit in fits],
                "parameters": fits[0].parameters,
            }
            for arm, fits in comparison.fits.items()
        }

    return {
        "shape": SHAPES[args.shape] | {"exit_norm": args.exit_norm},
        "learning_rate_grid": {
            "pretraining": args.pretrain_learning_rates,
            "fine_tuning": comparison_args.learning_rates,
        },
        "learning_rate_chosen_on": "the first seed; held-out loss of the arm's own objective, then recall@10 of the "
        "arm's own cells on pages that validate and are not reported",
        "mlm_probability": data_args.mlm_probability,
        "sampling_exponent": data_args.sampling_exponent,
        "temperature": args.temperature,
        "batch_sizes": [args.pretrain_batch_size, training_args.per_device_train_batch_size],
        "pretraining": runs(pretrained),
        "fine_tuning": runs(tuned),
        "changed_after_results_were_seen": comparison_args.note,
    }


def _figures(root: Path, cells: Grids, args: EvidenceArguments) -> list[FigureFile]:
    grids = {arm: seeds for arm, seeds in cells.items() if "_cell_" not in arm}
    first, *others = grids
    shown = {arm: grids[arm][0] for arm in others if arm == "plain"}
    plot_pareto(grids[first][0], root / "figures" / "pareto.png", others=shown)
    limit = (args.small_layers, args.small_dims)
    corner = {arm: [_mean_recall(seed, limit) for seed in seeds] for arm, seeds in grids.items()}
    path = root / "figures" / "small_corner.png"
    comparison_figure(corner, path, y_label="recall@10, small corner", higher_is_better=True)
    return [
        FigureFile(
            path="figures/small_corner.png",
            caption=f"Mean recall@10 of the cells of at most {limit[0]} layers and {limit[1]} dims; dots are seeds.",
        ),
        FigureFile(path="figures/pareto.png", caption="First seed: recall@10 of every cell over the index' size."),
    ]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ComparisonArguments, EvidenceArguments, EncoderDataArguments, RecipeTrainingArguments)
    preset, (comparison_args, args, data_args, training_args) = parse_arguments(
        types, PRESETS, argv, default_preset="evidence"
    )
    if any(arm_of(arm)[1] == "matryoshka_2d" for arm in comparison_args.arms):
        because = "the arm plain_st2d runs in Sentence Transformers' own trainer, which has neither. Leave one out."
        refuse_options(training_args, "optimizer", "reliability", because=because)
    compare(preset, comparison_args, args, data_args, training_args)


if __name__ == "__main__":
    main()
