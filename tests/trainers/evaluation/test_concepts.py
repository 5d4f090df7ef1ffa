"""Concept measures against closed forms."""

import numpy as np
import pytest


pytest.importorskip("sklearn")

from trainers.evaluation.concepts import (  # noqa: E402
    accuracy_at_nec,
    concept_alignment,
    concept_scores,
    effective_concepts,
    k_medoids,
    leakage,
    random_concepts,
    shift,
    sparsified,
    top1,
    worst_group,
)


def test_scores_of_concepts():
    truth = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 1], [0, 0, 0]])
    probabilities = np.array([[0.9, 0.1, 0.2], [0.6, 0.2, 0.6], [0.7, 0.3, 0.9], [0.1, 0.4, 0.4]])
    scores = concept_scores(probabilities, truth)
    assert scores.accuracy == pytest.approx(9 / 12)
    # concept 0: three of four pairs in order; concept 1 is constant; concept 2: two of four
    assert scores.auc == pytest.approx((0.75 + 0.5) / 2) and scores.auc_concepts == 2
    # concept 0: two hits, one false alarm; concept 1 is neither there nor predicted; concept 2: one hit, one of each
    assert scores.f1 == pytest.approx((0.8 + 0.5) / 2)
    assert np.isnan(concept_scores(probabilities, np.ones((4, 3))).auc)
    with pytest.raises(ValueError, match="both must be"):
        concept_scores(probabilities, truth[:2])


def test_task_and_shift():
    scores, labels = np.eye(3)[[0, 1, 2, 0]], np.array([0, 1, 0, 0])
    assert top1(scores, labels) == 0.75
    assert shift(0.75, 0.5).drop == pytest.approx(0.25)


def test_worst_group():
    labels, backgrounds = np.array([0, 0, 0, 1, 1, 1]), np.array([0, 0, 1, 1, 1, 0])
    scores = np.eye(2)[[0, 0, 0, 1, 0, 0]]
    assert worst_group(scores, labels, backgrounds) == (0.0, (1, 0))
    assert worst_group(scores, labels, backgrounds, min_examples=2) == (0.5, (1, 1))
    with pytest.raises(ValueError, match="No group has 9"):
        worst_group(scores, labels, backgrounds, min_examples=9)


def test_effective_concepts():
    weight = np.array([[2.0, 0.0, -0.1, 1.0], [0.0, 0.0, 0.5, 0.001]])
    assert effective_concepts(weight) == 2.5
    assert effective_concepts(weight, threshold=0.01) == 2.0
    assert effective_concepts(7 * weight, threshold=0.01) == 2.0, "the scale of a head says nothing"
    sparse = sparsified(weight, 1)
    assert sparse.tolist() == [[2.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    assert effective_concepts(sparsified(np.ones((4, 10)), 2.5)) == 2.5


def test_accuracy_at_nec():
    rng = np.random.default_rng(0)
    weight = np.concatenate([10 * np.eye(5), rng.normal(size=(5, 20))], axis=1)
    labels = np.arange(5).repeat(20)
    activations = np.concatenate([np.eye(5)[labels], rng.normal(size=(100, 20))], axis=1)
    accuracy = accuracy_at_nec(activations, labels, weight, np.zeros(5), necs=(1, 25))
    assert accuracy[1] == 1.0 > accuracy[25]


def test_leakage():
    rng = np.random.default_rng(0)
    labels = np.arange(400) % 4
    truth = np.stack([labels % 2, labels // 2], axis=1).astype(float)

    def head(activations):  # reads the concepts' bits
        expected = np.array([[0, 0], [1, 0], [0, 1], [1, 1]])
        return -((activations[:, None] - expected) ** 2).sum(axis=-1)

    honest = leakage(head, np.where(truth == 1, 0.8, 0.2), labels, truth=truth)
    assert (honest.predicted, honest.hard, honest.true, honest.chance) == (1.0, 1.0, 1.0, 0.25)
    assert honest.shuffled == pytest.approx(0.25, abs=0.08)

    def leaky_head(activations):  # one concept says all, in its third digit
        return -np.abs(activations[:, :1] * 100 - 60 - np.arange(4))

    leaky = leakage(leaky_head, np.stack([0.6 + labels / 100, rng.random(400)], axis=1), labels)
    assert leaky.predicted == 1.0 and leaky.hard == pytest.approx(0.25) and leaky.true is None


def test_random_concepts_keep_their_norms():
    embeddings = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    drawn = random_concepts(embeddings, 1)
    assert drawn.dtype == np.float32
    assert np.linalg.norm(drawn, axis=1) == pytest.approx(np.linalg.norm(embeddings, axis=1), rel=1e-5)
    cosine = (drawn * embeddings).sum(axis=1) / np.linalg.norm(embeddings, axis=1) ** 2
    assert np.abs(cosine).max() < 0.5


def test_k_medoids_finds_separate_clusters():
    points = np.concatenate([np.linspace(0, 1, 5), np.linspace(10, 11, 5), np.linspace(20, 21, 5)])
    clusters = k_medoids(np.abs(points[:, None] - points[None]), 3, np.random.default_rng(0))
    assert len(set(clusters)) == 3 and all(len(set(clusters[i : i + 5])) == 1 for i in (0, 5, 10))
    assert len(set(k_medoids(np.abs(points[:, None] - points[None]), 15, np.random.default_rng(0)))) == 15


def test_alignment_tells_concepts_from_noise():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 2, size=(60, 3))
    aligned = concept_alignment(truth + 0.05 * rng.normal(size=truth.shape), truth)
    noise = concept_alignment(rng.normal(size=truth.shape), truth)
    vectors = concept_alignment(truth[..., None] + 0.05 * rng.normal(size=(60, 3, 4)), truth)
    assert aligned == pytest.approx(1.0, abs=1e-6) and vectors == pytest.approx(1.0, abs=1e-6)
    assert noise < 0.85, "many small clusters are pure by themselves, so noise is not at 0"
    assert concept_alignment(truth, truth, max_examples=50) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="0 concepts that vary"):
        concept_alignment(truth, np.ones_like(truth))
