"""Does restoring the stable rank help a run that is driven too hard? MSign (arXiv 2602.01734) beside its rivals.

    accelerate launch -m trainers.recipes.stability_msign --preset demo
    python -m trainers.recipes.stability_msign --preset evidence
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.stability_msign --preset paper \\
        --dataset_name ORG/CORPUS

| arm | optimizer | gradient clipping |
|---|---|---|
| `msign` | AdamW, then MSign on all matrices of the layers every `--msign_period` steps | as `--max_grad_norm` |
| `msign_attention`, `msign_mlp` | the same on the projections of attention, or of the feed-forward networks | " |
| `adamw_clip` | AdamW: the paper's baseline, which clips too | " |
| `adamw` | AdamW | none |
| `muon` | Muon on the matrices of the layers, AdamW on the rest | as `--max_grad_norm` |
| `muon_msign` | Muon, then MSign | " |

Every arm searches the same learning rates and is measured twice: at its best one, and at `--aggressive_learning_rate`,
where the method has something to prevent. Learning rates are the base ones of the paper's muP rules: on the narrow
shapes the matrices of the layers learn 16 times and the embeddings 4 times as fast.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import PreTrainedModel

from ..callbacks import StableRankCallback
from ..figures import comparison_figure, loss_figure
from ..optimizers import MSign, MuonAdamW, select_targets
from ..report import FigureFile, Metric, Model, summarise
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments, refuse_options
from .comparison import (
    Comparison,
    ComparisonArguments,
    Job,
    Start,
    against_baselines,
    compare_arms,
    publish_first_run,
    run_jobs,
    write_comparison,
)
from .language_model import LanguageData, prepare_language_data, require_writable
from .stability_models import SHAPES, build_model, parameter_groups


NATS = "nats/token"


@dataclasses.dataclass
class StabilityArguments:
    """The model and what it is driven with."""

    shape: str = dataclasses.field(default="proxy", metadata={"help": f"One of {', '.join(SHAPES)}."})
    aggressive_learning_rate: float = dataclasses.field(
        default=1.875e-3, metadata={"help": "At which every arm is measured as well: 0.03 in the layers of the proxy."}
    )


# Optimizer of the layers' matrices, targets of MSign, and whether gradients are clipped.
ARMS: dict[str, tuple[str, str | None, bool]] = {
    "msign": ("adamw", "all_2d", True),
    "msign_attention": ("adamw", "attention", True),
    "msign_mlp": ("adamw", r"\.mlp\.", True),
    "adamw_clip": ("adamw", None, True),
    "adamw": ("adamw", None, False),
    "muon": ("muon", None, True),
    "muon_msign": ("muon", "all_2d", True),
}

_PAPER_OPTIMIZER = {
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "adam_epsilon": 1e-8,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "warmup_stable_decay",
}
_PROXY = _PAPER_OPTIMIZER | {
    "shape": "proxy",
    "max_documents": 120,  # a run reads 150,000 bytes
    "held_out_fraction": 0.1,
    "sequence_length": 32,
    "tokenizer_vocab_size": 261,  # bytes and special tokens
    "max_eval_blocks": 2048,
    "dataset_license": "PSF-2.0",
    "dataset_language": "code",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 64,
    "max_steps": 600,
    "warmup_steps": 100,
    "lr_scheduler_kwargs": {"num_decay_steps": 500, "min_lr_ratio": 0.1, "decay_type": "linear"},
    "msign_period": 20,  # the paper's is 100, for runs of thousands of steps
    "logging_steps": 10,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
PRESETS = {
    "demo": _PROXY
    | {
        "arms": ["msign", "adamw_clip"],
        "seeds": [0],
        "learning_rates": [1.875e-3],
        "output_dir": "runs/msign",
    },
    # Fixed before any result of this recipe was seen; what was changed since is in the `note` of the results.
    "evidence": _PROXY
    | {
        "arms": ["msign", "msign_attention", "msign_mlp", "adamw_clip", "adamw", "muon"],
        "seeds": [0, 1, 2],
        "learning_rates": [6e-4, 1.2e-3, 1.875e-3],
        "output_dir": "runs/msign_evidence",
    },
    # NanoGPT-5M: 123k tokens a step; its baseline collapses near step 30,000. The total number of steps was not seen.
    "paper": _PAPER_OPTIMIZER
    | {
        "shape": "nanogpt-5m",
        "arms": ["msign", "adamw_clip"],
        "seeds": [0],
        "learning_rates": [6e-4],
        "aggressive_learning_rate": 6e-4,
        "workers": 0,
        "sequence_length": 256,
        "tokenizer_name": "openai-community/gpt2",
        "streaming": True,
        "max_eval_blocks": 2048,
        "output_dir": "runs/msign-paper",
        "per_device_train_batch_size": 480,
        "max_steps": 50_000,
        "warmup_steps": 2000,
        "lr_scheduler_kwargs": {"num_decay_steps": 48_000, "min_lr_ratio": 0.1, "decay_type": "linear"},
        "msign_period": 100,
        "logging_steps": 50,
        "save_steps": 2000,
        "save_total_limit": 2,
        "bf16": True,
        "report_to": ["tensorboard"],
    },
}
PRESETS["paper-llama-1b"] = PRESETS["paper"] | {
    "shape": "llama-1b",
    "learning_rates": [1e-3],
    "aggressive_learning_rate": 1e-3,
    "sequence_length": 2048,
    "per_device_train_batch_size": 32,  # 66k tokens a step; collapses near step 2,000
    "max_steps": 10_000,
    "lr_scheduler_kwargs": {"num_decay_steps": 8_000, "min_lr_ratio": 0.1, "decay_type": "linear"},
    "gradient_checkpointing": True,
    "output_dir": "runs/msign-llama-1b",
}
PRESETS["paper-llama-moe-3b"] = PRESETS["paper-llama-1b"] | {
    "shape": "llama-moe-3b",  # collapses near step 3,000
    "output_dir": "runs/msign-llama-moe-3b",
}


class ArmOptimizer:
    """Trainer's optimizer factory for an arm: groups with their own learning rates, AdamW or Muon, MSign around it."""

    def __call__(
        self, model: PreTrainedModel, *, arm: str, shape: str, learning_rate: float, args: RecipeTrainingArguments
    ) -> torch.optim.Optimizer:
        """The optimizer of `model`'s trainable parameters."""
        base, targets, _ = ARMS[arm]
        groups = parameter_groups(model, shape, learning_rate=learning_rate, weight_decay=args.weight_decay)
        options = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        if base == "muon":
            for group in groups:
                group["use_muon"] = group["name"] == "layers"
            optimizer = MuonAdamW(groups, **options)
        else:
            optimizer = torch.optim.AdamW(groups, **options, fused=True)
        if targets is None:
            return optimizer
        return MSign(optimizer, select_targets(model, targets), period=args.msign_period)


def build_arm(job: Job, data: LanguageData, *, args: StabilityArguments, training_args: RecipeTrainingArguments):
    """Model, probe, optimizer and clipping of a run."""
    _, _, clips = ARMS[job.arm]
    model = build_model(args.shape, data.tokenizer, len(data.validation[0]["input_ids"]), job.seed)
    optimizer = {"arm": job.arm, "shape": args.shape, "learning_rate": job.learning_rate, "args": training_args}
    return Start(
        model,
        [StableRankCallback()],
        (ArmOptimizer, optimizer),
        {} if clips else {"max_grad_norm": 0.0},
    )


def compare_stability(
    preset: str,
    comparison_args: ComparisonArguments,
    args: StabilityArguments,
    data_args: DataArguments,
    training_args: RecipeTrainingArguments,
) -> Path:
    """Train every arm, measure, and write model, `results.json` and figures into the run folder, which is returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    data = prepare_language_data(data_args, training_args)
    build = partial(build_arm, args=args, training_args=training_args)
    comparison = compare_arms(comparison_args, training_args, data, build, comparison_args.arms)
    driven = _at_one_rate(comparison, comparison_args, args.aggressive_learning_rate, training_args, data, build)
    state = PartialState()
    if state.is_main_process:
        model = publish_first_run(comparison, data)
        write_comparison(
            comparison,
            comparison_args,
            training_args,
            data,
            data_args,
            method="msign",
            title="MSign, stable-rank restoration",
            preset=preset,
            started=start,
            metrics=_metrics(comparison, driven, args),
            evidence={
                "shape": args.shape,
                "aggressive_learning_rate": args.aggressive_learning_rate,
                "learning_rate_of_layers": f"{SHAPES[args.shape].layer_lr:g} times the learning rate",
                "msign_period": training_args.msign_period,
                "arms": {arm: _described(arm) for arm in comparison.fits},
            },
            model=_sizes(model),
            figures=_figures(comparison, driven),
        )
    state.wait_for_everyone()
    return root


def _at_one_rate(
    comparison: Comparison,
    comparison_args: ComparisonArguments,
    rate: float,
    training_args: RecipeTrainingArguments,
    data: LanguageData,
    build: Any,
) -> Comparison:
    """Every arm and seed at one learning rate, whatever suits it best; runs of the grid are not repeated."""
    jobs = {
        arm: [Job(arm, seed, rate, training_args.max_steps) for seed in comparison_args.seeds]
        for arm in comparison.fits
    }
    fits = run_jobs([job for own in jobs.values() for job in own], comparison_args.workers, training_args, data, build)
    driven = Comparison({}, {}, comparison.root)
    for arm, own in jobs.items():
        driven.add(arm, own, fits)
    return driven


def _described(arm: str) -> str:
    base, targets, clips = ARMS[arm]
    return base + (f" + MSign on {targets}" if targets else "") + (", clipped" if clips else ", not clipped")


def _sizes(model: PreTrainedModel) -> Model:
    embeddings = {
        id(m.weight): m.weight.numel() for m in (model.get_input_embeddings(), model.get_output_embeddings())
    }
    inner = model.num_parameters() - sum(embeddings.values())
    return Model(
        parameters_total=model.num_parameters(),
        parameters_active=inner,
        parameters_non_embedding=inner,
        note="active: without embeddings and output head",
    )


def _metrics(comparison: Comparison, driven: Comparison, args: StabilityArguments) -> dict[str, Metric]:
    metrics = {}
    for name, runs, note in (
        ("held_out_loss", comparison, "each arm at its best learning rate"),
        ("held_out_loss_driven_hard", driven, f"each arm at the learning rate {args.aggressive_learning_rate:g}"),
    ):
        metric = against_baselines(
            {
                arm: summarise([fit.nats_per_token for fit in fits], unit=NATS, higher_is_better=False)
                for arm, fits in runs.fits.items()
            }
        )
        rates = ", ".join(f"{arm} {rate:g}" for arm, rate in runs.learning_rates.items())
        metric.note = f"{note} ({rates})" if runs is comparison else note
        metrics[name] = metric
    for kind in ("v", "o"):
        metrics[f"stable_rank_of_{kind}"] = against_baselines(
            {
                arm: summarise([_last(fit.history, f"stable_rank/{kind}") for fit in fits])
                for arm, fits in driven.fits.items()
            }
        )
        metrics[f"stable_rank_of_{kind}"].note = (
            f"driven hard; W_{kind.upper()}, geometric mean over the first quarter of the layers, mean over the last "
            "tenth of the run"
        )
    metrics["largest_gradient_norm"] = against_baselines(
        {
            arm: summarise([max(row["grad_norm"] for row in fit.history if "grad_norm" in row) for fit in fits])
            for arm, fits in driven.fits.items()
        }
    )
    metrics["largest_gradient_norm"].note = "driven hard; before clipping, of the logged steps"
    return metrics


def _last(history: list[dict], name: str) -> float:
    """Mean over the last tenth of what was logged."""
    values = [row[name] for row in history if name in row]
    tail = values[-max(1, len(values) // 10) :]
    return sum(tail) / len(tail)


def _figures(comparison: Comparison, driven: Comparison) -> list[FigureFile]:
    figures = comparison.root / "figures"
    losses = {arm: [fit.nats_per_token for fit in fits] for arm, fits in driven.fits.items()}
    comparison_figure(losses, figures / "driven_hard.png", y_label=f"held-out {NATS}", higher_is_better=False)
    ranks = {
        arm: tuple(
            zip(*((r["step"], r["stable_rank/v"]) for r in fits[0].history if "stable_rank/v" in r), strict=True)
        )
        for arm, fits in driven.fits.items()
    }
    options = {"x_label": "step", "y_label": "stable rank of W_V", "higher_is_better": True}
    loss_figure(ranks, figures / "stable_rank.png", **options)
    return [
        FigureFile(path="figures/driven_hard.png", caption="Held-out loss at one high learning rate; dots are seeds."),
        FigureFile(
            path="figures/stable_rank.png",
            caption="Stable rank of the value projections in the first quarter of the layers, first seed, one high "
            "learning rate.",
        ),
    ]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ComparisonArguments, StabilityArguments, DataArguments, RecipeTrainingArguments)
    preset, (comparison_args, args, data_args, training_args) = parse_arguments(
        types, PRESETS, argv, default_preset="demo"
    )
    refuse_options(training_args, "optimizer", because="here --arms say which run has MSign around which optimizer.")
    if unknown := sorted(set(comparison_args.arms) - set(ARMS)):
        raise SystemExit(f"--arms: {unknown} not known. Choose from {', '.join(ARMS)}.")
    if args.shape not in SHAPES:
        raise SystemExit(f"--shape: {args.shape!r} is not known. Choose one of {', '.join(SHAPES)}.")
    compare_stability(preset, comparison_args, args, data_args, training_args)


if __name__ == "__main__":
    main()
