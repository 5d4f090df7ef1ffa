"""Pre-train MoNE, a mixture of neuron experts (arXiv 2510.05781), beside the mixtures that it claims to beat.

    accelerate launch -m trainers.recipes.pretrain_mone --preset demo
    python -m trainers.recipes.pretrain_mone --preset evidence
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.pretrain_mone --preset paper \\
        --dataset_name ORG/CORPUS

K is the experts per token of the host, r = K_N / d the share of neurons. A token uses (1 + 2 r) / 3 of an expert's
parameters, so that there are two readings of "equal activated parameters", and an arm for each:

| arm | experts per token | neurons | active expert parameters, K experts = 1 |
|---|---|---|---|
| `mone` | K | r, with the neuron balance loss | (1 + 2 r) / 3 |
| `mone_unbalanced` | K | r, without it | (1 + 2 r) / 3 |
| `moe` | K | all | 1 |
| `moe_narrow` | K | all, of experts (1 + 2 r) / 3 as wide: the active parameters of `mone` | (1 + 2 r) / 3 |
| `mone_2k` | 2 K | 1/2: equal to `moe` by neurons | 4/3 |
| `mone_2k_quarter` | 2 K | 1/4: equal to `moe` by parameters | 1 |

The folder ends up as a Hub repository with the first arm's first seed; a repeated command goes on.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from hf_models.moe import MoneConfig, MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.neurons import active_expert_share

from ..callbacks import ExpertBalanceCallback
from ..evaluation import evaluate_neuron_ratios, neuron_use, unused_share
from ..figures import comparison_figure, loss_figure
from ..report import FigureFile, Metric, summarise
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments
from .comparison import (
    BITS,
    Comparison,
    ComparisonArguments,
    Job,
    against_baselines,
    compare_arms,
    publish_first_run,
    quality_metric,
    write_comparison,
)
from .description import describe_model
from .language_model import LanguageData, prepare_language_data, require_writable
from .moe_family import OPTIMIZER, SMALL_RUN, model_config


@dataclasses.dataclass
class MoneArguments:
    """The model and how far its neurons are thinned out."""

    model_preset: str = dataclasses.field(default="evidence", metadata={"help": "Shape: see SigmaMoeConfig."})
    neuron_ratio: float = dataclasses.field(default=0.5, metadata={"help": "r of the arms with K experts."})
    neuron_aux_loss_coef: float = dataclasses.field(
        default=1e-3, metadata={"help": "Weight of the neuron balance loss; the paper's is not known."}
    )
    router_aux_loss_coef: float | None = dataclasses.field(default=None, metadata={"help": "Default: the preset's."})
    pruned_shares: list[float] = dataclasses.field(
        default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95],
        metadata={"help": "Shares of the neurons to leave out at inference, for the curve."},
    )


ARMS = ("mone", "mone_unbalanced", "moe", "moe_narrow", "mone_2k", "mone_2k_quarter")
# Metric, its arm, and what of the experts that arm has as much of active as `moe`.
EQUAL_COST = (
    ("equal_active_parameters", "mone_2k_quarter", "parameters"),
    ("equal_active_neurons", "mone_2k", "neurons"),
)
PRESETS = {
    "demo": SMALL_RUN
    | {
        "arms": ["mone", "moe"],
        "seeds": [0],
        "learning_rates": [4e-3],
        "output_dir": "runs/mone",
        "max_steps": 300,
        "warmup_steps": 30,
        "lr_scheduler_kwargs": {"num_decay_steps": 90, "min_lr_ratio": 0.05},
        "logging_steps": 10,
    },
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": SMALL_RUN
    | {
        "arms": list(ARMS),
        "seeds": [0, 1, 2],
        "learning_rates": [2e-3, 4e-3, 8e-3],
        "output_dir": "runs/mone_evidence",
        "max_steps": 400,
        "warmup_steps": 40,
        "lr_scheduler_kwargs": {"num_decay_steps": 120, "min_lr_ratio": 0.05},
        "logging_steps": 20,
    },
    # The paper's two sizes (0.93B and 2.81B parameters) have no published architecture: this is the family's 20B shape
    # with the family's optimizer, and half of the neurons.
    "paper": OPTIMIZER
    | {
        "arms": ["mone"],
        "seeds": [0],
        "learning_rates": [4e-4],
        "workers": 0,
        "model_preset": "sigma-moe-tiny",
        "sequence_length": 4096,
        "tokenizer_vocab_size": 200064,
        "streaming": True,
        "max_eval_blocks": 512,
        "output_dir": "runs/mone-paper",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 100_000,
        "warmup_steps": 2000,
        "lr_scheduler_kwargs": {"num_decay_steps": 10_000, "min_lr_ratio": 0.1},
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
    },
}


def arm_config(arm: str, config: SigmaMoeConfig, args: MoneArguments) -> SigmaMoeConfig:
    """Configuration of an arm, from that of the host with all neurons. `ValueError` for an unknown arm."""
    if arm not in ARMS:
        raise ValueError(f"arm {arm!r} is not known. Choose from {', '.join(ARMS)}.")
    fields = config.own_fields()
    if arm == "moe":
        return SigmaMoeConfig(**fields)
    if arm == "moe_narrow":
        width = config.moe_intermediate_size
        share = active_expert_share(round(args.neuron_ratio * width), width)
        # grouped_mm wants multiples of 8.
        return SigmaMoeConfig(**fields | {"moe_intermediate_size": 8 * round(share * width / 8)})
    ratio = {"mone_2k": 0.5, "mone_2k_quarter": 0.25}.get(arm, args.neuron_ratio)
    changes = {
        "neuron_ratio": ratio,
        "neuron_aux_loss_coef": 0.0 if arm == "mone_unbalanced" else args.neuron_aux_loss_coef,
    }
    if arm.startswith("mone_2k"):
        changes["num_experts_per_tok"] = 2 * config.num_experts_per_tok
    return MoneConfig(**fields | changes)


def build_arm(job: Job, data: LanguageData, *, config: SigmaMoeConfig, args: MoneArguments):
    """Model, freshly initialised from the seed, and callbacks of a run."""
    set_seed(job.seed)
    own = arm_config(job.arm, config, args)
    model = MoneForCausalLM(own) if isinstance(own, MoneConfig) else SigmaMoeForCausalLM(own)
    return model, [ExpertBalanceCallback()]


def pretrain(
    preset: str,
    comparison_args: ComparisonArguments,
    args: MoneArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Path:
    """Train every arm, measure, and write model, `results.json` and figures into the run folder, which is returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    data = prepare_language_data(data_args, training_args)
    config = model_config(args, data, data_args.sequence_length)
    require_measurable(comparison_args.arms, config, args)
    build = partial(build_arm, config=config, args=args)
    comparison = compare_arms(comparison_args, training_args, data, build, comparison_args.arms)
    state = PartialState()
    if state.is_main_process:
        model = publish_first_run(comparison, data)
        curves, unused = _measure(comparison, args, data, training_args)
        write_comparison(
            comparison,
            comparison_args,
            training_args,
            data,
            data_args,
            method="mone",
            title="MoNE, mixture of neuron experts",
            preset=preset,
            started=start,
            metrics={"held_out_bits_per_character": quality_metric(comparison)}
            | _equal_cost(comparison)
            | _metrics(curves, unused, args),
            evidence={
                "neuron_ratio": args.neuron_ratio,
                "neuron_aux_loss_coef": args.neuron_aux_loss_coef,
                "measured_on": {name: arm for name, arm, _ in EQUAL_COST if arm in comparison.fits},
                "active_parameters": _active_parameters(comparison_args.arms, config, args),
            },
            model=describe_model(model),
            figures=_figures(comparison, curves, args),
        )
    state.wait_for_everyone()
    return root


def require_measurable(arms: list[str], config: SigmaMoeConfig, args: MoneArguments) -> None:
    """Known before hours of training, not after. Raises what an arm's config does, or `ValueError` for a share that
    cannot be left out."""
    for arm in arms:
        arm_config(arm, config, args)
    if wrong := [share for share in args.pruned_shares if not 0 <= share < 1]:
        raise ValueError(f"pruned_shares has {wrong}: shares of neurons to leave out are in [0, 1).")


Curves = dict[str, list[list[float]]]  # arm -> seed -> bits per character at each pruned share


def _measure(
    comparison: Comparison, args: MoneArguments, data: LanguageData, training_args: TrainingArguments
) -> tuple[Curves, dict[str, list[float]]]:
    curves: Curves = {}
    unused: dict[str, list[float]] = {}
    batch_size = training_args.per_device_eval_batch_size
    for arm in comparison.fits:
        if arm not in ("mone", "mone_unbalanced", "moe"):  # the others have another size
            continue
        for folder in comparison.folders(arm):
            model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
            mone = model if isinstance(model, MoneForCausalLM) else MoneForCausalLM.from_moe(model, neuron_ratio=1.0)
            ratios = [1 - share for share in args.pruned_shares]
            points = evaluate_neuron_ratios(mone, data.validation, data.tokenizer, ratios, batch_size=batch_size)
            curves.setdefault(arm, []).append([point.loss.bits_per_character for point in points])
            if arm != "moe":
                use = neuron_use(mone, data.validation, batch_size=batch_size)
                unused.setdefault(arm, []).append(unused_share(use))
    return curves, unused


def _equal_cost(comparison: Comparison) -> dict[str, Metric]:
    """Twice as many experts of fewer neurons against the plain mixture, by the two ways of counting."""
    metrics = {}
    for name, arm, counted in EQUAL_COST:
        if arm in comparison.fits and "moe" in comparison.fits:
            values = {a: [f.bits_per_character for f in comparison.fits[a]] for a in (arm, "moe")}
            metrics[name] = against_baselines(
                {a: summarise(v, unit=BITS, higher_is_better=False) for a, v in values.items()}
            )
            metrics[name].note = f"{arm}: as many active {counted} of experts as moe"
    return metrics


def _metrics(curves: Curves, unused: dict[str, list[float]], args: MoneArguments) -> dict[str, Metric]:
    metrics = {}
    for position, share in enumerate(args.pruned_shares):
        if curves:
            at_share = {
                arm: summarise([seed[position] for seed in seeds], unit=BITS, higher_is_better=False)
                for arm, seeds in curves.items()
            }
            metric = against_baselines(at_share)
            metric.note = f"the trained models with {share:.0%} of each expert's neurons left out at inference"
            metrics[f"pruned_{round(100 * share):02d}_percent"] = metric
    if unused:
        metrics["unused_neurons"] = against_baselines(
            {arm: summarise(shares, unit="share", higher_is_better=False) for arm, shares in unused.items()}
        )
        metrics["unused_neurons"].note = "neurons that less than 1 % of their expert's held-out tokens keep"
    return metrics


def _active_parameters(arms: list[str], config: SigmaMoeConfig, args: MoneArguments) -> dict[str, int]:
    counts = {}
    for arm in arms:
        own = arm_config(arm, config, args)
        with torch.device("meta"):
            model = (MoneForCausalLM if isinstance(own, MoneConfig) else SigmaMoeForCausalLM)(own)
        counts[arm] = model.num_active_parameters()
    return counts


def _figures(comparison: Comparison, curves: Curves, args: MoneArguments) -> list[FigureFile]:
    figures = comparison.root / "figures"
    groups = {arm: [f.bits_per_character for f in fits] for arm, fits in comparison.fits.items()}
    comparison_figure(groups, figures / "quality.png", y_label=f"held-out {BITS}", higher_is_better=False)
    made = [FigureFile(path="figures/quality.png", caption="Held-out loss of every arm; dots are seeds.")]
    if curves:
        means = {arm: (args.pruned_shares, torch.tensor(seeds).mean(dim=0).tolist()) for arm, seeds in curves.items()}
        loss_figure(
            means,
            figures / "pruned.png",
            x_label="share of each expert's neurons left out at inference",
            y_label=f"held-out {BITS}",
        )
        caption = "Loss of trained models as neurons are left out; `moe` was trained with all of them."
        made.append(FigureFile(path="figures/pruned.png", caption=caption))
    return made


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ComparisonArguments, MoneArguments, DataArguments, RecipeTrainingArguments)
    preset, (comparison_args, args, data_args, training_args) = parse_arguments(
        types, PRESETS, argv, default_preset="demo"
    )
    unknown = sorted(set(comparison_args.arms) - set(ARMS))
    if unknown:
        raise SystemExit(f"--arms {' '.join(unknown)}: not known. Choose from {', '.join(ARMS)}.")
    pretrain(preset, comparison_args, args, data_args, training_args)


if __name__ == "__main__":
    main()
