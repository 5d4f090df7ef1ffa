"""Time the rounds of the in-process engine against Flower's Ray simulation of the same task.

All arms train the same model of the click-through rate by FedAvg over the same clients, with the same batches a local
step and the same steps. Two of them run in Flower: this package's engine for it, which ends at the very bits of the
in-process engine, and what a script for Flower would do: its own FedAvg, and in each client a plain loop that keeps
model and data from one message to the next. A simulation is a process of its own that does a round when asked; in
between it idles, so that arms take turns. What both sides do before their third round is start-up, and apart.

Verdicts are by wall time. On a machine that others use too, one process gets less of it than a simulation's many; so
the CPU seconds of an update, over all processes of an arm, are in the report as well.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

import psutil
import torch

from ..report import collect_versions
from .alternating_blocks import Timing, TimingVerdict, judge, time_alternately
from .federated import Arm, State, Task, drawn_task, in_process, trainer_of
from .timing_report import TimingReport, add_timing_arguments, write_report


TARGET = 20  # times the client updates a second of Flower's simulation
LIMIT = 1 / TARGET
RESOLUTION = LIMIT / 2  # an interval wider than this resolves nothing
OURS, PLAIN = "this engine in Flower", "Flower's FedAvg and a plain loop"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a task is drawn from, in every process alike."""

    architecture: str
    clients: int
    clients_per_round: int
    samples: int
    items: int
    local_steps: int
    batch_size: int
    embedding_dim: int
    hidden_sizes: tuple[int, ...]


_NAMES = [field.name for field in dataclasses.fields(Drawn)]


@functools.lru_cache(maxsize=1)
def _task(drawn: Drawn) -> Task:
    """Of all arms; each process draws it for itself, so that no message carries it."""
    options = argparse.Namespace(**dataclasses.asdict(drawn) | {"hidden_sizes": list(drawn.hidden_sizes)})
    return drawn_task(options, drawn.clients, drawn.samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowerComparison:
    """The in-process engine against Flower's simulation with so many Ray actors of one thread each; `speedup` is the
    median, with the ends of its interval; CPU seconds are those of one client update, over all processes of an arm.
    `largest_difference` of the parameters after two rounds; `None` where clients are drawn differently."""

    baseline: str
    actors: int
    ours_updates_per_second: float
    baseline_updates_per_second: float
    speedup: list[float]
    ours_cpu_seconds: float
    baseline_cpu_seconds: float
    ours_start_seconds: float
    baseline_start_seconds: float
    largest_difference: float | None
    limit: float
    resolution: float
    verdict: TimingVerdict
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowerReport(TimingReport):
    """What `federated_flower-<device>.json` holds; `load_average`: of the machine over a minute, before and after."""

    clients: int
    clients_per_round: int
    samples_per_client: int
    local_steps: int
    batch_size: int
    parameters: int
    target: int
    load_average: list[float]
    comparisons: list[FlowerComparison]


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
    parser.add_argument("--actors", type=int, nargs="+", default=[1], help="Ray actors, of --threads threads each")


def run(options: argparse.Namespace) -> None:
    """Measure on the CPU, write the report, print its table."""
    importlib.import_module("trainers.federated.engines.flower")  # says what is missing, if something is
    torch.set_num_threads(options.threads)
    found = {name: getattr(options, name) for name in _NAMES}
    drawn = Drawn(**found | {"hidden_sizes": tuple(options.hidden_sizes)})
    report = measure(drawn, blocks=options.blocks, steps_per_block=options.steps_per_block, actors=options.actors)
    path = write_report(report, options.output, variant=f"{drawn.architecture}-{drawn.local_steps}-steps")
    print(f"{markdown_table(report)}\n\nWrote {path}")


def measure(drawn: Drawn, *, blocks: int, steps_per_block: int, actors: list[int]) -> FlowerReport:
    """Ours against both ways to use Flower, with each number of actors."""
    task, load = _task(drawn), os.getloadavg()[0]
    pairs = [(kind, count) for count in actors for kind in APPS]
    comparisons = [_compare(kind, drawn, count, blocks, steps_per_block) for kind, count in pairs]
    return FlowerReport(
        benchmark="federated_flower",
        versions=collect_versions() | {name: metadata.version(name) for name in ("flwr", "ray")},
        shape=task.shape,
        blocks=blocks,
        steps_per_block=steps_per_block,
        clients=drawn.clients,
        clients_per_round=task.clients_per_round,
        samples_per_client=drawn.samples,
        local_steps=task.local_steps,
        batch_size=task.batch_size,
        parameters=task.model().num_parameters(),
        target=TARGET,
        load_average=[load, os.getloadavg()[0]],
        comparisons=comparisons,
    )


def _compare(kind: str, drawn: Drawn, actors: int, blocks: int, steps_per_block: int) -> FlowerComparison:
    task = _task(drawn)
    began = time.perf_counter()
    ours = in_process(task)
    ours.round()
    ours.round()
    ours_start = time.perf_counter() - began
    with Simulation(kind, drawn, actors) as theirs:
        difference = None
        if kind == OURS:
            mine = ours.parameters()
            difference = max(float((mine[name] - theirs.parameters[name]).abs().max()) for name in mine)
        timings = time_alternately(ours.round, theirs.round, blocks=blocks, steps_per_block=steps_per_block)
    wall = timings["wall"]
    return FlowerComparison(
        baseline=kind,
        actors=actors,
        ours_updates_per_second=task.clients_per_round / wall.ours_seconds,
        baseline_updates_per_second=task.clients_per_round / wall.baseline_seconds,
        speedup=[1 / wall.ratio.median, 1 / wall.ratio.high, 1 / wall.ratio.low],
        ours_cpu_seconds=timings["process"].ours_seconds / task.clients_per_round,
        baseline_cpu_seconds=statistics.median(theirs.cpu_seconds) / task.clients_per_round,
        ours_start_seconds=ours_start,
        baseline_start_seconds=theirs.start_seconds,
        largest_difference=difference,
        limit=LIMIT,
        resolution=RESOLUTION,
        verdict=judge(wall.ratio, limit=LIMIT, resolution=RESOLUTION),
        wall=wall,
    )


class Simulation:
    """Flower's, in a process of its own, after two rounds; `parameters` are what it served then, `cpu_seconds` of each
    later round those of it and all that it started."""

    def __init__(self, kind: str, drawn: Drawn, actors: int):
        began, context = time.perf_counter(), multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        arguments = (theirs, kind, drawn, actors, torch.get_num_threads())
        self._process = context.Process(target=_simulate, args=arguments, daemon=True)
        self._process.start()
        theirs.close()
        # as bytes: shared memory would outlive its process badly
        self.parameters = {name: torch.tensor(values) for name, values in self._connection.recv().items()}
        self.start_seconds, self.cpu_seconds = time.perf_counter() - began, []

    def round(self) -> None:
        """The next one."""
        before = self._cpu_seconds()
        self._connection.send(True)
        self._connection.recv()
        self.cpu_seconds.append(self._cpu_seconds() - before)

    def _cpu_seconds(self) -> float:
        root, total = psutil.Process(self._process.pid), 0.0
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def __enter__(self) -> "Simulation":
        return self

    def __exit__(self, *problem: object) -> None:
        self._connection.send(False)
        self._process.join(120)


def _simulate(connection: Connection, kind: str, drawn: Drawn, actors: int, threads: int) -> None:
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",  # by default 15, and on a busy machine actors would stand behind everybody else
    }
    torch.set_num_threads(threads)
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    client_app, begin = APPS[kind](drawn)
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        arm = begin(grid)
        arm.round()
        arm.round()
        connection.send({name: tensor.numpy() for name, tensor in arm.parameters().items()})
        while connection.recv():
            arm.round()
            connection.send(True)

    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": actors}}
    run_simulation(app, client_app, num_supernodes=drawn.clients, backend_config=resources)


@functools.lru_cache(maxsize=1)
def _trainer(drawn: Drawn) -> Any:
    """An actor's, kept: all of its clients train with it."""
    return trainer_of(_task(drawn))


def _ours(drawn: Drawn) -> tuple[Any, Callable[[Any], Arm]]:
    """This package's engine for Flower."""
    from flwr.app import ArrayRecord, ConfigRecord

    from ..federated.engines.flower import FederatedStrategy, Nodes, flower_client_app

    def begin(grid: Any) -> Arm:
        nodes = Nodes()
        nodes.wait(grid, drawn.clients)
        trainer = trainer_of(_task(drawn), **nodes.population())
        strategy = FederatedStrategy(trainer, nodes)
        trainer.begin()

        def round() -> None:
            messages = strategy.configure_train(0, ArrayRecord(), ConfigRecord(), grid)
            strategy.aggregate_train(0, grid.send_and_receive(messages, timeout=strategy.timeout))

        return Arm(round=round, parameters=lambda: trainer.strategy.parameters)

    return flower_client_app(lambda context: _trainer(drawn)), begin


@functools.lru_cache(maxsize=1)
def _model_and_shards(drawn: Drawn) -> tuple[Any, list[State]]:
    """An actor's, kept."""
    return _task(drawn).model(), [rows.tensors for rows in _task(drawn).rows.by_user().values()]


def _plain(drawn: Drawn) -> tuple[Any, Callable[[Any], Arm]]:
    """As in Flower's own examples, but for what they load anew at each message."""
    from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    client_app = ClientApp()

    @client_app.train()
    def train(message: Message, context: Any) -> Message:
        model, shards = _model_and_shards(drawn)
        count = _local_steps(model, shards[int(context.node_config["partition-id"])], _task(drawn), message)
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": count})}
        return Message(RecordDict(content), reply_to=message)

    def begin(grid: Any) -> Arm:
        share = drawn.clients_per_round / drawn.clients
        strategy = FedAvg(fraction_train=share, fraction_evaluate=0.0, min_available_nodes=drawn.clients)
        served = ArrayRecord(_task(drawn).model().state_dict())

        def round() -> None:
            nonlocal served
            messages = strategy.configure_train(1, served, ConfigRecord(), grid)
            served, _ = strategy.aggregate_train(1, grid.send_and_receive(messages, timeout=3600.0))

        return Arm(round=round, parameters=lambda: served.to_torch_state_dict())

    return client_app, begin


def _local_steps(model: Any, tensors: State, task: Task, message: Any) -> int:
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    optimizer, count = torch.optim.SGD(model.parameters(), lr=task.learning_rate), len(tensors["labels"])
    batches = []
    while len(batches) < task.local_steps:
        batches += torch.randperm(count).split(task.batch_size)
    for indices in batches[: task.local_steps]:
        optimizer.zero_grad()
        model(**{name: value[indices] for name, value in tensors.items()}).loss.backward()
        optimizer.step()
    return count


APPS: dict[str, Callable[[Drawn], tuple[Any, Callable[[Any], Arm]]]] = {PLAIN: _plain, OURS: _ours}


def markdown_table(report: FlowerReport) -> str:
    """Updates a second, start-up and speed-ups of the report, by wall time."""
    lines = [
        f"FedAvg over {report.clients} clients, {report.clients_per_round} a round, {report.local_steps} local steps "
        f"of {report.batch_size} examples, {report.parameters:,} parameters; {report.device}, load average "
        f"{report.load_average[0]:.1f} to {report.load_average[1]:.1f}; {report.threads} thread, {report.blocks} "
        f"alternating blocks of {report.steps_per_block} rounds; wall time; target {report.target} times as fast.",
        "",
        "| in process against | actors | updates/s | its updates/s | times as fast | CPU ms/update | its CPU "
        "ms/update | start s | its start s | largest difference | verdict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        median, low, high = item.speedup
        difference = "other clients" if item.largest_difference is None else f"{item.largest_difference:.1e}"
        lines.append(
            f"| {item.baseline} | {item.actors} | {item.ours_updates_per_second:.1f} | "
            f"{item.baseline_updates_per_second:.1f} | {median:.1f} [{low:.1f}, {high:.1f}] | "
            f"{1e3 * item.ours_cpu_seconds:.2f} | {1e3 * item.baseline_cpu_seconds:.2f} | "
            f"{item.ours_start_seconds:.1f} | {item.baseline_start_seconds:.1f} | {difference} | {item.verdict} |"
        )
    return "\n".join(lines)
