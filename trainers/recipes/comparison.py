"""Arms, seeds and learning rates: what every comparison of training methods shares.

An arm is a name that a recipe knows how to turn into a model and its callbacks. Within a seed all arms see the same
blocks in the same order. The learning rate of an arm is the best of the grid on the first seed, for baselines as for
ours. A repeated command goes on: finished runs are kept.
"""

import dataclasses
import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback, TrainingArguments

from ..data import load_tokenizer
from ..redaction import command_line
from ..report import (
    Metric,
    Model,
    Results,
    collect_versions,
    device_name,
    summarise,
    verdict,
    write_results,
    write_text_atomically,
)
from .arguments import DataArguments, training_arguments_of
from .description import describe_data, packing_note
from .language_model import Fit, LanguageData, fit


BITS = "bits/character"


@dataclasses.dataclass
class ComparisonArguments:
    """What is compared, and how often."""

    arms: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "The first is the method, the others its baselines."}
    )
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3])
    workers: int = dataclasses.field(
        default=2,
        metadata={"help": "Runs at a time, one thread each; 0: one after the other in this process, on its devices."},
    )
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
    )


@dataclasses.dataclass(frozen=True)
class Job:
    """One training run of `steps` optimizer steps. `data_seed` orders the blocks; None: `seed` does."""

    arm: str
    seed: int
    learning_rate: float
    steps: int
    data_seed: int | None = None

    def folder(self, root: Path) -> Path:
        """Where it is kept, under the folder of the comparison."""
        return root / "runs" / self.arm / f"lr{self.learning_rate:g}-seed{self.seed}"


class Start(NamedTuple):
    """What a run starts from. `optimizer`: Trainer's `optimizer_cls_and_kwargs`; `arguments`: training arguments in
    which the arm differs."""

    model: PreTrainedModel
    callbacks: list[TrainerCallback]
    optimizer: tuple[type, dict[str, Any]] | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})


# A function of the module's top level, or a partial of one: workers are processes of their own.
Build = Callable[[Job, LanguageData], Start | tuple[PreTrainedModel, list[TrainerCallback]]]


@dataclasses.dataclass
class Comparison:
    """The runs at each arm's learning rate, one for each seed in the order of the seeds. `fits` are [`Fit`]s, or what
    else [`search_rates`] was given to run."""

    fits: dict[str, list[Any]]
    jobs: dict[str, list[Job]]
    root: Path

    def folders(self, arm: str) -> list[Path]:
        """The run folders of an arm."""
        return [job.folder(self.root) for job in self.jobs[arm]]

    @property
    def learning_rates(self) -> dict[str, float]:
        """What was chosen for each arm."""
        return {arm: jobs[0].learning_rate for arm, jobs in self.jobs.items()}

    def add(self, arm: str, jobs: Sequence[Job], fits: dict[Job, Fit]) -> None:
        """Another arm, whose runs are `jobs`."""
        self.jobs[arm], self.fits[arm] = list(jobs), [fits[job] for job in jobs]


def save_data(data: LanguageData, root: Path) -> None:
    """Keep the blocks and the tokenizer where workers find them."""
    data.train.save_to_disk(root / "data" / "train")
    data.validation.save_to_disk(root / "data" / "validation")
    data.tokenizer.save_pretrained(root / "data" / "tokenizer")


def load_data(root: Path, fingerprint: str) -> LanguageData:
    """What [`save_data`] has kept."""
    return LanguageData(
        documents={},
        train=Dataset.load_from_disk(root / "data" / "train"),
        validation=Dataset.load_from_disk(root / "data" / "validation"),
        tokenizer=load_tokenizer(root / "data" / "tokenizer"),
        fingerprint=fingerprint,
    )


def compare_arms(
    args: ComparisonArguments,
    base: TrainingArguments,
    data: LanguageData,
    build: Build,
    arms: Sequence[str],
    *,
    job_of: Callable[[str, int, float], Job] | None = None,
) -> Comparison:
    """Every arm at every rate of the grid on the first seed, then at its best rate on the others. `job_of(arm, seed,
    rate)`: by default a run of `base.max_steps`."""
    if job_of is None:
        job_of = partial(Job, steps=base.max_steps)
    run = partial(run_jobs, workers=args.workers, base=base, data=data, build=build)
    return search_rates(args, arms, run, Path(base.output_dir), job_of=job_of)


def search_rates(
    args: ComparisonArguments,
    arms: Sequence[str],
    run: Callable[[Sequence[Job]], dict[Job, Any]],
    root: Path,
    *,
    job_of: Callable[[str, int, float], Job],
    loss_of: Callable[[Any], float] = attrgetter("nats_per_token"),
) -> Comparison:
    """The same for whatever a run is: `run(jobs)` gives the outcome of each, and the rate of an arm is that of its
    lowest `loss_of(outcome)` on the first seed."""
    first, *others = args.seeds
    grid = [job_of(arm, first, rate) for arm in arms for rate in args.learning_rates]
    fits = run(grid)
    chosen = {arm: best_learning_rate(arm, fits, loss_of) for arm in arms}
    jobs = {arm: [job_of(arm, seed, chosen[arm]) for seed in args.seeds] for arm in arms}
    rest = [job for arm in arms for job in jobs[arm] if job.seed in others]
    fits |= run(rest)
    comparison = Comparison({}, {}, root)
    for arm in arms:
        comparison.add(arm, jobs[arm], fits)
    return comparison


def run_jobs(
    jobs: Sequence[Job], workers: int, base: TrainingArguments, data: LanguageData, build: Build
) -> dict[Job, Fit]:
    """Run what is missing, `workers` at a time; `ValueError` as [`require_one_rank`]."""
    require_one_rank(workers, base)
    if not workers:
        return {job: run_job(job, base, data, build) for job in jobs}
    save_data(data, Path(base.output_dir))
    run = partial(_run_in_worker, base=base, fingerprint=data.fingerprint, build=build)
    return run_in_workers(jobs, workers, run)


def require_one_rank(workers: int, base: TrainingArguments) -> None:
    """`ValueError` for workers below several ranks: each would start its own."""
    if workers and base.world_size > 1:
        raise ValueError(
            f"workers={workers} with {base.world_size} processes: give --workers 0, and all of them train one run "
            "after the other."
        )


def run_in_workers(jobs: Sequence[Job], workers: int, run: Callable[[Job], Any]) -> dict[Job, Any]:
    """`run(job)` for each, in `workers` processes of one thread. `run` is a function of a module's top level, or a
    partial of one."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        futures = [pool.submit(run, job) for job in jobs]
        try:
            return {job: future.result() for job, future in zip(jobs, tqdm(futures, desc="runs"))}
        except BaseException:  # an error, or a stop that was asked for: what has not begun need not begin
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run_in_worker(job: Job, base: TrainingArguments, fingerprint: str, build: Build) -> Fit:
    return run_job(job, base, load_data(Path(base.output_dir), fingerprint), build)


def run_job(job: Job, base: TrainingArguments, data: LanguageData, build: Build) -> Fit:
    """One run, into its folder under that of `base`."""
    start = Start(*build(job, data))
    args = training_arguments_of(
        base,
        output_dir=str(job.folder(Path(base.output_dir))),
        seed=job.seed,
        learning_rate=job.learning_rate,
        max_steps=job.steps,
        data_seed=job.data_seed,
        resume_from_checkpoint=None,  # each run goes on from its own checkpoints
        **start.arguments,
    )
    result = fit(job.arm, start.model, data, args, start.callbacks, optimizer=start.optimizer)
    PartialState().wait_for_everyone()  # others may load what the first rank has saved
    return result


def best_learning_rate(
    arm: str, trials: dict[Job, Any], loss_of: Callable[[Any], float] = attrgetter("nats_per_token")
) -> float:
    """The rate with the lowest held-out loss of an arm. `ValueError` if it diverged at every rate."""
    own = {job.learning_rate: loss_of(result) for job, result in trials.items() if job.arm == arm}
    finite = {rate: loss for rate, loss in own.items() if math.isfinite(loss)}
    if not finite:
        raise ValueError(f"{arm} diverged at every learning rate of {sorted(own)}. Lower --learning_rates.")
    return min(finite, key=finite.get)


def publish_first_run(comparison: Comparison, data: LanguageData) -> PreTrainedModel:
    """Put the first arm's first seed into the folder of the comparison, as a Hub repository; the model, reloaded as
    any user loads it, is returned."""
    first = comparison.folders(next(iter(comparison.fits)))[0]
    model = AutoModelForCausalLM.from_pretrained(first)
    model.save_pretrained(comparison.root)
    data.tokenizer.save_pretrained(comparison.root)
    return AutoModelForCausalLM.from_pretrained(comparison.root).eval()


def write_comparison(
    comparison: Comparison,
    args: ComparisonArguments,
    base: TrainingArguments,
    data: LanguageData,
    data_args: DataArguments,
    *,
    started: float,
    model: Model,
    evidence: dict[str, Any],
    **fields: Any,
) -> Results:
    """Write `results.json` into the folder of the comparison, print the numbers, and return what was written.

    `started` is the clock's (`time.perf_counter`) at the beginning of this invocation; `evidence` goes beside the plan
    of the comparison, and `fields` are the others of [`Results`].
    """
    results = Results(
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(comparison.root, time.perf_counter() - started),
        evidence=plan_of(args, base, comparison) | evidence,
        data=describe_data(data_args, data.fingerprint, packing_note(data_args, data)),
        model=model,
        **fields,
    )
    write_results(comparison.root, results)
    print_metrics(results)
    return results


def print_metrics(results: Results) -> None:
    """Every number with its spread, baselines below it with their verdicts."""
    for name, metric in results.metrics.items():
        print(f"{name}: {metric.value:.4f} +- {metric.spread or 0:.4f}")
        for arm, baseline in metric.baseline.items():
            print(f"    {arm}: {baseline.value:.4f} +- {baseline.spread or 0:.4f}  {baseline.verdict or ''}")


def quality_metric(comparison: Comparison) -> Metric:
    """Held-out bits per character of the first arm, with the others as its baselines and a verdict against each."""
    quality = {
        arm: summarise([f.bits_per_character for f in fits], unit=BITS, higher_is_better=False)
        for arm, fits in comparison.fits.items()
    }
    for arm, metric in quality.items():
        f = comparison.fits[arm][0]
        metric.note = f"{f.parameters / 1e6:.1f}M parameters, {f.tokens:,} tokens, learning rate {f.learning_rate:g}"
    return against_baselines(quality)


def against_baselines(metrics: dict[str, Metric]) -> Metric:
    """The first of `metrics`, by arm, with the others as its baselines; verdicts where the seeds carry them."""
    ours, *baselines = metrics
    metric = metrics[ours]
    metric.baseline = {arm: metrics[arm] for arm in baselines}
    for baseline in metric.baseline.values():
        if metric.higher_is_better is not None:
            baseline.verdict = verdict(metric.values, baseline.values, metric.higher_is_better)
    return metric


def plan_of(args: ComparisonArguments, base: TrainingArguments, comparison: Comparison) -> dict[str, Any]:
    """For the record: what was fixed before any result was seen, and what the grid chose."""
    chosen, grid = comparison.learning_rates, args.learning_rates
    choice = {
        "learning_rate_chosen_on": "held-out loss of the first seed, the same blocks that are reported",
        "learning_rate_at_the_edge_of_the_grid": [
            arm for arm, rate in chosen.items() if rate in (min(grid), max(grid))
        ],
    }
    return {
        "steps": base.max_steps,
        "tokens": next(iter(comparison.fits.values()))[0].tokens,
        "learning_rate_grid": grid,
        "learning_rate_chosen": chosen,
        **(choice if len(grid) > 1 else {}),
        "changed_after_results_were_seen": args.note,
        "parameters": {arm: fits[0].parameters for arm, fits in comparison.fits.items()},
    }


def measured_once(file: Path, measure: Callable[[], Any]) -> Any:
    """A measurement decides how long a run is; a second one, a little different, would start that run anew."""
    if not file.exists():
        write_text_atomically(file, json.dumps(measure()))
    return json.loads(file.read_text())


def wall_seconds_so_far(root: Path, seconds: float) -> float:
    """Seconds of this and of earlier invocations in the same folder; a killed one counts as nothing."""
    file = root / "wall_seconds.json"
    earlier = json.loads(file.read_text()) if file.exists() else 0.0
    write_text_atomically(file, json.dumps(earlier + seconds))
    return earlier + seconds
