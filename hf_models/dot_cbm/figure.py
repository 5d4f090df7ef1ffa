"""A prediction and its concepts as one picture."""

from collections.abc import Sequence
from typing import Any

import torch

from .explanation import ConceptRecord


FOR, AGAINST = "#1b7837", "#b2182b"
PRESENT = 0.5


def plot_explanation(
    image: Any, records: Sequence[ConceptRecord], *, title: str | None = None, max_concepts: int = 6
) -> Any:
    """A matplotlib figure: the image with what the model predicts, and a tile for each concept of `records`.

    A tile shows where the concept was seen, as bright as it is probable, with its box if it is more probable than not,
    and says in words and by a bar whether it speaks for the prediction (green) or against it (red).

    Args:
        image: PIL image, array or tensor `(height, width, 3)` in 0..255 or 0..1, or tensor `(3, height, width)`; of
            the size that the heatmaps have.
        records: of one image, as `explain` and the pipeline return them.
        title: above the image. `None`: the class that the records explain.
        max_concepts: tiles at most, the first of the records.
    """
    from matplotlib.figure import Figure

    if not records:
        raise ValueError("there are no records to plot.")
    records, pixels = list(records)[:max_concepts], _pixels(image)
    if pixels.shape[:2] != tuple(records[0].heatmap.shape):
        raise ValueError(
            f"the image has {tuple(pixels.shape[:2])} pixels, the heatmaps {tuple(records[0].heatmap.shape)}: pass "
            "explain(..., image_size=(height, width)) of this image."
        )
    columns = len(records) + 1
    figure = Figure(figsize=(2.3 * columns, 3.5), layout="constrained")
    axes = figure.subplots(2, columns, height_ratios=(8, 1), squeeze=False)
    axes[0, 0].imshow(pixels)
    axes[0, 0].set_title(records[0].label if title is None else title, fontsize=11, fontweight="bold")
    axes[1, 0].text(1.0, 0.5, "speaks against | for", ha="right", va="center", fontsize=8)
    largest = max(max(abs(record.contribution) for record in records), 1e-12)
    for (tile, bar), record in zip(axes[:, 1:].T, records, strict=True):
        _draw_tile(tile, pixels, record)
        _draw_bar(bar, record.contribution / largest)
    for axis in (*axes[0], axes[1, 0]):
        axis.set_axis_off()
    return figure


def describe(record: ConceptRecord) -> str:
    """What a tile says: whether the concept is there, how sure that is, and what it does to the prediction."""
    present = record.probability >= PRESENT
    sure = record.probability if present else 1 - record.probability
    name = record.concept if present else f"no {record.concept}"
    return f"{name} ({sure:.0%})\n{'for' if record.contribution >= 0 else 'against'} {record.contribution:+.2f}"


def _draw_tile(axis: Any, pixels: Any, record: ConceptRecord) -> None:
    """The image in grey under the heatmap, whose opacity is its value."""
    from matplotlib.patches import Rectangle

    heat = record.heatmap.clamp(0, 1).numpy()
    axis.imshow(pixels.mean(-1), cmap="gray", vmin=0, vmax=1)
    axis.imshow(heat, cmap="inferno", vmin=0, vmax=1, alpha=0.75 * heat)
    colour = FOR if record.contribution >= 0 else AGAINST
    if record.box is not None and record.probability >= PRESENT:
        left, top, right, bottom = record.box
        # Pixel i is drawn from i - 0.5 to i + 0.5.
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor="white", linewidth=3))
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=colour, linewidth=1.5))
    axis.set_title(describe(record), fontsize=9, color=colour)


def _draw_bar(axis: Any, share: float) -> None:
    """The contribution as a bar from the middle, as a share of the largest one shown."""
    axis.barh([0], [share], color=FOR if share >= 0 else AGAINST, height=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(xlim=(-1.05, 1.05), ylim=(-0.6, 0.6))
    axis.set_axis_off()


def _pixels(image: Any) -> Any:
    """`(height, width, 3)` in 0..1."""
    import numpy

    if torch.is_tensor(image):
        image = image.detach().cpu().float()
        image = (image.permute(1, 2, 0) if image.shape[0] in (1, 3) else image).numpy()
    elif hasattr(image, "convert"):
        image = numpy.asarray(image.convert("RGB"))
    array = numpy.asarray(image)
    array = array[..., None] if array.ndim == 2 else array
    scaled = array / 255.0 if array.max() > 1 or numpy.issubdtype(array.dtype, numpy.integer) else array
    return numpy.broadcast_to(scaled, (*scaled.shape[:2], 3)).clip(0, 1)


__all__ = ["describe", "plot_explanation"]
