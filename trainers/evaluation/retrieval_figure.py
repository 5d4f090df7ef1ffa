"""Recall against the size of the index, one line an exit, the Pareto front filled."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from ..figures import DPI, INK, OKABE_ITO, STYLE, WIDTH
from .retrieval import Measure, RetrievalCell, pareto


def plot_pareto(
    cells: Sequence[RetrievalCell],
    path: str | Path,
    *,
    measure: Measure = "recall",
    k: int = 10,
    others: Mapping[str, Sequence[RetrievalCell]] | None = None,
) -> Path:
    """Draw `measure`@`k` of every cell over its index bytes; cells of the Pareto front are filled dots.

    Args:
        cells: the grid of [`evaluate_grid`].
        others: grids of other models by name, in the same colour for the same layer, dashed.

    Raises:
        ValueError: no cell.
    """
    if not cells:
        raise ValueError("`cells` is empty: nothing to draw.")
    grids = {"": cells} | dict(others or {})
    layers = sorted({cell.layer for grid in grids.values() for cell in grid})
    colour_of = {layer: OKABE_ITO[index % len(OKABE_ITO)] for index, layer in enumerate(layers)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.4), layout="constrained")
        panel = figure.subplots()
        for dashes, (_, grid) in zip(_dashes(len(grids)), grids.items()):
            front = pareto(grid, measure=measure, k=k)
            for layer in layers:
                line = sorted((c for c in grid if c.layer == layer), key=lambda cell: cell.index_bytes)
                x, y = [c.index_bytes for c in line], [getattr(c, measure)[k] for c in line]
                panel.plot(x, y, color=colour_of[layer], linewidth=1.6, linestyle=dashes)
                for cell, left, top in zip(line, x, y):
                    face = colour_of[layer] if cell in front else "white"
                    panel.plot(left, top, "o", color=colour_of[layer], markerfacecolor=face, markersize=6, zorder=3)
        sizes = {cell.index_bytes: cell.dim for cell in cells}
        panel.set_xscale("log")
        panel.set_xticks(sorted(sizes), [f"{_bytes(size)}\n{sizes[size]} dims" for size in sorted(sizes)])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.set_xlabel("index in fp32")
        panel.set_ylabel(f"{measure}@{k}")
        handles = [Line2D([], [], color=colour_of[layer], label=f"{layer} layers") for layer in reversed(layers)]
        handles.append(Line2D([], [], color=INK, marker="o", linestyle="", label="Pareto front"))
        handles += [
            Line2D([], [], color=INK, linestyle=dashes, label=name)
            for dashes, name in zip(_dashes(len(grids)), grids)
            if name
        ]
        panel.legend(handles=handles, loc="best")
        figure.suptitle(_title(cells, measure, k), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure)
        # no version of matplotlib inside the file: the same data gives the same bytes
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _dashes(count: int) -> list:
    return ["-", *((0, (1 + 3 * index, 2)) for index in range(count - 1))]


def _title(cells: Sequence[RetrievalCell], measure: Measure, k: int) -> str:
    """The cheapest and the best cell, in words."""
    cheapest = min(cells, key=lambda cell: (cell.index_bytes, cell.layer))
    best = max(cells, key=lambda cell: (getattr(cell, measure)[k], -cell.index_bytes, -cell.layer))
    return "\n".join(
        f"{measure}@{k} {getattr(cell, measure)[k]:.3f} with {cell.layer} layers and {cell.dim} dims "
        f"({_bytes(cell.index_bytes)})"
        for cell in ([best] if cheapest == best else [best, cheapest])
    )


def _bytes(size: float) -> str:
    for factor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:g} B"
