"""Numbers and figures out of the histories of federated runs: the end of a run, rounds to a target, curves."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..figures import comparison_figure, loss_figure
from ..report import FigureFile, Metric, summarise
from .comparison import against_baselines
from .federated_cells import Compared, Outcome, held_from


LAST = 0.25  # share of the rounds that the end of a run is: whole periods of who is there, in the presets


def last(outcome: Outcome, key: str, *, share: float = LAST) -> np.ndarray:
    """What was measured in the last rounds; NaN of a run that diverged."""
    history = outcome["history"]
    if outcome["diverged"] or not history:
        return np.array([np.nan])
    begin = history[-1]["round"] * (1 - share)
    return np.array([entry[key] for entry in history if entry["round"] > begin], dtype=float)


def reached(history: Sequence[Mapping[str, Any]], key: str, target: float) -> int | None:
    """The first round at which a value is at the target; `None`: it never is."""
    return next((entry["round"] for entry in history if entry[key] >= target), None)


def arms_metric(
    compared: Compared,
    value: Callable[[str, Outcome], float],
    arms: Sequence[str] | None = None,
    *,
    higher_is_better: bool,
    unit: str = "",
    note: str = "",
) -> Metric | None:
    """A quantity of the first arm, with the others as its baselines and a verdict against each; an arm with a value
    that is no number on some seed is left out, and named in the note. `None` if that is the first."""
    arms = list(arms or compared.outcomes)
    values = {arm: [float(value(arm, outcome)) for outcome in compared.outcomes[arm]] for arm in arms}
    finite = {arm: found for arm, found in values.items() if np.isfinite(found).all()}
    if arms[0] not in finite:
        return None
    metric = against_baselines(
        {arm: summarise(found, unit=unit, higher_is_better=higher_is_better) for arm, found in finite.items()}
    )
    lost = [arm for arm in arms if arm not in finite]
    metric.note = "; ".join(filter(None, [note, f"diverged: {', '.join(lost)}" if lost else ""]))
    return metric


def rounds_metric(
    compared: Compared, key: Callable[[str], str], target: float, rounds: int, arms: Sequence[str] | None = None
) -> Metric | None:
    """Rounds from which on a target is held. A run that never does counts as one round more than there are, and the
    note says how many did so."""
    arms = list(arms or compared.outcomes)
    never = {}

    def value(arm: str, outcome: Outcome) -> float:
        found = None if outcome["diverged"] else held_from(outcome["history"], key(arm), target)
        if found is None:
            never[arm] = never.get(arm, 0) + 1
        return rounds + 1 if found is None else found

    metric = arms_metric(compared, value, arms, higher_is_better=False, unit="rounds")
    seeds = len(next(iter(compared.outcomes.values())))
    told = ", ".join(f"{arm} {count} of {seeds}" for arm, count in never.items())
    metric.note = f"first round from which {target:g} is held to the end" + (
        f"; never (counted as {rounds + 1}): {told}" if told else ""
    )
    return metric


def curves_figure(
    compared: Compared,
    key: Callable[[str], str],
    path: Path,
    *,
    caption: str,
    y_label: str,
    arms: Sequence[str] | None = None,
    higher_is_better: bool = True,
) -> FigureFile:
    """A quantity over the rounds by arm, the mean of its seeds."""
    curves = {}
    for arm in arms or compared.outcomes:
        whole = [outcome["history"] for outcome in compared.outcomes[arm] if not outcome["diverged"]]
        if whole:
            rounds = [entry["round"] for entry in whole[0]]
            curves[arm] = (rounds, np.mean([[e[key(arm)] for e in history] for history in whole], axis=0))
    loss_figure(curves, path, x_label="rounds", y_label=y_label, higher_is_better=higher_is_better)
    return FigureFile(path=f"figures/{path.name}", caption=caption)


def bars_figure(metric: Metric, first: str, path: Path, *, caption: str, y_label: str) -> FigureFile:
    """Every run of every arm, and their means."""
    groups = {first: metric.values} | {arm: other.values for arm, other in metric.baseline.items()}
    comparison_figure(groups, path, y_label=y_label, higher_is_better=bool(metric.higher_is_better))
    return FigureFile(path=f"figures/{path.name}", caption=caption)


def sweep_figure(
    points: Mapping[str, Mapping[float, float]], path: Path, *, caption: str, x_label: str, y_label: str
) -> FigureFile:
    """A quantity over something that experiments differ in, a line an arm."""
    curves = {arm: tuple(zip(*sorted(found.items()))) for arm, found in points.items()}
    loss_figure(curves, path, x_label=x_label, y_label=y_label, higher_is_better=True)
    return FigureFile(path=f"figures/{path.name}", caption=caption)


def present(metrics: Mapping[str, Metric | None]) -> dict[str, Any]:
    """Without those that could not be made."""
    return {name: metric for name, metric in metrics.items() if metric is not None}


__all__ = [
    "arms_metric",
    "bars_figure",
    "curves_figure",
    "last",
    "present",
    "reached",
    "rounds_metric",
    "sweep_figure",
]
