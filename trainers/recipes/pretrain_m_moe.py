"""Pre-train M-MoE, one mixture for every number of active experts (arXiv 2509.26520), beside specialists.

    accelerate launch -m trainers.recipes.pretrain_m_moe --preset demo
    python -m trainers.recipes.pretrain_m_moe --preset evidence
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.pretrain_m_moe --preset paper \\
        --dataset_name ORG/CORPUS

| arm | active experts in training |
|---|---|
| `layer` | drawn from k_min..k_max for each layer of each micro-batch |
| `layer_raw` | as `layer`; a single expert is weighed by its probability, not by 1 |
| `micro_batch`, `global_batch` | drawn for each micro-batch, for each optimizer step |
| `capacity` | as `layer`, with probability proportional to k^(1/2) |
| `fixed_kN` | always N: the specialist at N, and elsewhere what a model of today does |

Every arm sees the same tokens. A uniform draw costs the expert FLOPs of its mean, 58 % of `fixed_k6` for 1..6. The
folder ends up as a Hub repository with the first arm's first seed; a repeated command goes on.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, TrainingArguments, set_seed

from hf_models.moe import MMoeConfig, MMoeForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.elastic import expert_schedule

from ..callbacks import ExpertBalanceCallback, MatryoshkaExpertsCallback
from ..evaluation import ElasticCurve, evaluate_elastic, search_layer_budget
from ..figures import elastic_figure
from ..report import FigureFile, Metric, summarise
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments
from .comparison import (
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
class MMoeArguments:
    """The model and the numbers of experts that it is trained and measured at."""

    model_preset: str = dataclasses.field(default="evidence", metadata={"help": "Shape: see SigmaMoeConfig."})
    router_aux_loss_coef: float | None = dataclasses.field(default=None, metadata={"help": "Default: the preset's."})
    init_from: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Continue a model of the family (folder or Hub id) in every arm, with its own tokenizer."},
    )
    k_min: int = 1
    k_max: int = 6
    default_k: int = dataclasses.field(default=4, metadata={"help": "What the saved model uses, and evaluation."})
    evaluate_at: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 4, 5, 6, 8])
    layer_budget: float | None = dataclasses.field(
        default=2.0, metadata={"help": "Search the best experts per layer of this mean; 0: do not."}
    )


# Draw, distribution, and whether the weight of a single expert is 1.
SAMPLED_ARMS = {
    "layer": ("layer", "uniform", True),
    "layer_raw": ("layer", "uniform", False),
    "micro_batch": ("micro_batch", "uniform", True),
    "global_batch": ("global_batch", "uniform", True),
    "capacity": ("layer", "capacity", True),
}
TARGET = 1.03  # perplexity over the specialist's: "close to the specialists", as our issue of the method puts it

PRESETS = {
    "demo": SMALL_RUN
    | {
        "arms": ["layer", "fixed_k4"],
        "seeds": [0],
        "learning_rates": [4e-3],
        "output_dir": "runs/m_moe",
        "max_steps": 300,
        "warmup_steps": 30,
        "lr_scheduler_kwargs": {"num_decay_steps": 90, "min_lr_ratio": 0.05},
        "logging_steps": 10,
    },
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": SMALL_RUN
    | {
        "arms": ["layer", "layer_raw", "micro_batch", "global_batch", "fixed_k1", "fixed_k2", "fixed_k4", "fixed_k6"],
        "seeds": [0, 1, 2],
        "learning_rates": [2e-3, 4e-3],
        "output_dir": "runs/m_moe_evidence",
        "max_steps": 480,
        "warmup_steps": 48,
        "lr_scheduler_kwargs": {"num_decay_steps": 144, "min_lr_ratio": 0.05},
        "logging_steps": 20,
    },
    # Shape and range as far as they are known (20B, 56 layers, 96 experts, k in 1..6); optimizer and batch were not
    # seen and are the family's. From scratch, as in one study of the paper; its main one continues a model that was
    # trained with one expert: `--init_from`.
    "paper": OPTIMIZER
    | {
        "arms": ["layer"],
        "seeds": [0],
        "learning_rates": [4e-4],
        "workers": 0,
        "model_preset": "sigma-moe-tiny",
        "sequence_length": 4096,
        "tokenizer_vocab_size": 200064,
        "streaming": True,
        "max_eval_blocks": 512,
        "layer_budget": None,
        "output_dir": "runs/m-moe-paper",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 80_000,
        "warmup_steps": 2000,
        "lr_scheduler_kwargs": {"num_decay_steps": 10_000, "min_lr_ratio": 0.1},
        "logging_steps": 10,
        "save_steps": 500,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
    },
}


def fixed_k(arm: str) -> int | None:
    """The number of experts of a specialist `fixed_kN`; None for the arms that draw. `ValueError` for other names."""
    if arm in SAMPLED_ARMS:
        return None
    prefix, _, number = arm.partition("fixed_k")
    if prefix or not number.isdigit():
        raise ValueError(f"arm {arm!r} is not known. Choose from {', '.join(SAMPLED_ARMS)}, fixed_k1, fixed_k2, ...")
    return int(number)


def arm_config(arm: str, config: SigmaMoeConfig, args: MMoeArguments) -> SigmaMoeConfig:
    """Configuration of an arm on the trunk that `config` describes."""
    fields = config.own_fields()
    fields["num_experts_per_tok_per_layer"] = None
    if (k := fixed_k(arm)) is not None:
        fields |= {"k_sampling": "none", "k_min": None, "k_max": None}  # of a base that was trained with draws
        return SigmaMoeConfig(**fields | {"num_experts_per_tok": k})
    sampling, distribution, norm_top1_prob = SAMPLED_ARMS[arm]
    draw = {
        "num_experts_per_tok": args.default_k,
        "norm_top1_prob": norm_top1_prob,
        "k_min": args.k_min,
        "k_max": args.k_max,
        "k_sampling": sampling,
        "k_distribution": distribution,
    }
    return MMoeConfig(**fields | draw)


def build_arm(job: Job, data: LanguageData, *, config: SigmaMoeConfig, args: MMoeArguments):
    """Model, freshly initialised from the seed or continued, and callbacks of a run."""
    set_seed(job.seed)
    own = arm_config(job.arm, config, args)
    model_class, callbacks = SigmaMoeForCausalLM, [ExpertBalanceCallback()]
    if isinstance(own, MMoeConfig):
        own.k_seed = job.seed
        model_class, callbacks = MMoeForCausalLM, [MatryoshkaExpertsCallback(), *callbacks]
    if args.init_from is not None:
        return model_class.from_pretrained(args.init_from, config=own, dtype=torch.float32), callbacks
    return model_class(own), callbacks


def pretrain(
    preset: str,
    comparison_args: ComparisonArguments,
    args: MMoeArguments,
    data_args: DataArguments,
    training_args: TrainingArguments,
) -> Path:
    """Train every arm, measure, and write model, `results.json` and figures into the run folder, which is returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    continued, base = {}, None
    if args.init_from is not None:  # its embeddings mean the tokens of its own tokenizer
        local = Path(args.init_from).exists()
        data_args = dataclasses.replace(data_args, tokenizer_name=data_args.tokenizer_name or args.init_from)
        continued["continued_from"] = Path(args.init_from).resolve().name if local else args.init_from
        base = None if local else args.init_from
    data = prepare_language_data(data_args, training_args)
    config = model_config(args, data, data_args.sequence_length)
    if args.init_from is not None:
        given = {} if args.router_aux_loss_coef is None else {"router_aux_loss_coef": args.router_aux_loss_coef}
        config = SigmaMoeConfig.from_pretrained(args.init_from, **given)
    require_measurable(comparison_args.arms, config, args)
    build = partial(build_arm, config=config, args=args)
    comparison = compare_arms(comparison_args, training_args, data, build, comparison_args.arms)
    state = PartialState()
    if state.is_main_process:
        model = publish_first_run(comparison, data)
        curves = _curves(comparison, args, data, training_args)
        quality = quality_metric(comparison)
        quality.note += f"; drawn arms at {args.default_k} experts, fixed ones at their own"
        metrics = {"held_out_bits_per_character": quality} | _elastic_metrics(curves, args)
        if args.layer_budget and fixed_k(comparison_args.arms[0]) is None:
            metrics |= _budget_metrics(comparison, args, data, training_args)
        write_comparison(
            comparison,
            comparison_args,
            training_args,
            data,
            data_args,
            method="m_moe",
            title="M-MoE, Matryoshka mixture of experts",
            preset=preset,
            started=start,
            metrics=metrics,
            evidence={
                "k_range": [args.k_min, args.k_max],
                "evaluated_at": args.evaluate_at,
                "target_ratio_to_specialist": TARGET,
                "verdicts_at_each_k": "paired over seeds",
            }
            | continued,
            model=dataclasses.replace(describe_model(model), base=base),
            figures=_figures(curves, root),
        )
    state.wait_for_everyone()
    return root


def require_measurable(arms: list[str], config: SigmaMoeConfig, args: MMoeArguments) -> None:
    """Known before hours of training, not after. Raises what an arm's config does, or `ValueError` for numbers of
    experts that cannot be measured."""
    for arm in arms:
        arm_config(arm, config, args)
    if wrong := [k for k in args.evaluate_at if not 1 <= k <= config.num_experts]:
        raise ValueError(f"evaluate_at has {wrong}, which are not in 1..num_experts={config.num_experts}.")
    if args.layer_budget and fixed_k(arms[0]) is None:
        expert_schedule("uniform", config.num_hidden_layers, mean=args.layer_budget, largest=args.k_max)


def _curves(
    comparison: Comparison, args: MMoeArguments, data: LanguageData, training_args: TrainingArguments
) -> dict[str, list[ElasticCurve]]:
    """Of each arm one curve for each seed."""
    batch_size = training_args.per_device_eval_batch_size
    curves = {}
    for arm in comparison.fits:
        curves[arm] = []
        for folder in comparison.folders(arm):
            model = AutoModelForCausalLM.from_pretrained(folder)
            measure = partial(evaluate_elastic, model, data.validation, data.tokenizer, batch_size=batch_size)
            curve = measure(args.evaluate_at)
            if (fixed_k(arm) or 1) > 1 and 1 in args.evaluate_at:
                # With one expert the family weighs it by its score; a model that was trained with several, and knows
                # weights that add up to 1, gets whichever suits it better.
                handles = [router.register_forward_hook(_with_weight_one) for router in model.routers]
                (other,) = measure([1]).points
                for handle in handles:
                    handle.remove()
                position = args.evaluate_at.index(1)
                if other.nats_per_token < curve.points[position].nats_per_token:
                    other = dataclasses.replace(other, expert_flops_share=curve.points[position].expert_flops_share)
                    points = (*curve.points[:position], other, *curve.points[position + 1 :])
                    curve = dataclasses.replace(curve, points=points)
            curves[arm].append(curve)
    return curves


def _with_weight_one(router, args, output):
    logits, weights, indices = output
    return logits, torch.ones_like(weights), indices


def _elastic_metrics(curves: dict[str, list[ElasticCurve]], args: MMoeArguments) -> dict[str, Metric]:
    """Perplexity of every arm at every k, and of ours over that of the specialist at k."""
    ours, metrics = next(iter(curves)), {}
    for position, k in enumerate(args.evaluate_at):
        at_k = {arm: [curve.points[position].perplexity for curve in seeds] for arm, seeds in curves.items()}
        metric = against_baselines(
            {arm: summarise(values, unit="perplexity", higher_is_better=False) for arm, values in at_k.items()}
        )
        metric.note = f"every model run with {k} active experts"
        if k == 1:
            metric.note += "; fixed arms of several by raw or unit weight, whichever is better"
        metrics[f"perplexity_at_{k}_experts"] = metric
        specialist = at_k.get(f"fixed_k{k}")
        if specialist and fixed_k(ours) is None:
            ratios = [a / b for a, b in zip(at_k[ours], specialist, strict=True)]
            target = summarise([TARGET] * len(ratios))
            ratio = against_baselines({ours: summarise(ratios, higher_is_better=False), "target": target})
            ratio.note = f"perplexity over that of the model trained with {k}; the target is {TARGET}"
            metrics[f"over_specialist_at_{k}_experts"] = ratio
    return metrics


def _budget_metrics(
    comparison: Comparison, args: MMoeArguments, data: LanguageData, training_args: TrainingArguments
) -> dict[str, Metric]:
    """Experts per layer found on one half of the held-out blocks, measured on the other."""
    half = len(data.validation) // 2
    calibration, test = data.validation.select(range(half)), data.validation.select(range(half, 2 * half))
    batch_size = training_args.per_device_eval_batch_size
    perplexities: dict[str, list[float]] = {"searched": [], "uniform": [], "front": [], "back": []}
    found = []
    for folder in comparison.folders(next(iter(comparison.fits))):
        model = AutoModelForCausalLM.from_pretrained(folder)
        budget = search_layer_budget(model, args.layer_budget, calibration, k_max=args.k_max, batch_size=batch_size)
        found.append(budget.experts_per_token)
        limits = {"mean": args.layer_budget, "largest": args.k_max}
        settings = [budget.experts_per_token, budget.uniform]
        settings += [{"schedule": name} | limits for name in ("front", "back")]
        curve = evaluate_elastic(model, test, data.tokenizer, settings, batch_size=batch_size)
        for name, point in zip(perplexities, curve.points, strict=True):
            perplexities[name].append(point.perplexity)
    metric = against_baselines(
        {name: summarise(values, unit="perplexity", higher_is_better=False) for name, values in perplexities.items()}
    )
    metric.note = (
        f"{args.layer_budget:g} experts a layer on average; searched on half of the held-out blocks, measured on the "
        f"other; found {found}"
    )
    return {"layer_budget_perplexity": metric}


def _figures(curves: dict[str, list[ElasticCurve]], root: Path) -> list[FigureFile]:
    def mean(seeds: list[ElasticCurve]) -> list[tuple[float, float]]:
        columns = zip(*(curve.points for curve in seeds), strict=True)
        return [(column[0].mean_k, sum(p.perplexity for p in column) / len(column)) for column in columns]

    means = {arm: mean(seeds) for arm, seeds in curves.items()}
    lines = {arm: points for arm, points in means.items() if fixed_k(arm) is None}
    dearest = max((arm for arm in means if fixed_k(arm) is not None), key=fixed_k, default=None)
    specialists = {
        arm: next(point for point in points if point[0] == fixed_k(arm))
        for arm, points in means.items()
        if fixed_k(arm) in [point[0] for point in points]
    }
    if dearest is not None:
        lines |= {f"{dearest} at other k": means[dearest]}
    elastic_figure(lines, root / "figures" / "elastic.png", points=specialists)
    caption = "Held-out perplexity against active experts: models with a dial, specialists where they were trained."
    return [FigureFile(path="figures/elastic.png", caption=caption)]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ComparisonArguments, MMoeArguments, DataArguments, RecipeTrainingArguments)
    preset, (comparison_args, args, data_args, training_args) = parse_arguments(
        types, PRESETS, argv, default_preset="demo"
    )
    try:
        for arm in comparison_args.arms:
            fixed_k(arm)
    except ValueError as error:
        raise SystemExit(f"--arms: {error}") from error
    pretrain(preset, comparison_args, args, data_args, training_args)


if __name__ == "__main__":
    main()
