"""Accuracy over attribution: what a design gains, against what it betrays."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..figures import DPI, FAINT, OKABE_ITO, STYLE, WIDTH


KINDS = ("central", "on_device", "static", "gaussian", "beta", "mixture")


def plot_tradeoff(
    points: Mapping[str, Sequence[tuple[float, float]]], path: str | Path, *, chance: float, y_label: str = "accuracy"
) -> Path:
    """
    Draw every arm's mean (attribution, accuracy) with its name, and each seed as a small dot.

    Args:
        points: by arm, `(attribution, accuracy)` of each seed; the colour is that of the arm's first word.
        chance: attribution by guessing, a vertical line.

    Raises:
        ValueError: no arm.
    """
    if not points:
        raise ValueError("`points` is empty: nothing to draw.")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
        panel = figure.subplots()
        panel.axvline(chance, color=FAINT, linewidth=1, linestyle=":")
        placed: list[tuple[float, float]] = []
        for arm, seeds in sorted(points.items(), key=lambda item: -item[1][0][1]):
            kind = next((k for k in KINDS if arm.startswith(k)), KINDS[0])
            colour = OKABE_ITO[KINDS.index(kind)]
            x, y = (sum(values) / len(values) for values in zip(*seeds))
            panel.plot(*zip(*seeds), "o", color=colour, markersize=3, alpha=0.5, linestyle="")
            panel.plot(x, y, "D" if "random" in arm else "o", color=colour, markersize=8)
            near = sum(abs(x - a) < 0.12 and abs(y - b) < 0.012 for a, b in placed)
            right = x > 0.85
            panel.annotate(
                arm,
                (x, y),
                xytext=(-8 if right else 8, 3 - 11 * near),
                textcoords="offset points",
                ha="right" if right else "left",
                fontsize=8,
                color=colour,
            )
            placed.append((x, y))
        panel.set_xlim(-0.03, 1.05)
        panel.set_xlabel("share of uploads whose user a fully informed attacker names (dotted: guessing)")
        panel.set_ylabel(y_label)
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure)
        figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


__all__ = ["plot_tradeoff"]
