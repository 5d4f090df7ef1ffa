"""Time the rounds of the in-process engine against a plain loop over the same clients.

All arms train the same model of the click-through rate by FedAvg, on the same clients, batches, local steps and
seeds, and end at the same parameters: the largest difference is in the report. Ours is the whole round of a
FederatedTrainer: selection, payloads, metering, local steps, the check of each update, the average, the log. The plain
loop is what a script would do: load the state dict, make an optimizer, step, subtract, average. Start-up is apart.
Peak memory is that of a process for itself, over data of one size that belong to more and more clients.
"""

import argparse
import dataclasses
import multiprocessing
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_models.ctr import CtrForCtrPrediction

from ..data import CtrCollator, CtrRows
from ..data.drifted_clicks import draw_drifted_clicks
from ..federated import FedAvg, FederatedTrainer
from ..federated.local import seed_of
from .alternating_blocks import Timing, TimingVerdict, judge, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


RESOLUTION = 0.1  # an interval wider than this resolves nothing
State = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What all arms do: `clients_per_round` of the users in `rows` take `local_steps` steps in each round."""

    rows: CtrRows
    shape: dict
    features: list
    clients_per_round: int
    local_steps: int
    batch_size: int
    learning_rate: float = 0.1
    seed: int = 0

    def model(self) -> CtrForCtrPrediction:
        """The same one for every arm."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return CtrForCtrPrediction(CtrForCtrPrediction.config_class(features=self.features, **self.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to do the task: `round` does the next one, `parameters` are what is served now."""

    round: Callable[[], object]
    parameters: Callable[[], State]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineComparison:
    """The in-process engine against `baseline`; the limit of the ratio of times is 1: no slower."""

    baseline: str
    ours_updates_per_second: float
    baseline_updates_per_second: float
    ours_start_seconds: float
    baseline_start_seconds: float
    largest_difference: float
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak of a whole process, and what of it came after data and model were there."""

    clients: int
    rows: int
    peak_bytes: int
    added_bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class FederatedReport(TimingReport):
    """What `federated-<device>.json` holds; `clock` names the one that verdicts rest on."""

    clock: str
    clients: int
    clients_per_round: int
    samples_per_client: int
    local_steps: int
    batch_size: int
    parameters: int
    comparisons: list[EngineComparison]
    memory: list[Memory]


def trainer_of(task: Task, **whose: object) -> FederatedTrainer:
    """Ours; `whose` says whose rows there are, if not all of the task's."""
    args = TrainingArguments(
        tempfile.mkdtemp(),
        optim="sgd",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=task.batch_size,
        max_grad_norm=0.0,
        seed=task.seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = FederatedTrainer(
        task.model(),
        args,
        data_collator=CtrCollator(),
        strategy=FedAvg(clients_per_round=task.clients_per_round, seed=task.seed),
        rounds=10**4,
        local_steps=task.local_steps,
        **(whose or {"train_dataset": task.rows, "partition_by": task.rows.users}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def in_process(task: Task) -> Arm:
    """Ours."""
    trainer = trainer_of(task)
    trainer.begin()

    def round() -> None:
        number = trainer.state.global_step
        trainer.close_round(number, trainer.engine.train(number, trainer.select(number)))

    return Arm(round=round, parameters=lambda: trainer.strategy.parameters)


def plain_loop(task: Task) -> Arm:
    """A script: nothing is checked, counted or logged."""
    model, by_user = task.model(), {str(user): rows.tensors for user, rows in task.rows.by_user().items()}
    served = {name: p.detach().clone() for name, p in model.named_parameters()}
    # the order of clients and batches is ours, so that results can be compared
    select, clients, number = FedAvg(clients_per_round=task.clients_per_round, seed=task.seed), list(by_user), 0
    select.start(served, clients)
    generator = torch.Generator()

    def local(client: str) -> tuple[State, int]:
        tensors = by_user[client]
        count = len(tensors["labels"])
        model.load_state_dict(served)
        optimizer = torch.optim.SGD(model.parameters(), lr=task.learning_rate)
        generator.manual_seed(seed_of(task.seed, number, client))
        batches = []
        while len(batches) < task.local_steps:
            batches += torch.randperm(count, generator=generator).split(task.batch_size)
        for indices in batches[: task.local_steps]:
            batch = {name: value[indices] for name, value in tensors.items()}
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
        return {name: p.detach() - served[name] for name, p in model.named_parameters()}, count

    def round() -> None:
        nonlocal served, number
        changes = [local(client) for client in select.select(number, clients)]
        total = sum(count for _, count in changes)
        served = {
            name: tensor + sum(change[name] * count for change, count in changes) / total
            for name, tensor in served.items()
        }
        number += 1

    return Arm(round=round, parameters=lambda: served)


# What ours is timed against; an engine of another kind is one more line.
BASELINES: dict[str, Callable[[Task], Arm]] = {"a plain loop": plain_loop}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=10, steps_per_block=1)
    parser.add_argument("--architecture", default="deepfm", help="lr, wide_deep, pnn, deepfm")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--clients-per-round", type=int, default=100)
    parser.add_argument("--samples", type=int, default=32, help="samples of each client")
    parser.add_argument("--items", type=int, default=1000)
    parser.add_argument("--local-steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--embedding-dim", type=int, default=16)
    parser.add_argument("--hidden-sizes", type=int, nargs="+", default=[64, 32])
    parser.add_argument(
        "--memory-clients", type=int, nargs="*", default=[100, 1000, 10_000], help="peak memory at these"
    )


def run(options: argparse.Namespace) -> None:
    """Measure on the CPU, write the report, print its table."""
    torch.set_num_threads(options.threads)
    task = drawn_task(options, options.clients, options.samples)
    report = measure(
        task,
        blocks=options.blocks,
        steps_per_block=options.steps_per_block,
        memory=[peak_memory(options, clients) for clients in options.memory_clients],
    )
    print(f"{markdown_table(report)}\n\nWrote {write_report(report, options.output)}")


def drawn_task(options: argparse.Namespace, clients: int, samples: int) -> Task:
    """The task that the options tell."""
    data = draw_drifted_clicks(num_users=clients, num_local=samples, num_items=options.items, num_test=1).data()
    shape = {"architecture": options.architecture, "embedding_dim": options.embedding_dim}
    return Task(
        rows=data.rows("train"),
        features=data.features,
        shape=shape | {"hidden_sizes": options.hidden_sizes},
        clients_per_round=options.clients_per_round,
        local_steps=options.local_steps,
        batch_size=options.batch_size,
    )


def measure(task: Task, *, blocks: int, steps_per_block: int, memory: list[Memory] = ()) -> FederatedReport:
    """Ours against every one of `BASELINES`."""
    clock, comparisons = clock_of(torch.get_num_threads()), []
    for name, make in BASELINES.items():
        (ours, ours_start), (baseline, baseline_start) = _started(in_process, task), _started(make, task)
        mine, theirs = ours.parameters(), baseline.parameters()
        difference = max(float((mine[key] - theirs[key].to(mine[key])).abs().max()) for key in mine)
        timings = time_alternately(ours.round, baseline.round, blocks=blocks, steps_per_block=steps_per_block)
        timing = timings[clock]
        comparisons.append(
            EngineComparison(
                baseline=name,
                ours_updates_per_second=task.clients_per_round / timing.ours_seconds,
                baseline_updates_per_second=task.clients_per_round / timing.baseline_seconds,
                ours_start_seconds=ours_start,
                baseline_start_seconds=baseline_start,
                largest_difference=difference,
                limit=1.0,
                resolution=RESOLUTION,
                verdict=judge(timing.ratio, limit=1.0, resolution=RESOLUTION),
                **timings,
            )
        )
    users = len(task.rows.users.unique())
    return FederatedReport(
        benchmark="federated",
        shape=task.shape,
        blocks=blocks,
        steps_per_block=steps_per_block,
        clock=clock,
        clients=users,
        clients_per_round=task.clients_per_round,
        samples_per_client=len(task.rows) // users,
        local_steps=task.local_steps,
        batch_size=task.batch_size,
        parameters=task.model().num_parameters(),
        comparisons=comparisons,
        memory=list(memory),
    )


def _started(make: Callable[[Task], Arm], task: Task) -> tuple[Arm, float]:
    """An arm after two rounds, and the wall seconds up to there."""
    began = time.perf_counter()
    arm = make(task)
    arm.round()
    arm.round()
    return arm, time.perf_counter() - began


def peak_memory(options: argparse.Namespace, clients: int, *, rows: int = 100_000, rounds: int = 5) -> Memory:
    """Of ours, in a process for itself, with `rows` rows that belong to `clients`."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_memory, options, clients, rows, rounds).result()


def _peak_memory(options: argparse.Namespace, clients: int, rows: int, rounds: int) -> Memory:
    torch.set_num_threads(options.threads)
    drawn = drawn_task(options, rows // options.samples, options.samples)
    owners = torch.arange(len(drawn.rows)) % clients
    task = dataclasses.replace(drawn, rows=CtrRows(drawn.rows.tensors, owners))
    task.model()
    before = _peak()
    arm = in_process(task)
    for _ in range(rounds):
        arm.round()
    return Memory(clients=clients, rows=len(task.rows), peak_bytes=_peak(), added_bytes=_peak() - before)


def _peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def markdown_table(report: FederatedReport) -> str:
    """Updates a second and ratios of the report, and memory; verdicts rest on its `clock`."""
    lines = [
        f"FedAvg over {report.clients} clients, {report.clients_per_round} a round, {report.local_steps} local steps "
        f"of {report.batch_size} examples, {report.parameters:,} parameters; {report.device}; {report.blocks} "
        f"alternating blocks of {report.steps_per_block} rounds; verdicts by {report.clock} time, limit 1.",
        "",
        "| against | updates/s | its updates/s | time ratio, process | wall | largest difference | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        process, wall = (
            f"{ratio.median:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]"
            for ratio in (item.process.ratio, item.wall.ratio)
        )
        lines.append(
            f"| {item.baseline} | {item.ours_updates_per_second:.1f} | {item.baseline_updates_per_second:.1f} | "
            f"{process} | {wall} | {item.largest_difference:.1e} | {item.verdict} |"
        )
    lines += ["", "| clients | rows | peak MB | of these, after data and model MB |", "|---|---|---|---|"]
    for item in report.memory:
        lines.append(
            f"| {item.clients:,} | {item.rows:,} | {item.peak_bytes / 1e6:.0f} | {item.added_bytes / 1e6:.0f} |"
        )
    return "\n".join(lines)
