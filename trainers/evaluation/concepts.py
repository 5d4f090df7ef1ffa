"""How good concepts are, how the task does on them, how many a class needs, and whether they leak."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np


Head = Callable[[np.ndarray], np.ndarray]  # activations (n, M) -> class scores (n, K)


@dataclass(frozen=True)
class ConceptScores:
    """Over all concepts: accuracy at 0.5; means over the concepts of AUC and F1, `auc_concepts` being those that are
    not constant in the truth, which AUC needs (NaN if there is none)."""

    accuracy: float
    auc: float
    f1: float
    auc_concepts: int


@dataclass(frozen=True)
class Shift:
    """Top-1 in distribution and under shift, and the difference; all shares."""

    in_distribution: float
    shifted: float
    drop: float


@dataclass(frozen=True)
class Leakage:
    """Top-1 of a head on activations as they are and as they should be worthless, or worth no more than a bit.

    `shuffled`: every concept's activations dealt out anew among the examples; near chance, or the head does not need
    concepts. `hard`: only whether each is above one half; what is lost was carried by degrees, not by concepts.
    `true`: on the true concepts, where they are given. `chance`: of the most frequent class.
    """

    predicted: float
    shuffled: float
    hard: float
    true: float | None
    chance: float


def concept_scores(probabilities: np.ndarray, truth: np.ndarray) -> ConceptScores:
    """Accuracy, macro AUC and macro F1 of `(n, M)` probabilities; concepts that are neither there nor predicted do not
    count for F1. ValueError for other shapes or nothing."""
    probabilities, truth = np.asarray(probabilities), np.asarray(truth).astype(int)
    if probabilities.shape != truth.shape or truth.ndim != 2 or not truth.size:
        raise ValueError(f"probabilities {probabilities.shape} and truth {truth.shape}: both must be (n, M).")
    metrics = sklearn_metrics()
    predicted = (probabilities >= 0.5).astype(int)
    varied = np.flatnonzero(truth.min(axis=0) != truth.max(axis=0))
    aucs = [metrics.roc_auc_score(truth[:, j], probabilities[:, j]) for j in varied]
    counted = np.flatnonzero(truth.any(axis=0) | predicted.any(axis=0))
    f1s = [metrics.f1_score(truth[:, j], predicted[:, j], zero_division=0.0) for j in counted]
    return ConceptScores(
        accuracy=float((predicted == truth).mean()),
        auc=float(np.mean(aucs)) if aucs else float("nan"),
        f1=float(np.mean(f1s)) if f1s else float("nan"),
        auc_concepts=len(aucs),
    )


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of examples whose largest class score `(n, K)` is the label's."""
    return float((np.asarray(scores).argmax(axis=1) == np.asarray(labels)).mean())


def shift(in_distribution: float, shifted: float) -> Shift:
    """The drop between two accuracies; pair the sets where the data allow it, see `read_avatar_parts`."""
    return Shift(in_distribution, shifted, in_distribution - shifted)


def worst_group(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray, *, min_examples: int = 1
) -> tuple[float, tuple[int, int]]:
    """
    The accuracy of the worst group, and which one: a pair of a class and of its entry in `groups`, such as the
    background shown.

    Args:
        min_examples: groups with fewer are passed over: in a handful of examples the worst group is the smallest.

    Raises:
        ValueError: no group is large enough.
    """
    labels, groups = np.asarray(labels), np.asarray(groups)
    correct = np.asarray(scores).argmax(axis=1) == labels
    found = {}
    for pair in sorted(set(zip(labels.tolist(), groups.tolist()))):
        own = (labels == pair[0]) & (groups == pair[1])
        if own.sum() >= min_examples:
            found[pair] = float(correct[own].mean())
    if not found:
        raise ValueError(f"No group has {min_examples} examples.")
    worst = min(found, key=found.get)
    return found[worst], worst


def effective_concepts(weight: np.ndarray, *, threshold: float = 0.0) -> float:
    """NEC, the number of effective concepts: mean number a class of weights `(K, M)` larger in size than `threshold`
    times the largest one; 0 counts what is not zero."""
    size = np.abs(np.asarray(weight))
    return float((size > threshold * size.max()).sum(axis=1).mean())


def sparsified(weight: np.ndarray, nec: float) -> np.ndarray:
    """`weight` with all but its `nec * K` largest entries set to zero, wherever they stand; equal ones by position."""
    weight = np.asarray(weight)
    kept = np.argsort(-np.abs(weight), axis=None, kind="stable")[: round(nec * len(weight))]
    sparse = np.zeros_like(weight)
    sparse.flat[kept] = weight.flat[kept]
    return sparse


def accuracy_at_nec(
    activations: np.ndarray, labels: np.ndarray, weight: np.ndarray, bias: np.ndarray, necs: Sequence[float] = (5,)
) -> dict[float, float]:
    """ANEC-k for each k: top-1 of the head after [`sparsified`], not trained again, so a lower bound of what a head
    trained to be sparse would reach, for which see [`sparse_heads`]. `activations` as the head sees them."""
    return {nec: top1(np.asarray(activations) @ sparsified(weight, nec).T + bias, labels) for nec in necs}


def leakage(
    head: Head,
    activations: np.ndarray,
    labels: np.ndarray,
    *,
    truth: np.ndarray | None = None,
    seed: int = 0,
) -> Leakage:
    """What a head's accuracy rests on, see [`Leakage`]; `activations` `(n, M)` and `truth` are probabilities."""
    activations, labels = np.asarray(activations), np.asarray(labels)
    shuffled = np.random.default_rng(seed).permuted(activations, axis=0)
    hard = (activations >= 0.5).astype(activations.dtype)
    return Leakage(
        predicted=top1(head(activations), labels),
        shuffled=top1(head(shuffled), labels),
        hard=top1(head(hard), labels),
        true=None if truth is None else top1(head(np.asarray(truth, dtype=activations.dtype)), labels),
        chance=float(np.bincount(labels).max() / len(labels)),
    )


def random_concepts(embeddings: np.ndarray, seed: int) -> np.ndarray:
    """Concepts that mean nothing: random directions with the norms of `embeddings` `(M, d)`. A model trained on them
    shows what accuracy needs no concept at all (Srivastava et al., arXiv 2408.01432)."""
    embeddings = np.asarray(embeddings)
    drawn = np.random.default_rng(seed).standard_normal(embeddings.shape)
    norms = np.linalg.norm(embeddings, axis=1, keepdims=True) / np.linalg.norm(drawn, axis=1, keepdims=True)
    return (drawn * norms).astype(embeddings.dtype)


def concept_alignment(
    representations: np.ndarray,
    truth: np.ndarray,
    *,
    num_cluster_counts: int = 10,
    max_examples: int = 1000,
    seed: int = 0,
) -> float:
    """
    CAS, the concept alignment score: how pure clusters of a concept's representation are in the concept's truth.

    For each concept, the representations are clustered by k-medoids for several k from 2 to the number of examples;
    the homogeneity of the truth in the clusters, averaged over k by trapezia, is averaged over the concepts (Espinosa
    Zarlenga et al., arXiv 2209.09056). A constant concept has homogeneity 1 and is left out.

    Args:
        representations: `(n, M)` or `(n, M, d)`, a number or a vector for each concept.
        truth: `(n, M)` of 0 and 1.
        num_cluster_counts: how many k, evenly spaced.
        max_examples: a random subset of that many is clustered; distances take its square.

    Raises:
        ValueError: fewer than 4 examples, or every concept is constant.
    """
    representations, truth = np.asarray(representations, dtype=np.float64), np.asarray(truth)
    metrics, rng = sklearn_metrics(), np.random.default_rng(seed)
    chosen = rng.permutation(len(truth))[:max_examples]
    representations, truth = representations[chosen].reshape(len(chosen), truth.shape[1], -1), truth[chosen]
    varied = np.flatnonzero(truth.min(axis=0) != truth.max(axis=0))
    if len(chosen) < 4 or not len(varied):
        raise ValueError(f"{len(chosen)} examples, {len(varied)} concepts that vary: nothing to align.")
    counts = np.unique(np.linspace(2, len(chosen), num_cluster_counts).round().astype(int))
    scores = []
    for concept in varied:
        points = representations[:, concept]
        distances = np.sqrt(np.maximum(_squared_distances(points), 0))
        purity = [metrics.homogeneity_score(truth[:, concept], k_medoids(distances, k, rng)) for k in counts]
        scores.append(np.trapezoid(purity, counts) / (counts[-1] - counts[0]))
    return float(np.mean(scores))


def k_medoids(distances: np.ndarray, k: int, rng: np.random.Generator, *, max_steps: int = 50) -> np.ndarray:
    """
    Clusters `(n,)` of points with the given `(n, n)` distances, by alternating steps from spread-out medoids: points
    go to the nearest medoid, a cluster's medoid becomes its most central point, until nothing moves.
    """
    n = len(distances)
    medoids = [int(distances.sum(axis=1).argmin())]
    nearest = distances[medoids[0]].copy()
    while len(medoids) < k:  # each far from those before, as k-means++ draws them
        weight = nearest**2
        drawn = rng.choice(n, p=weight / weight.sum()) if weight.sum() > 0 else int(rng.integers(n))
        medoids.append(int(drawn))
        nearest = np.minimum(nearest, distances[drawn])
    for _ in range(max_steps):
        clusters = distances[:, medoids].argmin(axis=1)
        moved = list(medoids)
        for cluster in np.unique(clusters):
            members = np.flatnonzero(clusters == cluster)
            if len(members) > 2:  # of two points either is as central
                moved[cluster] = int(members[distances[np.ix_(members, members)].sum(axis=1).argmin()])
        if moved == medoids:
            break
        medoids = moved
    return distances[:, medoids].argmin(axis=1)


def sklearn_metrics() -> ModuleType:
    """`sklearn.metrics`, imported when a measure needs it; ImportError names the extra that brings it."""
    try:
        from sklearn import metrics
    except ImportError as error:
        raise ImportError("This measure needs scikit-learn: `pip install 'hf-sigma[vision]'`.") from error
    return metrics


def _squared_distances(points: np.ndarray) -> np.ndarray:
    norms = (points**2).sum(axis=1)
    return norms[:, None] + norms[None] - 2 * points @ points.T


__all__ = [
    "ConceptScores",
    "Leakage",
    "Shift",
    "accuracy_at_nec",
    "concept_alignment",
    "concept_scores",
    "effective_concepts",
    "k_medoids",
    "leakage",
    "random_concepts",
    "shift",
    "sklearn_metrics",
    "sparsified",
    "top1",
    "worst_group",
]
