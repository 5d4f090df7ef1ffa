"""Grow a trained mixture of experts and train on (orthogonal growth, arXiv 2510.08008), beside what it competes with.

    python -m trainers.recipes.grow_and_continue --preset demo
    python -m trainers.recipes.grow_and_continue --preset evidence
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.grow_and_continue --preset paper \\
        --source ORG/MODEL --dataset_name ORG/CORPUS

Without `--source`, a base model is trained first (at a constant learning rate, as the authors advise), and every arm
gets the same extra FLOPs, however large its model is, on blocks in an order that the base has not seen. FLOPs are 6 N
a token, the output head included; attention scores are left out, which at the evidence's shape gives arms of twice the
depth some 8 % more than they are charged, and arms of twice the width 7 % less.

| arm | starts as | size |
|---|---|---|
| `interposition` | base, each layer repeated next to itself | 2 x layers |
| `stack` | base, the whole block of layers repeated | 2 x layers |
| `zero_output` | `interposition`, copies without output: the base's function | 2 x layers |
| `scratch_depth` | initialisation | 2 x layers |
| `width` | base, experts and router rows doubled with 1 % noise, twice as many active | 2 x experts |
| `width_exact` | the same without noise | 2 x experts |
| `scratch_width` | initialisation | 2 x experts |
| `continued` | base | that of the base |

`--sweep` grows by interposition from earlier points of the base too, once with the extra FLOPs fixed, once with the
total fixed. The optimizer starts anew and the learning rate warms up again, as in the paper. The folder ends up as a
Hub repository with the first arm's first seed; a repeated command goes on.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM, wrap_moe
from hf_models.moe.elastic import num_active_parameters
from hf_models.moe.growth import GrowthPlan, grow_config, grow_model
from hf_models.moe.growth_advice import advise, chinchilla_flops, norm_profile, recommend

from ..callbacks import ExpertBalanceCallback
from ..figures import comparison_figure, elastic_figure
from ..report import FigureFile, Metric, summarise
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments, training_arguments_of
from .comparison import (
    BITS,
    Comparison,
    ComparisonArguments,
    Job,
    against_baselines,
    compare_arms,
    publish_first_run,
    run_jobs,
    write_comparison,
)
from .description import describe_model
from .language_model import LanguageData, prepare_language_data, require_writable
from .moe_family import OPTIMIZER, SMALL_RUN, model_config


@dataclasses.dataclass
class GrowthArguments:
    """What is grown, when, and how long the result trains."""

    source: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Folder or Hub id of the model to grow, with its own tokenizer; none: a base is trained first."
        },
    )
    model_preset: str = dataclasses.field(default="evidence-small", metadata={"help": "Shape of the base."})
    router_aux_loss_coef: float | None = dataclasses.field(default=None, metadata={"help": "Default: the preset's."})
    sunk_steps: int = dataclasses.field(default=1400, metadata={"help": "Steps of the base before it grows."})
    extra_share: float = dataclasses.field(
        default=0.5, metadata={"help": "FLOPs of every arm after growth, relative to those of the base."}
    )
    sweep: list[int] = dataclasses.field(
        default_factory=list, metadata={"help": "Earlier steps of the base to grow from, for the timing sweep."}
    )
    noise_alpha: float = dataclasses.field(
        default=0.01, metadata={"help": "Noise on the copies of experts and router rows, of `width` and --source."}
    )
    depth_factor: int = dataclasses.field(default=2, metadata={"help": "With --source."})
    width_factor: int = dataclasses.field(default=1, metadata={"help": "With --source."})


CONSTANT = {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": None}
DATA_SEED = 1000  # added to the seed of a run after growth
PLANS = {
    "interposition": GrowthPlan(depth_factor=2),
    "stack": GrowthPlan(depth_factor=2, depth_method="stack"),
    "zero_output": GrowthPlan(depth_factor=2, depth_copy_init="zero_output"),
    "scratch_depth": GrowthPlan(depth_factor=2),
    "width": GrowthPlan(width_factor=2),
    "width_exact": GrowthPlan(width_factor=2, noise_alpha=0.0),
    "scratch_width": GrowthPlan(width_factor=2),
    "continued": None,
}
DEPTH_ARMS = ("interposition", "stack", "zero_output", "scratch_depth", "continued")
WIDTH_ARMS = ("width", "width_exact", "scratch_width", "continued")

PRESETS = {
    "demo": SMALL_RUN
    | CONSTANT
    | {
        "arms": ["interposition", "scratch_depth", "continued"],
        "seeds": [0],
        "learning_rates": [4e-3],
        "tokenizer_vocab_size": 1024,
        "sunk_steps": 700,
        "output_dir": "runs/growth",
        "warmup_steps": 20,
        "logging_steps": 20,
    },
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": SMALL_RUN
    | CONSTANT
    | {
        "arms": ["interposition", "stack", "scratch_depth", "width", "scratch_width", "continued"],
        "seeds": [0, 1, 2],
        "learning_rates": [2e-3],  # one constant rate for everything that grows, as in the paper's studies
        "tokenizer_vocab_size": 1024,
        "sweep": [350, 700],
        "output_dir": "runs/growth_evidence",
        "warmup_steps": 20,
        "logging_steps": 50,
    },
    # The paper's large run grows 28 layers to 56 after 600B tokens, trains for 300B, then doubles the experts. The
    # constant rate 3e-4 is that of its studies; optimizer settings were not seen and are the family's.
    "paper": OPTIMIZER
    | CONSTANT
    | {
        "arms": ["grown"],
        "seeds": [0],
        "learning_rates": [3e-4],
        "workers": 0,
        "sequence_length": 4096,
        "streaming": True,
        "max_eval_blocks": 512,
        "output_dir": "runs/growth-paper",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 75_000,
        "warmup_steps": 1000,
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
    },
}


def build_base(job: Job, data: LanguageData, *, config: SigmaMoeConfig):
    """The base model, freshly initialised from the seed."""
    set_seed(job.seed)
    return SigmaMoeForCausalLM(SigmaMoeConfig(**config.own_fields())), [ExpertBalanceCallback()]


def build_arm(
    job: Job, data: LanguageData, *, config: SigmaMoeConfig, root: Path, base_rate: float, args: GrowthArguments
):
    """The model of an arm before its first step. It grows from the end of the base, or from the step in the name of
    the arm (`interposition@350`)."""
    name, _, at = job.arm.partition("@")
    plan = PLANS[name.removesuffix("_total")]
    set_seed(job.seed)
    if name.startswith("scratch"):
        return SigmaMoeForCausalLM(grow_config(config, plan)), [ExpertBalanceCallback()]
    base = Job("base", job.seed, base_rate, 0).folder(root) / f"checkpoint-{int(at or args.sunk_steps)}"
    if not base.is_dir():
        raise FileNotFoundError(
            f"{base} is missing: the base was trained without a checkpoint there. Choose another --output_dir."
        )
    model = SigmaMoeForCausalLM.from_pretrained(base)
    if plan is not None:
        noise = args.noise_alpha if name == "width" else plan.noise_alpha
        model = grow_model(model, dataclasses.replace(plan, seed=job.seed, noise_alpha=noise))
    return model, [ExpertBalanceCallback()]


def build_grown(job: Job, data: LanguageData, *, args: GrowthArguments):
    """The one arm of `--source`: that model, grown."""
    model = AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32)
    plan = GrowthPlan(
        depth_factor=args.depth_factor,
        width_factor=args.width_factor,
        noise_alpha=args.noise_alpha,
        seed=job.seed,
    )
    grown = grow_model(model, plan)
    if hasattr(model, "routing_window"):
        return grown, [ExpertBalanceCallback()]
    # transformers adds its balance loss only where router logits are asked for.
    coefficient = args.router_aux_loss_coef
    if coefficient is None:
        coefficient = getattr(model.config, "router_aux_loss_coef", None) or 0.0
    return wrap_moe(grown, aux_loss_coef=coefficient), []


def flops_per_token(config: SigmaMoeConfig) -> int:
    """6 N of a training step, N being what a token passes through, output head included; attention scores are not."""
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(config)
    return 6 * (model.num_active_parameters() + model.get_output_embeddings().weight.numel())


def steps_of(arm: str, config: SigmaMoeConfig, args: GrowthArguments) -> int:
    """Steps of an arm after growth: the same FLOPs for all, or, with `_total`, what its earlier growth leaves."""
    name, _, at = arm.partition("@")
    plan = PLANS[name.removesuffix("_total")]
    base = flops_per_token(config)
    budget = args.extra_share * args.sunk_steps * base
    if name.endswith("_total"):
        budget += (args.sunk_steps - int(at)) * base
    grown = base if plan is None else flops_per_token(grow_config(config, plan))
    return max(1, round(budget / grown))


def grow_and_continue(
    preset: str,
    comparison_args: ComparisonArguments,
    args: GrowthArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Path:
    """Train the base and every arm, measure, and write model, `results.json` and figures into the run folder."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    if args.source is None:
        require_points_of_growth(args)
    else:  # its embeddings mean the tokens of its own tokenizer
        data_args = dataclasses.replace(data_args, tokenizer_name=data_args.tokenizer_name or args.source)
    data = prepare_language_data(data_args, training_args)
    extra: dict[str, Metric] = {}
    plan: dict = {}
    figures: list[FigureFile] = []
    if args.source is not None:
        plan = _plan_of_source(args)
        build = partial(build_grown, args=args)
        comparison = compare_arms(comparison_args, training_args, data, build, comparison_args.arms)
    else:
        config = model_config(args, data, data_args.sequence_length)
        base = _train_base(comparison_args, args, training_args, data, config)
        comparison, sweep = _train_arms(comparison_args, args, training_args, data, config, base)
        if PartialState().is_main_process:
            extra, plan = _metrics(base, comparison, sweep, args), _plan(config, base, comparison_args, args)
            figures = _figures(base, comparison, sweep, args)
    state = PartialState()
    if state.is_main_process:
        model = publish_first_run(comparison, data)
        write_comparison(
            comparison,
            comparison_args,
            training_args,
            data,
            data_args,
            method="growth",
            title="Orthogonal growth of mixtures of experts",
            preset=preset,
            started=start,
            metrics=_quality(comparison) | extra,
            evidence={
                "steps": next(iter(comparison.fits.values()))[0].steps,
                "measured_on": _measured_on(comparison, extra),
            }
            | plan,
            model=dataclasses.replace(_described(model), base=_hub_id(args.source)),
            figures=figures,
        )
    state.wait_for_everyone()
    return root


def require_points_of_growth(args: GrowthArguments) -> None:
    """`ValueError` for steps at which the base has no checkpoint."""
    if args.sunk_steps < 1 or not all(0 < step < args.sunk_steps for step in args.sweep):
        raise ValueError(
            f"sweep={args.sweep} must lie between 0 and sunk_steps={args.sunk_steps}, where every arm grows anyway."
        )
    every = min([args.sunk_steps, *args.sweep])
    if any(step % every for step in (args.sunk_steps, *args.sweep)):
        raise ValueError(
            f"sunk_steps={args.sunk_steps} and sweep={args.sweep} must be multiples of the smallest of them, "
            "because a checkpoint is written every so many steps."
        )


def _train_base(comparison_args, args: GrowthArguments, training_args, data: LanguageData, config) -> Comparison:
    """The base of each seed, with checkpoints where something grows."""
    every = min([args.sunk_steps, *args.sweep])
    base_args = training_arguments_of(
        training_args, max_steps=args.sunk_steps, save_strategy="steps", save_steps=every, save_total_limit=None
    )
    return compare_arms(comparison_args, base_args, data, partial(build_base, config=config), ["base"])


def _train_arms(
    comparison_args, args: GrowthArguments, training_args, data: LanguageData, config, base: Comparison
) -> tuple[Comparison, Comparison]:
    """The arms, each at its best rate, and the sweep at that of interposition."""

    def job_of(arm: str, seed: int, rate: float) -> Job:
        return Job(arm, seed, rate, steps_of(arm, config, args), seed + DATA_SEED)

    build = partial(
        build_arm,
        config=config,
        root=Path(training_args.output_dir),
        base_rate=base.learning_rates["base"],
        args=args,
    )
    comparison = compare_arms(comparison_args, training_args, data, build, comparison_args.arms, job_of=job_of)
    sweep = Comparison({}, {}, comparison.root)
    if args.sweep:
        rate = comparison.learning_rates["interposition"]
        names = [f"interposition{budget}@{at}" for at in args.sweep for budget in ("", "_total")]
        jobs = {name: [job_of(name, seed, rate) for seed in comparison_args.seeds] for name in names}
        fits = run_jobs(
            [job for row in jobs.values() for job in row], comparison_args.workers, training_args, data, build
        )
        for name in names:
            sweep.add(name, jobs[name], fits)
    return comparison, sweep


def _summary(comparison: Comparison, arm: str) -> Metric:
    fits = comparison.fits[arm]
    metric = summarise([f.bits_per_character for f in fits], unit=BITS, higher_is_better=False)
    metric.note = f"{fits[0].parameters / 1e3:,.0f}k parameters, {fits[0].steps} steps at {fits[0].learning_rate:g}"
    return metric


def _quality(comparison: Comparison) -> dict[str, Metric]:
    """Depth against its baselines, width against its own; the first arm names the headline."""
    metrics = {}
    for name, arms in (("depth", DEPTH_ARMS), ("width", WIDTH_ARMS)):
        present = [arm for arm in arms if arm in comparison.fits]
        if len(present) > 1:
            metrics[f"held_out_bits_{name}"] = against_baselines({arm: _summary(comparison, arm) for arm in present})
    first = next(iter(comparison.fits))
    return {"held_out_bits_per_character": _summary(comparison, first)} | metrics


def _measured_on(comparison: Comparison, extra: dict[str, Metric]) -> dict[str, str]:
    """Metrics whose value is not that of the published model, the first arm, and what they were measured on."""
    first = next(iter(comparison.fits))
    owners = {"base_bits_per_character": "base", "norm_seam_of_stacking": "base"}
    owners |= {name: name.rpartition("_fixed_")[0] for name in extra if "_fixed_" in name}
    owners = {name: owner for name, owner in owners.items() if name in extra}
    for name, arms in (("depth", DEPTH_ARMS), ("width", WIDTH_ARMS)):
        present = [arm for arm in arms if arm in comparison.fits]
        if len(present) > 1 and present[0] != first:
            owners[f"held_out_bits_{name}"] = present[0]
    return owners


def _hub_id(source: str | None) -> str | None:
    return None if source is None or Path(source).exists() else source


def _plan_of_source(args: GrowthArguments) -> dict:
    return {
        "source": _hub_id(args.source) or Path(args.source).resolve().name,
        "depth_factor": args.depth_factor,
        "width_factor": args.width_factor,
        "noise_alpha": args.noise_alpha,
    }


def _metrics(base: Comparison, comparison: Comparison, sweep: Comparison, args: GrowthArguments) -> dict[str, Metric]:
    metrics = {"base_bits_per_character": _summary(base, "base")}
    points = {at: (f"interposition@{at}", f"interposition_total@{at}") for at in args.sweep}
    for at, names in points.items():
        for name, budget in zip(names, ("extra", "total"), strict=True):
            latest = {f"grown_at_{at}": _summary(sweep, name)}
            latest[f"grown_at_{args.sunk_steps}"] = _summary(comparison, "interposition")
            metric = against_baselines(latest)
            metric.note = f"grown at step {at} of the base, {budget} FLOPs fixed; " + metric.note
            metrics[f"grown_at_{at}_fixed_{budget}"] = metric
    seams = [recommend(norm_profile(folder)).seam_ratio for folder in base.folders("base")]
    metrics["norm_seam_of_stacking"] = summarise(
        seams,
        note="step of the experts' weight norm from the last layer to the first, which stacking makes neighbours, "
        "over the mean step between neighbours",
    )
    return metrics


def _plan(config, base: Comparison, comparison_args: ComparisonArguments, args: GrowthArguments) -> dict:
    with torch.device("meta"):
        active = SigmaMoeForCausalLM(SigmaMoeConfig(**config.own_fields())).num_active_parameters()
    fit = base.fits["base"][0]
    sunk = 6.0 * active * fit.tokens
    rules = advise(sunk, args.extra_share * sunk, active, noise_alpha=args.noise_alpha)
    return {
        "sunk_steps": args.sunk_steps,
        "sunk_tokens": fit.tokens,
        "sunk_over_chinchilla_flops": round(sunk / chinchilla_flops(active), 3),
        "extra_flops_over_sunk": args.extra_share,
        "flops_counted_as": "6 N a token with the output head, without attention scores",
        "steps_after_growth": {arm: steps_of(arm, config, args) for arm in comparison_args.arms},
        "base_learning_rate": base.learning_rates["base"],
        "advice": [f"{'kept' if rule.follows else 'not kept'}: {rule.text}" for rule in rules],
    }


def _figures(base: Comparison, comparison: Comparison, sweep: Comparison, args: GrowthArguments) -> list[FigureFile]:
    figures = comparison.root / "figures"
    groups = {arm: [f.bits_per_character for f in fits] for arm, fits in comparison.fits.items()}
    comparison_figure(groups, figures / "quality.png", y_label=f"held-out {BITS}", higher_is_better=False)
    made = [FigureFile(path="figures/quality.png", caption="Held-out loss of every arm after equal extra FLOPs.")]
    if args.sweep:
        steps = [*args.sweep, args.sunk_steps]
        curves = {}
        for budget, label in (("", "extra FLOPs fixed"), ("_total", "total FLOPs fixed")):
            values = [_summary(sweep, f"interposition{budget}@{at}").value for at in args.sweep]
            curves[label] = list(zip(steps, [*values, _summary(comparison, "interposition").value]))
        elastic_figure(
            curves, figures / "sweep.png", x_label="steps of the base before growth", y_label=f"held-out {BITS}"
        )
        made.append(FigureFile(path="figures/sweep.png", caption="Loss against the point of growth."))
    norms = {"base": base.folders("base")[0]}
    norms |= {arm: comparison.folders(arm)[0] for arm in ("interposition", "stack") if arm in comparison.fits}
    profiles = {name: [(row.layer, row.norm) for row in norm_profile(folder)] for name, folder in norms.items()}
    elastic_figure(profiles, figures / "norms.png", x_label="layer", y_label="root mean square of expert weights")
    made.append(FigureFile(path="figures/norms.png", caption="Weight norms of the experts, first seed, at the end."))
    return made


def _described(model: PreTrainedModel):
    if not hasattr(model, "num_active_parameters"):
        model.num_active_parameters = partial(num_active_parameters, model)
    return describe_model(model)


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ComparisonArguments, GrowthArguments, DataArguments, RecipeTrainingArguments)
    preset, (comparison_args, args, data_args, training_args) = parse_arguments(
        types, PRESETS, argv, default_preset="demo"
    )
    if args.source is None and comparison_args.arms == ["grown"]:
        raise SystemExit("--arms grown needs the model that is to be grown: --source FOLDER_OR_HUB_ID.")
    known = ["grown"] if args.source is not None else list(PLANS)
    unknown = sorted(set(comparison_args.arms) - set(known))
    if unknown:
        raise SystemExit(f"--arms {' '.join(unknown)}: not known here. Choose from {', '.join(known)}.")
    if args.sweep and "interposition" not in comparison_args.arms:
        raise SystemExit("--sweep needs the arm interposition: its learning rate and its result are compared with.")
    if args.source is None:
        try:
            require_points_of_growth(args)
        except ValueError as error:
            raise SystemExit(f"--sunk_steps, --sweep: {error}") from error
    grow_and_continue(preset, comparison_args, args, data_args, training_args)


if __name__ == "__main__":
    main()
