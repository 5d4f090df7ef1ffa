"""The evidence on Sigma-MoE: every arm with its own learning rate from one grid, on several seeds, in one command.

    python -m trainers.recipes.compare_sigma_moe --output_dir runs/sigma_moe_evidence

Arms are those of `sigma_moe_arms.py`, and `dense_equal_seconds`: the dense model trained for as long as Sigma-MoE
takes, by the ratio of their step times measured in alternating blocks in this very run. Within a seed all arms see the
same blocks in the same order. The learning rate of an arm is the best of the grid on the first seed, for baselines as
for ours. Repeating the command goes on: finished runs are kept.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..benchmarks.alternating_blocks import time_alternately
from ..figures import balance_figure, comparison_figure
from ..report import FigureFile, Metric, Results
from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments
from .comparison import (
    BITS,
    Comparison,
    ComparisonArguments,
    Job,
    against_baselines,
    compare_arms,
    measured_once,
    quality_metric,
    run_jobs,
    write_comparison,
)
from .description import describe_model
from .language_model import LanguageData, prepare_language_data
from .moe_family import OPTIMIZER, model_config
from .pretrain_sigma_moe import SigmaMoeArguments
from .sigma_moe_arms import Schedule, build_arm
from .sigma_moe_probes import SwitchProbe, read_balance, read_switch
from .sigma_moe_results import (
    balance_before_switch,
    balance_metrics,
    switch_metrics,
)


@dataclasses.dataclass
class CompareArguments(ComparisonArguments):
    """What is compared."""

    arms: list[str] = dataclasses.field(
        default_factory=lambda: ["progressive", "lbl_top1", "top1_lbl", "loss_free", "qwen3_moe", "dense"],
        metadata={"help": "The first is the method, the others its baselines."},
    )


PRESETS = {
    # Fixed before any result was seen; what was changed since is in the `note` of the committed results.
    "evidence": OPTIMIZER
    | {
        "model_preset": "demo",
        "initial_top_k": [8, 4, 2, 1, 1, 1],
        "switch_at": 0.9,
        "sequence_length": 256,
        "max_eval_blocks": 128,
        "tokenizer_vocab_size": 4096,
        "dataset_license": "PSF-2.0",
        "dataset_language": "code",
        "output_dir": "runs/sigma_moe_evidence",
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 16,
        "max_steps": 400,
        "warmup_steps": 40,
        "lr_scheduler_kwargs": {"num_decay_steps": 120, "min_lr_ratio": 0.05},
        "logging_steps": 5,
        "eval_strategy": "steps",
        "eval_steps": 100,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    },
}


def compare(
    args: CompareArguments, model_args: SigmaMoeArguments, data_args: DataArguments, base: TrainingArguments
) -> Results:
    """Run what is missing, choose learning rates, and write `results.json` and figures into `base.output_dir`."""
    start, root = time.perf_counter(), Path(base.output_dir)
    data = prepare_language_data(data_args, base)
    config = model_config(model_args, data, data_args.sequence_length)
    schedule = Schedule(model_args.initial_top_k, model_args.switch_at)
    build = partial(build_job, config=config, schedule=schedule)
    comparison = compare_arms(args, base, data, build, args.arms)
    if "dense" in args.arms:
        ratio = measured_once(root / "relative_step_time.json", lambda: relative_step_time(config, schedule, data))
        rate, steps = comparison.learning_rates["dense"], round(base.max_steps * ratio)
        jobs = [Job("dense_equal_seconds", seed, rate, steps) for seed in args.seeds]
        comparison.add("dense_equal_seconds", jobs, run_jobs(jobs, args.workers, base, data, build))
    shape = SigmaMoeForCausalLM(config)
    shape.config.architectures = [type(shape).__name__]
    shape.config.save_pretrained(root)
    return write_comparison(
        comparison,
        args,
        base,
        data,
        data_args,
        method="sigma_moe",
        title="Sigma-MoE",
        preset="evidence",
        started=start,
        metrics=_metrics(comparison),
        evidence={
            "initial_top_k": schedule.initial_top_k,
            "switch_at": schedule.switch_at,
            "active_parameters": active_parameters(config, schedule),
        },
        model=describe_model(shape),
        figures=_figures(comparison),
    )


def build_job(job: Job, data: LanguageData, *, config: SigmaMoeConfig, schedule: Schedule):
    """Model and callbacks of a run."""
    model, callbacks = build_arm(job.arm.removesuffix("_equal_seconds"), config, schedule, job.seed)
    if job.arm == "progressive":
        callbacks = [SwitchProbe(callbacks[0], data), *callbacks]
    return model, callbacks


def relative_step_time(config: SigmaMoeConfig, schedule: Schedule, data: LanguageData, *, blocks: int = 12) -> float:
    """CPU time of a Sigma-MoE step under its schedule over the dense model's: alternating blocks, median ratios."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sigma, dense = (build_arm(arm, config, schedule, 0)[0].train() for arm in ("lbl_top1", "dense"))
    optimizers = {model: torch.optim.AdamW(model.parameters(), fused=True) for model in (sigma, dense)}
    ids = torch.tensor(data.train[:4]["input_ids"])

    def step(model) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizers[model].step()
        optimizers[model].zero_grad()

    ratio = 0.0
    for top_k, share in ((schedule.initial_top_k, schedule.switch_at), (1, 1 - schedule.switch_at)):
        sigma.set_experts_per_token(top_k)
        for model in (sigma, dense):  # start-up is not timed
            step(model)
        timing = time_alternately(partial(step, sigma), partial(step, dense), blocks=blocks, steps_per_block=2)
        ratio += share * timing["process"].ratio.median
    torch.set_num_threads(threads)
    return ratio


def active_parameters(config: SigmaMoeConfig, schedule: Schedule) -> dict[str, int]:
    """Parameters of each kind of arm that one token uses, routers included, embeddings and output head left out."""
    with torch.device("meta"):
        sigma, qwen3, dense = (build_arm(arm, config, schedule, 0)[0] for arm in ("lbl_top1", "qwen3_moe", "dense"))
    outer = sigma.get_input_embeddings().weight.numel() + sigma.get_output_embeddings().weight.numel()
    experts = sum(p.numel() for name, p in qwen3.named_parameters() if ".experts." in name)
    idle = experts - experts * qwen3.config.num_experts_per_tok // qwen3.config.num_experts
    counts = {"target": sigma.num_active_parameters()}
    sigma.set_experts_per_token(schedule.initial_top_k)
    counts["initial stage of progressive"] = sigma.num_active_parameters()
    counts |= {"qwen3_moe": qwen3.num_parameters() - idle - outer, "dense": dense.num_parameters() - outer}
    return counts


def _metrics(comparison: Comparison) -> dict[str, Metric]:
    ours = next(iter(comparison.fits))
    folders = {arm: comparison.folders(arm) for arm in comparison.fits}
    metrics = {"held_out_bits_per_character": quality_metric(comparison)}
    for name, metric in balance_metrics(folders).items():
        metrics[name] = against_baselines({ours: metric} | metric.baseline)
    metrics |= balance_before_switch(folders[ours])
    switches = [read_switch(folder) for folder in folders[ours]]
    if None not in switches:
        metrics |= switch_metrics(switches, [f.nats_per_token for f in comparison.fits[ours]])
    return metrics


def _figures(comparison: Comparison) -> list[FigureFile]:
    figures = comparison.root / "figures"
    ours = next(iter(comparison.fits))
    groups = {arm: [f.bits_per_character for f in fits] for arm, fits in comparison.fits.items()}
    comparison_figure(groups, figures / "quality.png", y_label=f"held-out {BITS}", higher_is_better=False)
    made = [FigureFile(path="figures/quality.png", caption="Held-out loss of every arm; dots are seeds.")]
    history = read_balance(comparison.folders(ours)[0])
    if "lbl_top1" in comparison.fits and history:
        baseline = read_balance(comparison.folders("lbl_top1")[0])
        balance_figure(history, figures / "balance.png", baseline=baseline, label=ours)
        caption = "Load of the busiest and the idlest expert of each layer, first seed."
        made.append(FigureFile(path="figures/balance.png", caption=caption))
    return made


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (CompareArguments, SigmaMoeArguments, DataArguments, RecipeTrainingArguments)
    _, (args, model_args, data_args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="evidence")
    compare(args, model_args, data_args, training_args)


if __name__ == "__main__":
    main()
