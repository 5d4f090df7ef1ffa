"""Two figures of DC-CCL: accuracy by round, and accuracy by bytes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ..figures import DPI, FAINT, OKABE_ITO, STYLE, WIDTH


History = Sequence[Mapping[str, Any]]


def plot_rounds(histories: Mapping[str, Sequence[History]], path: str | Path, *, title: str = "") -> Path:
    """Served accuracy and the device's own over the rounds, one line an arm: means over seeds, and their range. Arms
    without rounds are level lines; those without a device are on the left only.

    Args:
        histories: by arm, one [`DcCclRun.history`] a seed; the first arm is drawn thick.

    Raises:
        ValueError: no arm, or one without a seed.
    """
    _require(histories)
    rounds = max(len(history) for seeds in histories.values() for history in seeds)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for panel, key, heading in zip(panels, ("served", "device"), ("served by the cloud", "on the device")):
            for index, (arm, seeds) in enumerate(histories.items()):
                curves = [[record[key] for record in history] for history in seeds]
                if curves[0][0] is None:
                    continue
                values = 100 * np.array([curve if len(curve) > 1 else curve * rounds for curve in curves])
                colour, dashes = _style(index)
                x = np.arange(values.shape[1])
                width = 2.6 if index == 0 else 1.4
                panel.plot(x, values.mean(0), color=colour, linestyle=dashes, linewidth=width, label=arm)
                panel.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.1, linewidth=0)
            panel.set_title(heading)
            panel.set_xlabel("round")
        panels[0].set_ylabel("accuracy on all classes (%)")
        panels[0].legend(loc="lower right", fontsize=8.5)
        return _save(figure, path, title)


def plot_bytes(histories: Mapping[str, Sequence[History]], path: str | Path, *, title: str = "") -> Path:
    """Served accuracy after the last round over all bytes that crossed the wire, a dot an arm and seed.

    Raises:
        ValueError: no arm, or one without a seed.
    """
    _require(histories)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.0), layout="constrained")
        panel = figure.subplots()
        for index, (arm, seeds) in enumerate(histories.items()):
            x = [max(1, history[-1]["bytes_up"] + history[-1]["bytes_down"]) for history in seeds]
            y = [100 * history[-1]["served"] for history in seeds]
            colour, _ = _style(index)
            panel.plot(x, y, "o" if index else "D", color=colour, markersize=8 if index == 0 else 6, alpha=0.8)
            panel.annotate(arm, (x[0], max(y)), xytext=(0, 8), textcoords="offset points", ha="center", fontsize=9)
        panel.set_xscale("symlog", linthresh=1e4)
        panel.xaxis.set_major_formatter(FuncFormatter(_bytes))
        panel.margins(x=0.12, y=0.15)
        panel.set_xlabel("bytes up and down, all rounds")
        panel.set_ylabel("served accuracy (%)")
        return _save(figure, path, title)


def _require(histories: Mapping[str, Sequence[History]]) -> None:
    if not histories or not all(len(seeds) and all(seeds) for seeds in histories.values()):
        raise ValueError("`histories` needs an arm, and every arm a seed with a record.")


def _style(index: int) -> tuple[str, Any]:
    colour = OKABE_ITO[index] if index < len(OKABE_ITO) else FAINT
    return colour, "-" if index % 2 == 0 else (0, (4, 2))


def _bytes(size: float, _position: int) -> str:
    for factor, unit in ((2**20, "MiB"), (2**10, "KiB")):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:g} B"


def _save(figure: Figure, path: str | Path, title: str) -> Path:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


__all__ = ["plot_bytes", "plot_rounds"]
