"""From columns of the plan to what a person can look at: heatmaps in pixels, boxes, records."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass
class ConceptRecord:
    """One concept's part in the prediction for one image.

    Args:
        concept: its name.
        index: its place among the concepts.
        probability: of the concept, after interventions.
        contribution: what it adds to the logit of `label`; over all concepts, plus the classifier's bias, these sum to
            that logit.
        label: the class that is explained.
        box: `(left, top, right, bottom)` in pixels, right and bottom outside, around everything at or above the
            threshold. `None` where the heatmap is empty.
        heatmap: `(height, width)`, the map scaled to a maximum of 1 and multiplied by the probability: transport
            gives absent concepts a column too, and scaled alone it would look as sure as that of a present one.
    """

    concept: str
    index: int
    probability: float
    contribution: float
    label: str
    box: tuple[int, int, int, int] | None
    heatmap: torch.Tensor


def heatmaps_in_pixels(
    maps: torch.Tensor,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    *,
    probabilities: torch.Tensor | None = None,
) -> torch.Tensor:
    """`maps (batch, N, M)`, not negative, to `(batch, M, height, width)` in fp32, bilinear, each with maximum 1, or
    its concept's probability `(batch, M)` where these are given. A map of zeros stays one."""
    batch, _, count = maps.shape
    maps = maps.detach().float().mT.reshape(batch, count, *grid)
    # Columns of a plan are tiny numbers; scaled first, none of them is lost.
    maps = maps / maps.amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    pixels = F.interpolate(maps, size=image_size, mode="bilinear", align_corners=False)
    pixels = pixels / pixels.amax((2, 3), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return pixels if probabilities is None else pixels * probabilities.detach().float()[:, :, None, None]


def enclosing_box(heatmap: torch.Tensor, threshold: float = 0.6) -> tuple[int, int, int, int] | None:
    """`(left, top, right, bottom)` of the one box around all of a heatmap `(height, width)` at or above `threshold` of
    its maximum; right and bottom are the first pixels outside. `None` for a map of zeros."""
    highest = heatmap.max()
    if not highest > 0:
        return None
    inside = heatmap >= threshold * highest
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def concept_records(
    maps: torch.Tensor,
    probabilities: torch.Tensor,
    contributions: torch.Tensor,
    *,
    names: Sequence[str],
    label: str,
    grid: tuple[int, int],
    image_size: tuple[int, int],
    indices: Sequence[int],
    threshold: float = 0.6,
) -> list[ConceptRecord]:
    """Records of the concepts `indices` of one image: `maps (N, M)`, `probabilities (M,)`, `contributions (M,)`."""
    chosen = torch.as_tensor(list(indices), device=maps.device)
    pixels = heatmaps_in_pixels(maps[None, :, chosen], grid, image_size, probabilities=probabilities[None, chosen])[
        0
    ].cpu()  # (concepts, height, width)
    return [
        ConceptRecord(
            concept=names[index],
            index=index,
            probability=float(probabilities[index]),
            contribution=float(contributions[index]),
            label=label,
            box=enclosing_box(heatmap, threshold),
            heatmap=heatmap,
        )
        for index, heatmap in zip((int(i) for i in indices), pixels, strict=True)
    ]


__all__ = ["ConceptRecord", "concept_records", "enclosing_box", "heatmaps_in_pixels"]
