"""Whether a concept's heatmap is on the part that the concept is about.

All functions take whole batches: heatmaps `(n, H, W)`, non-negative, and masks `(n, H, W)` of bool, one pair for each
concept that an image has and shows, see [`shown_concepts`]. Boxes are `(n, 4)`: left, top, right, bottom in pixels,
right and bottom exclusive; nothing to enclose gives an empty box at 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import sklearn_metrics


PAPER_THRESHOLD = 0.6  # of a heatmap's own maximum


@dataclass(frozen=True)
class Localisation:
    """Means over `n` pairs of a heatmap and a mask, all in [0, 1].

    `pointing`: the peak is in the mask. `energy`: share of the heatmap's sum that is in the mask, free of a threshold.
    `mean_iou` and `share_at_half`: of the box around what is above `threshold` times the maximum, against the mask's
    box, and how many reach an IoU of 0.5. `average_precision`: at an IoU of 0.5, ranked by the concepts'
    probabilities; None without them.
    """

    pointing: float
    energy: float
    mean_iou: float
    share_at_half: float
    average_precision: float | None
    threshold: float
    n: int


def localisation(
    heatmaps: np.ndarray,
    masks: np.ndarray,
    probabilities: np.ndarray | None = None,
    *,
    threshold: float = PAPER_THRESHOLD,
) -> Localisation:
    """All measures at once, `probabilities` being `(n,)` those of the concepts; ValueError for an empty batch."""
    heatmaps, masks = _checked(heatmaps, masks)
    ious = box_iou(boxes_above(heatmaps, threshold), mask_boxes(masks))
    precision = None if probabilities is None else average_precision(ious, probabilities)
    return Localisation(
        pointing=float(pointing_hits(heatmaps, masks).mean()),
        energy=float(energy_in_mask(heatmaps, masks).mean()),
        mean_iou=float(ious.mean()),
        share_at_half=float((ious >= 0.5).mean()),
        average_precision=precision,
        threshold=threshold,
        n=len(masks),
    )


def shown_concepts(
    parts: np.ndarray, part_of_concept: Sequence[int], concepts: np.ndarray, *, min_pixels: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """
    Which concepts there is something to find of: pairs of an image and a concept that the image has, whose part shows.

    Args:
        parts: `(images, parts, H, W)` of bool, see `trainers.data.part_masks`.
        part_of_concept: the index of the part for each concept; negative ones are left out.
        concepts: `(images, concepts)`, 1 where the image has the concept.
        min_pixels: a part smaller than that does not show.

    Returns:
        Indices of images and of concepts, so that `heatmaps[images, concepts]` and
        `parts[images, part_of_concept[concepts]]` are the pairs that the measures compare.
    """
    part_of = np.asarray(part_of_concept)
    area = np.asarray(parts).sum(axis=(2, 3))  # (images, parts)
    shows = (area[:, np.maximum(part_of, 0)] >= min_pixels) & (part_of >= 0)
    images, which = np.nonzero(shows & (np.asarray(concepts) == 1))
    return images, which


def pointing_hits(heatmaps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """`(n,)`: 1 where the peak lies in the mask. A peak of many pixels counts by the share of them that do."""
    heatmaps, masks = _checked(heatmaps, masks)
    peaks = heatmaps == heatmaps.max(axis=(1, 2), keepdims=True)
    return (peaks & masks).sum(axis=(1, 2)) / peaks.sum(axis=(1, 2))


def energy_in_mask(heatmaps: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """`(n,)`: share of each heatmap's sum inside the mask; that of the mask's area where the heatmap is zero."""
    heatmaps, masks = _checked(heatmaps, masks)
    total = heatmaps.sum(axis=(1, 2))
    inside = (heatmaps * masks).sum(axis=(1, 2))
    return np.where(total > 0, inside / np.where(total > 0, total, 1), masks.mean(axis=(1, 2)))


def boxes_above(heatmaps: np.ndarray, threshold: float = PAPER_THRESHOLD) -> np.ndarray:
    """The one box around everything at or above `threshold` times the maximum, as the paper draws it: a single outlier
    widens it, no largest component is taken. A map of zeros has an empty box."""
    heatmaps = np.asarray(heatmaps, dtype=np.float64)
    above = heatmaps >= threshold * heatmaps.max(axis=(1, 2), keepdims=True)
    return mask_boxes(above & (heatmaps > 0))


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """The box around each mask."""
    masks = np.asarray(masks, dtype=bool)
    sides = []
    for along in (masks.any(axis=1), masks.any(axis=2)):  # (n, W), (n, H)
        first, last = along.argmax(axis=1), along.shape[1] - along[:, ::-1].argmax(axis=1)
        sides.append(np.where(along.any(axis=1), [first, last], 0))
    (left, right), (top, bottom) = sides
    return np.stack([left, top, right, bottom], axis=1)


def box_iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`(n,)`: intersection over union, box by box; 0 where both are empty."""
    boxes, others = np.asarray(boxes, dtype=np.float64), np.asarray(others, dtype=np.float64)
    overlap = np.minimum(boxes[:, 2:], others[:, 2:]) - np.maximum(boxes[:, :2], others[:, :2])
    intersection = overlap.clip(min=0).prod(axis=1)
    areas = [(box[:, 2:] - box[:, :2]).clip(min=0).prod(axis=1) for box in (boxes, others)]
    union = areas[0] + areas[1] - intersection
    return intersection / np.where(union > 0, union, 1)


def average_precision(ious: np.ndarray, probabilities: np.ndarray, *, iou: float = 0.5) -> float:
    """
    AP of one class of boxes, one prediction for each ground truth, ranked by the concept's probability.

    What misses its box is a false positive and its ground truth is never found, so with n pairs and h hits this is
    h / n times the average precision of the ranking.
    """
    hits = np.asarray(ious) >= iou
    if not hits.any():
        return 0.0
    return float(hits.mean() * sklearn_metrics().average_precision_score(hits, np.asarray(probabilities)))


def mean_average_precision(
    ious: np.ndarray, probabilities: np.ndarray, parts: np.ndarray, *, iou: float = 0.5
) -> float:
    """The mean of [`average_precision`] over the parts (or concepts) that `parts` `(n,)` names."""
    ious, probabilities, parts = (np.asarray(values) for values in (ious, probabilities, parts))
    return float(
        np.mean([average_precision(ious[parts == p], probabilities[parts == p], iou=iou) for p in np.unique(parts)])
    )


def saliency_auc(saliency: np.ndarray, foreground: np.ndarray) -> float:
    """
    How well a saliency tells object from background: the ROC-AUC within an image, averaged over the images.

    Args:
        saliency: `(n, ...)`, a value a patch or a pixel.
        foreground: the same shape, bool. Images that are all object or all background do not count; NaN if none does.
    """
    saliency, foreground = (np.asarray(values).reshape(len(values), -1) for values in (saliency, foreground))
    metrics = sklearn_metrics()
    scores = [
        metrics.roc_auc_score(truth, values)
        for values, truth in zip(saliency, foreground.astype(bool))
        if truth.any() and not truth.all()
    ]
    return float(np.mean(scores)) if scores else float("nan")


def patch_coverage(masks: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """`(n, rows, columns)`: the share of each patch of a ViT that a mask covers; ValueError unless it divides."""
    masks, (rows, columns) = np.asarray(masks), grid
    n, height, width = masks.shape
    if height % rows or width % columns:
        raise ValueError(f"A grid of {rows} x {columns} does not divide {height} x {width} pixels.")
    return masks.reshape(n, rows, height // rows, columns, width // columns).mean(axis=(2, 4))


def best_threshold(
    heatmaps: np.ndarray, masks: np.ndarray, *, thresholds: Sequence[float] = tuple(np.arange(1, 20) / 20)
) -> float:
    """
    The threshold with the largest mean IoU of boxes, the smallest of equals; to be chosen on data that is not tested.

    A fixed one is known to decide comparisons of such heatmaps (Choe et al., arXiv 2001.07437).
    """
    heatmaps, masks = _checked(heatmaps, masks)
    truth = mask_boxes(masks)
    scores = [box_iou(boxes_above(heatmaps, threshold), truth).mean() for threshold in thresholds]
    return float(thresholds[int(np.argmax(scores))])


def _checked(heatmaps: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    heatmaps, masks = np.asarray(heatmaps, dtype=np.float64), np.asarray(masks, dtype=bool)
    if heatmaps.shape != masks.shape or heatmaps.ndim != 3 or not len(heatmaps):
        raise ValueError(f"Heatmaps {heatmaps.shape} and masks {masks.shape}: both must be (n, H, W), n at least 1.")
    if not np.isfinite(heatmaps).all() or heatmaps.min() < 0:
        raise ValueError("Heatmaps must be finite and not negative; shift or clip similarities first.")
    return heatmaps, masks


__all__ = [
    "Localisation",
    "average_precision",
    "best_threshold",
    "box_iou",
    "boxes_above",
    "energy_in_mask",
    "localisation",
    "mask_boxes",
    "mean_average_precision",
    "patch_coverage",
    "pointing_hits",
    "saliency_auc",
    "shown_concepts",
]
