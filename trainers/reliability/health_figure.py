"""One figure with a panel for each thing that was measured in a run, incidents marked in all that have steps."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..figures import DPI, INK, OKABE_ITO, STYLE, WIDTH
from .goodput import CATEGORIES


if TYPE_CHECKING:
    from .report import Run

SEVERITY_COLOURS = {"warning": "#E69F00", "error": "#D55E00", "fatal": "#000000"}
MAX_MARKS = 50


def health_figure(run: "Run", path: str | Path) -> Path | None:
    """Draw what is there of: loss, weight norms by depth, stable rank, balance, time, incidents.

    Returns the path of the PNG, or `None` (nothing written) if nothing can be drawn.
    """
    panels: list[Callable[[Axes], None]] = []
    for plan in (_loss, _norms, _stable_rank, _balance, _time, _incidents):
        draw = plan(run)
        if draw is not None:
            panels.append(draw)
    if not panels:
        return None
    rows = math.ceil(len(panels) / 2)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6 * rows), layout="constrained")
        axes = figure.subplots(rows, min(2, len(panels)), squeeze=False).flatten()
        for panel, draw in zip(axes, panels):
            draw(panel)
        for panel in axes[len(panels) :]:
            panel.set_axis_off()
        FigureCanvasAgg(figure)
        # no version of matplotlib inside the file: the same data gives the same bytes
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return Path(path)


def _loss(run: "Run") -> Callable[[Axes], None] | None:
    curves = {name: run.curve(key) for name, key in (("training", "loss"), ("held-out", "eval_loss"))}
    curves = {name: curve for name, curve in curves.items() if curve[0]}
    if not curves:
        return None

    def draw(panel: Axes) -> None:
        for colour, (name, (steps, values)) in zip(OKABE_ITO, curves.items()):
            marker = "o" if len(steps) < 25 else None
            panel.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=name)
        _finish(panel, run, f"Loss: {list(curves.values())[0][1][-1]:.4g} at the end")
        if len(curves) > 1:
            panel.legend(loc="best")

    return draw


def _norms(run: "Run") -> Callable[[Axes], None] | None:
    profiles = []
    for event in run.events:
        weight = event.evidence.get("weight") if event.component == "norm_profile" else None
        if event.severity == "info" and isinstance(weight, Mapping):
            families = {name: _numbers(values) for name, values in weight.items()}
            families = {name: values for name, values in families.items() if any(map(math.isfinite, values))}
            if families:
                profiles.append((event.step, families))
    if not profiles:
        return None
    (first_step, first), (last_step, last) = profiles[0], profiles[-1]

    def draw(panel: Axes) -> None:
        for index, (family, norms) in enumerate(last.items()):
            colour = OKABE_ITO[index % len(OKABE_ITO)]
            style = "-" if index < len(OKABE_ITO) else "--"
            panel.plot(range(len(norms)), norms, style, color=colour, linewidth=1.6, label=family)
            if len(profiles) > 1 and family in first:
                panel.plot(range(len(first[family])), first[family], style, color=colour, linewidth=0.7, alpha=0.4)
        panel.set_xlabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.legend(loc="best", fontsize=7, ncols=2)
        faint = f" (faint: {first_step})" if len(profiles) > 1 else ""
        panel.set_title(f"Weight norms, step {last_step}{faint}")

    return draw


def _stable_rank(run: "Run") -> Callable[[Axes], None] | None:
    steps, curves = [], {"before": [], "after": []}
    for event in run.events:
        if event.component != "msign" or event.severity != "info":
            continue
        pairs = [pair for pair in event.evidence.get("matrices", {}).values() if isinstance(pair, Mapping)]
        lowest = {key: [x for x in _numbers([pair.get(key) for pair in pairs]) if math.isfinite(x)] for key in curves}
        if all(lowest.values()):
            steps.append(event.step)
            for key, values in lowest.items():
                curves[key].append(min(values))
    if not steps:
        return None

    def draw(panel: Axes) -> None:
        for colour, (key, values) in zip(OKABE_ITO, curves.items()):
            panel.plot(steps, values, "o-", color=colour, linewidth=1.4, markersize=3, label=key)
        panel.legend(loc="best")
        _finish(panel, run, f"Lowest stable rank: {curves['before'][-1]:.3g} before MSign")

    return draw


def _balance(run: "Run") -> Callable[[Axes], None] | None:
    steps, values = run.curve("moe/max_violation")
    if not steps:
        return None

    def draw(panel: Axes) -> None:
        panel.plot(steps, values, color=OKABE_ITO[0], linewidth=1.4)
        panel.set_ylim(bottom=0)
        _finish(panel, run, f"Busiest expert: {values[-1]:+.0%} over its share")

    return draw


def _time(run: "Run") -> Callable[[Axes], None] | None:
    goodput = run.goodput
    if goodput is None or not goodput.wall_seconds:
        return None

    def draw(panel: Axes) -> None:
        names = list(CATEGORIES)
        shares = [100 * goodput.seconds[name] / goodput.wall_seconds for name in names]
        colours = [OKABE_ITO[0] if name == "productive" else "#c4ccd4" for name in names]
        panel.barh(range(len(names)), shares, color=colours)
        for index, share in enumerate(shares):
            panel.annotate(f" {share:.1f} %", (share, index), va="center", fontsize=8)
        panel.set_yticks(range(len(names)), [name.replace("_", " ") for name in names])
        panel.invert_yaxis()
        panel.set_xlim(0, 118)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("% of the wall time")
        panel.set_title(f"Productive: {goodput.effective_time_ratio:.1%} of the time")

    return draw


def _incidents(run: "Run") -> Callable[[Axes], None] | None:
    incidents = run.incidents
    if not incidents:
        return None

    def draw(panel: Axes) -> None:
        names = list(dict.fromkeys(event.component for event in incidents))
        for severity, colour in SEVERITY_COLOURS.items():
            points = [(e.step, names.index(e.component)) for e in incidents if e.severity == severity]
            if points:
                panel.scatter(*zip(*points), color=colour, s=22, label=severity, zorder=3)
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.legend(loc="best", fontsize=8)
        panel.set_xlabel("optimizer step")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.set_title(f"Incidents: {len(incidents)}")

    return draw


def _finish(panel: Axes, run: "Run", title: str) -> None:
    for event in run.incidents[-MAX_MARKS:]:
        panel.axvline(event.step, color=SEVERITY_COLOURS[event.severity], linewidth=0.8, alpha=0.6, zorder=1)
    panel.set_xlabel("optimizer step")
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.set_title(title, color=INK)


def _numbers(values: Any) -> list[float]:
    """Floats of a list as events hold it: NaN and infinities are strings there, anything else is NaN."""
    numbers = []
    for value in values if isinstance(values, (list, tuple)) else ():
        try:
            numbers.append(float(value))
        except (TypeError, ValueError):
            numbers.append(math.nan)
    return numbers


__all__ = ["health_figure"]
