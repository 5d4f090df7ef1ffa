"""Localisation measures against heatmaps and masks small enough to be counted."""

import numpy as np
import pytest


pytest.importorskip("sklearn")

from trainers.evaluation.localisation import (  # noqa: E402
    average_precision,
    best_threshold,
    box_iou,
    boxes_above,
    energy_in_mask,
    localisation,
    mask_boxes,
    mean_average_precision,
    patch_coverage,
    pointing_hits,
    saliency_auc,
    shown_concepts,
)


def blob(top, left, height, width, size=8):
    mask = np.zeros((size, size), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


MASK = blob(2, 3, 2, 4)


def test_a_perfect_heatmap():
    result = localisation(MASK[None].astype(float), MASK[None], np.array([0.9]))
    values = (result.pointing, result.energy, result.mean_iou, result.share_at_half, result.average_precision)
    assert values == (1.0, 1.0, 1.0, 1.0, 1.0) and (result.n, result.threshold) == (1, 0.6)


def test_pointing():
    peak = np.zeros((3, 8, 8))
    peak[0, 2, 3], peak[1, 7, 7] = 1.0, 1.0
    peak[2, 3, 5:8] = 1.0  # a patch of three pixels, two of them inside
    assert pointing_hits(peak, np.stack([MASK] * 3)) == pytest.approx([1.0, 0.0, 2 / 3])


def test_energy():
    heatmap = np.ones((2, 8, 8))
    heatmap[0][MASK] = 3.0
    heatmap[1] = 0.0
    assert energy_in_mask(heatmap, np.stack([MASK] * 2)) == pytest.approx([24 / (24 + 56), 8 / 64])


def test_boxes():
    assert mask_boxes(np.stack([MASK, np.zeros_like(MASK)])).tolist() == [[3, 2, 7, 4], [0, 0, 0, 0]]
    heatmap = np.where(MASK, 1.0, 0.5)[None]
    assert boxes_above(heatmap).tolist() == [[3, 2, 7, 4]] and boxes_above(heatmap, 0.5).tolist() == [[0, 0, 8, 8]]
    heatmap[0, 7, 0] = 0.7
    assert boxes_above(heatmap).tolist() == [[0, 2, 7, 8]], "one outlier widens the box"


def test_an_empty_heatmap_has_an_empty_box():
    empty = np.zeros((1, 4, 6))
    assert boxes_above(empty).tolist() == [[0, 0, 0, 0]]
    found = localisation(empty, np.ones((1, 4, 6), dtype=bool), probabilities=np.ones(1))
    assert found.mean_iou == 0


def test_iou():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4], [0, 0, 0, 0]])
    others = np.array([[0, 0, 4, 4], [2, 2, 6, 6], [4, 0, 8, 4], [0, 0, 0, 0]])
    assert box_iou(boxes, others) == pytest.approx([1.0, 4 / 28, 0.0, 0.0])


def test_average_precision():
    ious, probabilities = np.array([0.8, 0.2, 0.6, 0.1]), np.array([0.9, 0.8, 0.7, 0.6])
    # hits at ranks 1 and 3: precision 1 and 2/3, each worth a quarter of the four boxes
    assert average_precision(ious, probabilities) == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(ious, -probabilities) == pytest.approx((1 / 2 + 2 / 4) / 4)
    assert average_precision(ious * 0, probabilities) == 0.0
    assert mean_average_precision(ious, probabilities, np.array([0, 0, 1, 1])) == pytest.approx((1 / 2 + 1 / 2) / 2)


def test_saliency():
    foreground = np.stack([MASK, MASK, np.ones_like(MASK)])
    saliency = np.stack([MASK * 1.0, -1.0 * MASK, MASK * 1.0])
    assert saliency_auc(saliency, foreground) == pytest.approx(0.5), "the third image has no background"
    assert np.isnan(saliency_auc(saliency[2:], foreground[2:]))


def test_patches():
    assert patch_coverage(MASK[None], (4, 4))[0].tolist() == [
        [0, 0, 0, 0],
        [0, 0.5, 1, 0.5],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
    ]
    with pytest.raises(ValueError, match="3 x 3 does not divide 8 x 8"):
        patch_coverage(MASK[None], (3, 3))


def test_best_threshold():
    heatmap = np.where(MASK, 1.0, 0.0) + np.where(blob(1, 2, 4, 6), 0.7, 0.0)
    assert best_threshold(heatmap[None], MASK[None]) == pytest.approx(0.45)
    assert best_threshold(heatmap[None], MASK[None], thresholds=(0.1, 0.3)) == 0.1


def test_shown_concepts():
    parts = np.zeros((2, 2, 8, 8), dtype=bool)
    parts[0, 0], parts[1, 0, 0, 0], parts[1, 1] = MASK, True, MASK
    concepts = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    part_of = [0, 1, 0, -1]
    assert [found.tolist() for found in shown_concepts(parts, part_of, concepts)] == [[0, 1, 1, 1], [0, 0, 1, 2]]
    assert [found.tolist() for found in shown_concepts(parts, part_of, concepts, min_pixels=2)] == [[0, 1], [0, 1]]


def test_bad_heatmaps():
    with pytest.raises(ValueError, match="both must be"):
        localisation(np.ones((1, 4, 4)), MASK[None])
    with pytest.raises(ValueError, match="not negative"):
        localisation(-np.ones((1, 8, 8)), MASK[None])
