"""The evidence on Sigma-MoE: every arm with its own learning rate from one grid, on several seeds, in one command.

    python -m trainers.recipes.compare_sigma_moe --output_dir runs/sigma_moe_evidence

Arms are those of `sigma_moe_arms.py`, and `dense_equal_seconds`: the dense model trained for as long as Sigma-MoE
takes, by the ratio of their step times measured in alternating blocks in this very run. Within a seed all arms see the
same blocks in the same order. The learning rate of an arm is the best of the grid on the first seed, for baselines as
for ours. Repeating the command goes on: finished runs are kept.
"""

import dataclasses
import json
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..benchmarks.alternating_blocks import time_alternately
from ..data import load_tokenizer
from ..figures import balance_figure, comparison_figure
from ..redaction import command_line
from ..report import (
    FigureFile,
    Metric,
    Results,
    collect_versions,
    device_name,
    summarise,
    verdict,
    write_results,
    write_text_atomically,
)
from .arguments import DataArguments, parse_arguments, training_arguments_of
from .language_model import Fit, LanguageData, fit, prepare_language_data
from .pretrain_sigma_moe import OPTIMIZER, SigmaMoeArguments, model_config
from .sigma_moe_arms import Schedule, build_arm
from .sigma_moe_probes import SwitchProbe, read_balance, read_switch
from .sigma_moe_results import (
    BITS,
    balance_before_switch,
    balance_metrics,
    describe_data,
    describe_model,
    packing_note,
    switch_metrics,
)


@dataclasses.dataclass
class CompareArguments:
    """What is compared."""

    arms: list[str] = dataclasses.field(
        default_factory=lambda: ["progressive", "lbl_top1", "top1_lbl", "loss_free", "qwen3_moe", "dense"],
        metadata={"help": "The first is the method, the others its baselines."},
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3])
    workers: int = dataclasses.field(default=2, metadata={"help": "Runs at a time, one thread each."})
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
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


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run; `steps` differs from the preset's for `dense_equal_seconds` only."""

    arm: str
    seed: int
    learning_rate: float
    steps: int

    def folder(self, root: Path) -> Path:
        return root / "runs" / self.arm / f"lr{self.learning_rate:g}-seed{self.seed}"


def compare(
    args: CompareArguments, model_args: SigmaMoeArguments, data_args: DataArguments, base: TrainingArguments
) -> Results:
    """Run what is missing, choose learning rates, and write `results.json` and figures into `base.output_dir`."""
    start, root = time.perf_counter(), Path(base.output_dir)
    data = prepare_language_data(data_args, base)
    data.train.save_to_disk(root / "data" / "train")
    data.validation.save_to_disk(root / "data" / "validation")
    data.tokenizer.save_pretrained(root / "data" / "tokenizer")
    config = model_config(model_args, data, data_args.sequence_length)
    schedule = Schedule(model_args.initial_top_k, model_args.switch_at)

    def run(jobs: list[Job]) -> dict[Job, Fit]:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(
            args.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            futures = [pool.submit(run_job, job, root, config, schedule, base, data.fingerprint) for job in jobs]
            return {job: future.result() for job, future in zip(jobs, tqdm(futures, desc="runs"))}

    first, *others = args.seeds
    trials = run([Job(arm, first, lr, base.max_steps) for arm in args.arms for lr in args.learning_rates])
    chosen = {arm: best_learning_rate(arm, trials) for arm in args.arms}
    fits = trials | run([Job(arm, seed, chosen[arm], base.max_steps) for arm in args.arms for seed in others])
    if "dense" in args.arms:
        ratio = _measured_once(root / "relative_step_time.json", lambda: relative_step_time(config, schedule, data))
        steps, chosen["dense_equal_seconds"] = round(base.max_steps * ratio), chosen["dense"]
        fits |= run([Job("dense_equal_seconds", seed, chosen["dense"], steps) for seed in args.seeds])
    best = {
        arm: [next(f for j, f in fits.items() if (j.arm, j.seed, j.learning_rate) == (arm, s, lr)) for s in args.seeds]
        for arm, lr in chosen.items()
    }
    folders = {arm: [Job(arm, seed, lr, 0).folder(root) for seed in args.seeds] for arm, lr in chosen.items()}
    shape = SigmaMoeForCausalLM(config)
    shape.config.architectures = [type(shape).__name__]
    shape.config.save_pretrained(root)
    results = Results(
        method="sigma_moe",
        title="Sigma-MoE",
        preset="evidence",
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=_wall_seconds_so_far(root, time.perf_counter() - start),
        metrics=_metrics(best, folders),
        evidence={
            "steps": base.max_steps,
            "tokens": best[args.arms[0]][0].tokens,
            "learning_rate_grid": args.learning_rates,
            "learning_rate_chosen": chosen,
            "learning_rate_chosen_on": "held-out loss of the first seed, the same blocks that are reported",
            "learning_rate_at_the_edge_of_the_grid": [
                arm for arm, rate in chosen.items() if rate in (min(args.learning_rates), max(args.learning_rates))
            ],
            "changed_after_results_were_seen": args.note,
            "initial_top_k": schedule.initial_top_k,
            "switch_at": schedule.switch_at,
            "parameters": {arm: runs[0].parameters for arm, runs in best.items()},
            "active_parameters": active_parameters(config, schedule),
        },
        data=describe_data(data_args, data.fingerprint, packing_note(data_args, data)),
        model=describe_model(shape),
        figures=_figures(best, folders, root),
    )
    write_results(root, results)
    return results


def run_job(
    job: Job, root: Path, config: SigmaMoeConfig, schedule: Schedule, base: TrainingArguments, fingerprint: str
) -> Fit:
    """One run in a process of its own, on the data that `compare` has prepared."""
    data = LanguageData(
        documents={},
        train=Dataset.load_from_disk(root / "data" / "train"),
        validation=Dataset.load_from_disk(root / "data" / "validation"),
        tokenizer=load_tokenizer(root / "data" / "tokenizer"),
        fingerprint=fingerprint,
    )
    args = training_arguments_of(
        base, output_dir=str(job.folder(root)), seed=job.seed, learning_rate=job.learning_rate, max_steps=job.steps
    )
    model, callbacks = build_arm(job.arm.removesuffix("_equal_seconds"), config, schedule, job.seed)
    if job.arm == "progressive":
        callbacks = [SwitchProbe(callbacks[0], data), *callbacks]
    return fit(job.arm, model, data, args, callbacks)


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


def best_learning_rate(arm: str, trials: dict[Job, Fit]) -> float:
    """The rate with the lowest held-out loss of an arm. `ValueError` if it diverged at every rate."""
    own = {job.learning_rate: result.nats_per_token for job, result in trials.items() if job.arm == arm}
    finite = {rate: loss for rate, loss in own.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"{arm} diverged at every learning rate of {sorted(own)}. Lower --learning_rates.")
    return min(finite, key=finite.get)


def _measured_once(file: Path, measure) -> float:
    """A measurement decides how long a run is; a second one, a little different, would start that run anew."""
    if not file.exists():
        write_text_atomically(file, json.dumps(measure()))
    return json.loads(file.read_text())


def _wall_seconds_so_far(root: Path, seconds: float) -> float:
    """Seconds of this and of earlier invocations in the same folder; a killed one counts as nothing."""
    file = root / "wall_seconds.json"
    earlier = json.loads(file.read_text()) if file.exists() else 0.0
    write_text_atomically(file, json.dumps(earlier + seconds))
    return earlier + seconds


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


def _metrics(best: dict[str, list[Fit]], folders: dict[str, list[Path]]) -> dict[str, Metric]:
    ours, *baselines = best
    quality = {
        arm: summarise([f.bits_per_character for f in runs], unit=BITS, higher_is_better=False)
        for arm, runs in best.items()
    }
    for arm, metric in quality.items():
        f = best[arm][0]
        metric.note = f"{f.parameters / 1e6:.1f}M parameters, {f.tokens:,} tokens, learning rate {f.learning_rate:g}"
    quality[ours].baseline = {arm: quality[arm] for arm in baselines}
    metrics = {"held_out_bits_per_character": quality[ours]} | balance_metrics(folders)
    metrics |= balance_before_switch(folders[ours])
    for metric in metrics.values():
        for baseline in metric.baseline.values():
            if metric.higher_is_better is not None:
                baseline.verdict = verdict(metric.values, baseline.values, metric.higher_is_better)
    switches = [read_switch(folder) for folder in folders[ours]]
    if None not in switches:
        metrics |= switch_metrics(switches, [f.nats_per_token for f in best[ours]])
    return metrics


def _figures(best: dict[str, list[Fit]], folders: dict[str, list[Path]], root: Path) -> list[FigureFile]:
    figures = root / "figures"
    ours = next(iter(best))
    groups = {arm: [f.bits_per_character for f in runs] for arm, runs in best.items()}
    comparison_figure(groups, figures / "quality.png", y_label=f"held-out {BITS}", higher_is_better=False)
    made = [FigureFile(path="figures/quality.png", caption="Held-out loss of every arm; dots are seeds.")]
    if "lbl_top1" in folders and read_balance(folders[ours][0]):
        baseline = read_balance(folders["lbl_top1"][0])
        balance_figure(read_balance(folders[ours][0]), figures / "balance.png", baseline=baseline, label=ours)
        caption = "Load of the busiest and the idlest expert of each layer, first seed."
        made.append(FigureFile(path="figures/balance.png", caption=caption))
    return made


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (CompareArguments, SigmaMoeArguments, DataArguments, TrainingArguments)
    _, (args, model_args, data_args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="evidence")
    results = compare(args, model_args, data_args, training_args)
    for name, metric in results.metrics.items():
        print(f"{name}: {metric.value:.4f} +- {metric.spread or 0:.4f}")
        for arm, baseline in metric.baseline.items():
            print(f"    {arm}: {baseline.value:.4f} +- {baseline.spread or 0:.4f}  {baseline.verdict or ''}")


if __name__ == "__main__":
    main()
