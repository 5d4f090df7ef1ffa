"""The figures of a run: plain arrays in, one PNG out.

Every function takes a path, writes there, and returns it. Colours are those of Okabe and Ito and the maps are ordered
in lightness, so that nothing rests on telling red from green. A title states what is seen, with numbers from the data.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator


OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, FAINT = "#24292f", "#8c959f"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.facecolor": "white",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "grid.color": "#eaeef2",
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
WIDTH = 8.3  # inches; at 150 dpi a README shows the file at two thirds of its pixels, sharp on dense screens
DPI = 150


def balance_figure(
    history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    baseline: Sequence[Mapping[str, Any]] | None = None,
    label: str = "this run",
    baseline_label: str = "conventional LBL, top-1",
) -> Path:
    """Load of the busiest and of the idlest expert of every layer over the steps, relative to a uniform share.

    Args:
        history (`list[dict]`): rows of `logs/balance.jsonl` with `step`, `layer`, `max_deviation` and `min_deviation`
            (fractions: 0 is uniform, -1 no token at all); other keys are ignored.
        path (`str` or `Path`): PNG to write.
        baseline (`list[dict]`, *optional*): the same rows of a second run, drawn beside on the same axes.
        label, baseline_label (`str`): headings of the two panels.

    Raises:
        ValueError: `history` is empty.
    """
    runs = {label: _by_layer(history)}
    if baseline is not None:
        runs[baseline_label] = _by_layer(baseline)
    layers = sorted({layer for run in runs.values() for layer in run})
    largest = max(float(np.max(curve["max_deviation"])) for run in runs.values() for curve in run.values())
    colours = LinearSegmentedColormap.from_list("layers", ["#D55E00", "#CC79A7", "#0072B2", "#56B4E9"])(
        np.linspace(0, 1, max(len(layers), 2))
    )
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
        panels = figure.subplots(1, len(runs), sharey=True, squeeze=False)[0]
        for panel, (name, run) in zip(panels, runs.items()):
            for layer in reversed(layers):  # the lowest layer, where balance is hardest, on top
                if layer in run:
                    _draw_layer(panel, run[layer], colours[layers.index(layer)], emphasised=layer == layers[0])
            panel.axhline(0, color=INK, linewidth=0.8)
            if baseline is not None:
                panel.set_title(name)
            panel.set_xlabel("optimizer step")
            panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if largest > 3:  # a collapsed router reaches (experts - 1) x 100 %, which would flatten all else
            panels[0].set_yscale("symlog", linthresh=100, linscale=1.5)
            panels[0].set_yticks(
                [-100, 0, 100, *(tick for tick in (300, 1000, 3000) if tick < 120 * largest)], minor=False
            )
            panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylim(bottom=-112)
        panels[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: _percent(value) if value else "uniform"))
        panels[0].set_ylabel("load of busiest / idlest expert,\nrelative to a uniform share")
        _layer_colourbar(figure, panels, colours, layers)
        ends = [f"{_end(run[layers[0]])} ({name})" for name, run in runs.items() if layers[0] in run]
        _headline(figure, f"Layer {layers[0]} ends at " + "\nagainst ".join(ends))
        return _save(figure, path)


def _by_layer(history: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, np.ndarray]]:
    if not history:
        raise ValueError("The balance history is empty: was the balance callback active, and did a step run?")
    rows = defaultdict(dict)
    for row in history:  # a run killed after its last checkpoint repeats steps on resume: the later row counts
        rows[row["layer"]][row["step"]] = (row["step"], row["max_deviation"], row["min_deviation"])
    curves = {}
    for layer, values in rows.items():
        step, high, low = np.array(sorted(values.values()), dtype=float).T
        curves[layer] = {"step": step, "max_deviation": high, "min_deviation": low}
    return curves


def _draw_layer(panel, curve: dict[str, np.ndarray], colour, emphasised: bool) -> None:
    for key in ("max_deviation", "min_deviation"):
        raw, smooth = 100 * curve[key], 100 * _smooth(curve[key])
        panel.plot(curve["step"], raw, color=colour, linewidth=0.6, alpha=0.18)
        panel.plot(curve["step"], smooth, color=colour, linewidth=2.2 if emphasised else 1.2)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over a thirtieth of the run; the window shrinks at both ends instead of inventing values."""
    half = len(values) // 60
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _end(curve: dict[str, np.ndarray]) -> str:
    """Mean of the last tenth of a run: a single last batch is noise."""
    tail = max(1, len(curve["step"]) // 10)
    high, low = (100 * curve[key][-tail:].mean() for key in ("max_deviation", "min_deviation"))
    return f"{_percent(high)} / {_percent(low)}"


def _percent(value: float) -> str:
    return f"{value:+,.0f} %".replace("-", "\N{MINUS SIGN}")


def _layer_colourbar(figure: Figure, panels, colours: np.ndarray, layers: list[int]) -> None:
    if len(layers) == 1:
        return
    edges = np.arange(len(layers) + 1) - 0.5
    mapping = ScalarMappable(norm=BoundaryNorm(edges, len(layers)), cmap=ListedColormap(colours[: len(layers)]))
    shown = sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(len(layers), 8))})
    bar = figure.colorbar(mapping, ax=list(panels), ticks=shown, pad=0.02, aspect=30)
    bar.ax.set_yticklabels([str(layers[i]) for i in shown])
    bar.ax.invert_yaxis()
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.outline.set_visible(False)
    bar.set_label("layer")


def loss_figure(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    x_label: str = "training tokens",
    y_label: str = "held-out loss (nats/token)",
    higher_is_better: bool = False,
) -> Path:
    """Curves `{name: (x, y)}`, losses unless `higher_is_better`, each labelled at its right end.

    Raises:
        ValueError: no curve, an empty curve, or x and y of different lengths.
    """
    if not curves:
        raise ValueError("`curves` is empty: nothing to draw.")
    for name, (x, y) in curves.items():
        if len(x) != len(y) or len(x) == 0:
            raise ValueError(f"Curve {name!r} has {len(x)} x values and {len(y)} y values.")
    order = sorted(curves, key=lambda name: curves[name][1][-1], reverse=higher_is_better)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        panel = figure.subplots()
        ends = {}
        for index, (name, (x, y)) in enumerate(curves.items()):
            colour = OKABE_ITO[index % len(OKABE_ITO)]
            panel.plot(x, y, color=colour, linewidth=2, marker="o" if len(x) < 25 else None, markersize=4)
            (ends[name],) = panel.plot(x[-1], y[-1], "o", color=colour, markersize=6)
        panel.legend(
            [ends[name] for name in order],
            [f"{name}: {curves[name][1][-1]:.3f}" for name in order],
            title="last value, best first",
            alignment="left",
            loc="best",
        )
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        panel.xaxis.set_major_formatter(FuncFormatter(_short_number))
        ends_best = "ends highest" if higher_is_better else "ends lowest"
        _headline(figure, _ranking(order, [f"{curves[name][1][-1]:.3f}" for name in order], ends_best))
        return _save(figure, path)


def elastic_figure(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    points: Mapping[str, tuple[float, float]] | None = None,
    x_label: str = "active experts per token (mean over layers)",
    y_label: str = "held-out perplexity",
) -> Path:
    """Quality against cost: one line a model over the settings of its dial, lower is better.

    Args:
        curves (`dict[str, list[tuple[float, float]]]`): `(cost, quality)` by name; the first is ours and is drawn on
            top.
        path (`str` or `Path`): PNG to write.
        points (`dict[str, tuple[float, float]]`, *optional*): single models beside the curves, such as one trained at
            each cost; drawn as diamonds.
        x_label, y_label (`str`): what the axes show.

    Raises:
        ValueError: no curve, or one without a point.
    """
    if not curves or not all(len(curve) for curve in curves.values()):
        raise ValueError("Every curve needs at least one point, and there must be a curve.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        panel = figure.subplots()
        for index, (name, curve) in enumerate(curves.items()):
            x, y = zip(*sorted(curve), strict=True)
            ours = {"linewidth": 2.4, "zorder": 4} if index == 0 else {"linewidth": 1.4, "zorder": 3}
            panel.plot(x, y, "o-", color=OKABE_ITO[index % len(OKABE_ITO)], markersize=5, label=name, **ours)
        for index, (name, (x, y)) in enumerate((points or {}).items()):
            colour = OKABE_ITO[(len(curves) + index) % len(OKABE_ITO)]
            panel.plot(x, y, "D", color=colour, markersize=8, markerfacecolor="none", zorder=5, label=name)
        values = [y for curve in curves.values() for _, y in curve] + [y for _, y in (points or {}).values()]
        if max(values) > 3 * min(values) > 0:  # a model far from the number it was trained with
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(FuncFormatter(_short_number))
            panel.yaxis.set_minor_formatter(FuncFormatter(_short_number))
        if len(curves) + len(points or {}) > 1:
            panel.legend(loc="best")
        panel.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        panel.set_xlabel(x_label)
        panel.set_ylabel(y_label)
        _headline(figure, _ends_of_dial(curves))
        return _save(figure, path)


def _ends_of_dial(curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Quality of the first curve at its lowest and highest cost, beside that of the second where it was measured."""
    (name, ours), *others = curves.items()
    beside_name, beside = (others[0][0], dict(others[0][1])) if others else ("", {})
    ends = []
    for cost, quality in dict.fromkeys((min(ours), max(ours))):
        also = f" ({beside_name}: {beside[cost]:.3g})" if cost in beside else ""
        ends.append(f"{quality:.3g} at {cost:g}{also}")
    return f"{name}: " + ", ".join(ends)


def expert_load_figure(fractions: Sequence[Sequence[float]], path: str | Path) -> Path:
    """Heat map of the share of routed tokens that each expert of each layer received.

    Args:
        fractions (`list[list[float]]`): `fractions[layer][expert]`, each row summing to 1.
        path (`str` or `Path`): PNG to write.

    Raises:
        ValueError: not a table, or empty.
    """
    try:
        load = np.asarray(fractions, dtype=float)
    except ValueError as error:
        raise ValueError("`fractions` must have the same number of experts in every layer.") from error
    if load.ndim != 2 or load.size == 0:
        raise ValueError(f"`fractions` must be [layer][expert], got shape {load.shape}.")
    layers, experts = load.shape
    relative = load * experts  # 1 is a uniform share
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(WIDTH, min(1.9 + 0.28 * layers, 9)), layout="constrained")
        panel = figure.subplots()
        norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=max(2.0, float(relative.max())))
        image = panel.imshow(relative, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
        starved_layer, starved_expert = np.nonzero(load == 0)
        panel.plot(starved_expert, starved_layer, "x", color="white", markersize=5)
        panel.set_xlabel("expert")
        panel.set_ylabel("layer")
        panel.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        panel.yaxis.set_major_locator(MaxNLocator(min(layers, 14), integer=True))
        bar = figure.colorbar(
            image, ax=panel, pad=0.02, aspect=max(20, 0.8 * layers), ticks=[0, 0.5, 1, *_ticks_above_one(norm.vmax)]
        )
        bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        bar.outline.set_visible(False)
        bar.set_label("tokens, relative to\na uniform share")
        layer, expert = np.unravel_index(relative.argmax(), relative.shape)
        idle = f"{len(starved_layer)} of {load.size} experts got no token" + (" (×)" if len(starved_layer) else "")
        _headline(
            figure,
            f"Busiest expert: {relative.max():.1f}× its share (layer {layer}, expert {expert}); {idle}",
        )
        return _save(figure, path)


def _ticks_above_one(largest: float) -> list[float]:
    step = max(1, math.ceil((largest - 1) / 3))
    return [tick for tick in range(1 + step, math.floor(largest) + 1, step)]


def comparison_figure(
    groups: Mapping[str, Sequence[float]], path: str | Path, *, y_label: str, higher_is_better: bool
) -> Path:
    """One bar a name with the mean of its runs, the sample standard deviation as whisker, and every run as a dot.

    Args:
        groups (`dict[str, list[float]]`): the runs by name; the first is ours and is drawn in colour.
        path (`str` or `Path`): PNG to write.
        y_label (`str`): quantity and unit.
        higher_is_better (`bool`): decides which bar the title names.

    Raises:
        ValueError: no group, or a group without a run.
    """
    if not groups or not all(len(values) for values in groups.values()):
        raise ValueError("Every group needs at least one run.")
    means = {name: float(np.mean(values)) for name, values in groups.items()}
    spreads = {name: float(np.std(values, ddof=1)) if len(values) > 1 else 0.0 for name, values in groups.items()}
    texts = {name: f"{means[name]:.3f}" + (f" ± {spreads[name]:.3f}" if spreads[name] else "") for name in groups}
    order = sorted(means, key=means.get, reverse=higher_is_better)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 1.4 + 0.5 * len(groups)), layout="constrained")
        panel = figure.subplots()
        for index, (name, values) in enumerate(groups.items()):
            ours = index == 0
            panel.barh(index, means[name], height=0.66, color=OKABE_ITO[0] if ours else "#c4ccd4")
            if spreads[name]:
                panel.errorbar(means[name], index, xerr=spreads[name], color=INK, capsize=4, linewidth=1.2, zorder=3)
            rows = index + np.linspace(-0.2, 0.2, len(values)) if len(values) > 1 else [index]
            panel.plot(values, rows, "o", color="white", markeredgecolor=INK, markersize=4.5, zorder=4)
            panel.annotate(
                texts[name],
                (max(0.0, *values, means[name] + spreads[name]), index),
                xytext=(9, 0),
                textcoords="offset points",
                va="center",
                fontweight="bold" if ours else "normal",
            )
        panel.set_yticks(range(len(groups)), list(groups))
        panel.invert_yaxis()
        panel.grid(axis="y", visible=False)
        everything = [value for values in groups.values() for value in values]
        low, high = min(0.0, *everything), max(0.0, *everything)
        # bars start at zero: their lengths must mean what they show; room at the right for the numbers
        panel.set_xlim(low - 0.05 * (high - low) * (low < 0), high + 0.2 * (high - low or 1.0))
        panel.set_xlabel(f"{y_label} ({'higher' if higher_is_better else 'lower'} is better)")
        best = "is highest" if higher_is_better else "is lowest"
        _headline(figure, _ranking(order, [texts[name] for name in order], best))
        return _save(figure, path)


def _ranking(order: Sequence[str], values: Sequence[str], word: str) -> str:
    if len(order) == 1:
        return f"{order[0]}: {values[0]}"
    return f"{order[0]} {word} at {values[0]},\nnext {order[1]} at {values[1]}"


def _short_number(value: float, _position: int) -> str:
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def _headline(figure: Figure, text: str) -> None:
    figure.suptitle(text, x=0.01, ha="left", fontsize=11.5, fontweight="bold")


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    # no version of matplotlib inside the file: the same data gives the same bytes
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
