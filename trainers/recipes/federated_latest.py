"""FedLaAvg among the algorithms that clients come and go under: the experiments, and what they come to."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..federated import FederatedTrainer
from ..federated.core import FederatedAlgorithm
from ..report import FigureFile, Metric
from .federated_arms import Shared, strategy_of
from .federated_cells import Cell, Compared, Experiment, Outcome
from .federated_digits_data import ImageTask
from .federated_results import arms_metric, bars_figure, curves_figure, last, present, rounds_metric, sweep_figure


LATEST_ARMS = ["fed_la_avg", "mifa", "wait_for_all", "fed_avg", "fed_prox", "fed_adam", "fed_sgd"]
NONCONVEX_ARMS = ["fed_la_avg", "fed_avg", "fed_prox", "fed_adam"]
CONVEX, NONCONVEX = "convex", "nonconvex"
POPULATIONS = (0.2, 0.6, 2.0)  # times the clients of the first experiment; the paper has 200 and 600 beside 1000


@dataclasses.dataclass(frozen=True)
class LatestSetting:
    """All that decides a run, besides arm, rate and seed; see the recipe's arguments."""

    method: str
    data_name: str
    model: str
    clients: int
    participation: float
    rounds: int
    local_steps: int
    batch_size: int
    absence: int
    first_digits: int
    proximal: float
    server_learning_rate: float
    evaluate_every: int


def latest_experiments(args: Any, batch_size: int) -> list[Experiment]:
    """The set-up of the paper's MNIST runs with every arm; then, at the rates found there, with everybody always
    there, with equal groups, with longer absence, and with other numbers of clients; and an MLP with rates of its
    own."""
    names = [field.name for field in dataclasses.fields(LatestSetting) if field.name != "batch_size"]
    base = LatestSetting(batch_size=batch_size, **{name: getattr(args, name) for name in names})
    two = [arm for arm in args.arms if arm in (args.arms[0], "fed_avg")]
    few = [arm for arm in args.arms if arm in NONCONVEX_ARMS] or args.arms

    def other(name: str, **changes: Any) -> Experiment:
        return Experiment(name, dataclasses.replace(base, **changes), two, rates_of=CONVEX)

    sizes = [10 * max(1, round(factor * base.clients / 10)) for factor in POPULATIONS]
    return [
        Experiment(CONVEX, base, args.arms),
        other("always_there", first_digits=0),
        other("equal_groups", first_digits=5),
        other("long_absence", absence=2 * base.absence),
        *(other(f"clients_{size}", clients=size) for size in sizes),
        Experiment(NONCONVEX, dataclasses.replace(base, model="mlp"), few),
    ]


def latest_strategy(cell: Cell) -> FederatedAlgorithm:
    """Of a cell."""
    setting = cell.experiment.setting
    shared = Shared(
        learning_rate=cell.learning_rate,
        clients_per_round=max(1, round(setting.participation * setting.clients)),
        seed=cell.seed,
        proximal=setting.proximal,
        server_learning_rate=setting.server_learning_rate,
    )
    return strategy_of(cell.run, shared)


def latest_measures(
    trainer: FederatedTrainer, task: ImageTask, setting: LatestSetting
) -> Callable[[int], dict[str, float]]:
    """Accuracies of what is served."""

    @torch.no_grad()
    def measure(done: int) -> dict[str, float]:
        trainer.serve()
        trainer.model.eval()
        found = {}
        for name, part in (("validation", task.validation), ("test", task.test)):
            logits = trainer.model(part.pixel_values.to(trainer.args.device)).logits
            found[name] = float((logits.argmax(-1).cpu() == part.labels).double().mean())
        return found

    return measure


def latest_score(arm: str, outcome: Outcome) -> float:
    """The mean validation accuracy of the last rounds."""
    return float(last(outcome, "validation").mean())


def report(
    args: Any, experiments: list[Experiment], found: dict[str, Compared], root: Path
) -> tuple[dict[str, Metric], list[FigureFile], dict[str, Any]]:
    """Metrics, figures, and what else is for the record."""
    metrics: dict[str, Metric | None] = {}
    ours = args.arms[0]
    for experiment in experiments:
        name, compared, rounds = experiment.name, found[experiment.name], experiment.setting.rounds
        metrics[f"{name}_accuracy"] = arms_metric(
            compared,
            lambda arm, o: last(o, "test").mean(),
            higher_is_better=True,
            note="test accuracy, mean over the last quarter of the rounds",
        )
        metrics[f"{name}_accuracy_range"] = arms_metric(
            compared,
            lambda arm, o: np.ptp(last(o, "test")),
            higher_is_better=False,
            note="largest minus smallest test accuracy in the last quarter of the rounds",
        )
        metrics[f"{name}_rounds_to_target"] = rounds_metric(compared, lambda arm: "test", args.target, rounds)
        if name in (CONVEX, NONCONVEX):
            metrics[f"{name}_lowest_accuracy"] = arms_metric(
                compared,
                lambda arm, o: last(o, "test").min(),
                higher_is_better=True,
                note="smallest test accuracy in the last quarter of the rounds",
            )
            metrics[f"{name}_bytes"] = arms_metric(
                compared,
                lambda arm, o: o["bytes_up"] + o["bytes_down"],
                higher_is_better=False,
                unit="bytes",
                note="up and down, all rounds",
            )
    metrics = present(metrics)
    return metrics, _figures(ours, experiments, found, metrics, root / "figures"), {}


def _figures(
    ours: str,
    experiments: list[Experiment],
    found: dict[str, Compared],
    metrics: dict[str, Metric],
    folder: Path,
) -> list[FigureFile]:
    figures = []
    for name in (CONVEX, NONCONVEX):
        if name in found:
            caption = f"{name}: test accuracy over the rounds, mean of the seeds."
            path = folder / f"{name}_rounds.png"
            figures.append(
                curves_figure(found[name], lambda arm: "test", path, caption=caption, y_label="test accuracy")
            )
            if f"{name}_accuracy_range" in metrics:
                caption = f"{name}: how far the accuracy swings in the last quarter of the rounds."
                label = "largest minus smallest test accuracy"
                path = folder / f"{name}_range.png"
                metric = metrics[f"{name}_accuracy_range"]
                figures.append(bars_figure(metric, ours, path, caption=caption, y_label=label))
    sizes = {e.setting.clients: e.name for e in experiments if e.name == CONVEX or e.name.startswith("clients_")}
    if len(sizes) > 1:
        points: dict[str, dict[float, float]] = {}
        for size, name in sizes.items():
            if metric := metrics.get(f"{name}_accuracy"):
                points.setdefault(ours, {})[size] = metric.value
                if other := metric.baseline.get("fed_avg"):
                    points.setdefault("fed_avg", {})[size] = other.value
        caption = "Test accuracy over the number of clients, a tenth of whom take part in a round, mean of the seeds."
        path = folder / "clients.png"
        figures.append(sweep_figure(points, path, caption=caption, x_label="clients", y_label="test accuracy"))
    return figures


__all__ = ["LATEST_ARMS", "LatestSetting", "latest_experiments", "latest_measures", "latest_score", "latest_strategy"]
