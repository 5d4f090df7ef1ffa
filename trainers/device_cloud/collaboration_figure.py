"""One figure of all classes: what is served over what crosses the wire, while learning and at each request."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ..figures import DPI, OKABE_ITO, STYLE, WIDTH


Outcome = Mapping[str, Any]
_MARKERS = {"data": "o", "feature": "s", "parameter": "D", "none": "X"}
_PANELS = (
    ("bytes_up", "bytes_down", "bytes while learning, up and down"),
    ("request_bytes_up", "request_bytes_down", "bytes per request with its answer"),
)


def plot_collaboration(
    outcomes: Mapping[str, Sequence[Outcome]], kinds: Mapping[str, str], path: str | Path, *, title: str = ""
) -> Path:
    """Served accuracy over bytes, a colour a method, a shape a class, a dot a seed.

    Args:
        outcomes: by method, what [`as_json`] gives, one a seed.
        kinds: the class of each method, `"none"` of a baseline.

    Raises:
        ValueError: no method, or one without a seed.
    """
    if not outcomes or not all(outcomes.values()):
        raise ValueError("`outcomes` needs a method, and every method a seed.")
    colours = {name: OKABE_ITO[index % len(OKABE_ITO)] for index, name in enumerate(outcomes)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, (up, down, label) in zip(panels, _PANELS):
            for index, (name, seeds) in enumerate(outcomes.items()):
                x = [outcome[up] + outcome[down] for outcome in seeds]
                y = [100 * outcome["served_accuracy"] for outcome in seeds]
                face = colours[name] if index < len(OKABE_ITO) else "none"
                style = {"markerfacecolor": face, "markeredgecolor": colours[name], "markersize": 8, "alpha": 0.85}
                panel.plot(x, y, _MARKERS[kinds[name]], label=name.replace("_", " "), **style)
            panel.set_xscale("symlog", linthresh=100)
            panel.set_xlim(left=-20)
            panel.xaxis.set_major_formatter(FuncFormatter(_bytes))
            panel.set_xlabel(label)
        panels[0].set_ylabel("served accuracy, all classes (%)")
        methods = panels[0].get_legend_handles_labels()
        figure.legend(*methods, loc="outside lower center", ncols=3, fontsize=8.5)
        shapes = [Line2D([], [], linestyle="", marker=m, color="#57606a", label=k) for k, m in _MARKERS.items()]
        panels[1].legend(handles=shapes, title="what moves", loc="best", fontsize=8.5)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure)
        # no version of matplotlib inside the file: the same data gives the same bytes
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def _bytes(size: float, _position: int) -> str:
    for factor, unit in ((1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:g} {unit}"
    return f"{size:g}"


__all__ = ["plot_collaboration"]
