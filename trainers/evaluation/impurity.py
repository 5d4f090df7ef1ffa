"""Oracle and niche impurity (Espinosa Zarlenga et al., arXiv 2301.10367): what a concept's representation tells of
other concepts, beyond what the concepts themselves tell of one another.

Representations are `(n, M)` or `(n, M, d)`, a number or a vector for each concept, truth `(n, M)` of 0 and 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from .concepts import sklearn_metrics


class Predictor(Protocol):
    """What [`predictability`] and [`niche_impurity`] fit: one model for all concepts at once."""

    def fit(self, inputs: np.ndarray, truth: np.ndarray) -> Any:
        """Of `(n, features)` and `(n, M)`."""

    def predict_proba(self, inputs: np.ndarray) -> np.ndarray:
        """Probabilities `(n, M)`."""


@dataclass(frozen=True)
class OracleImpurity:
    """OIS, and the two matrices `(M, M)` behind it: AUC of predicting concept j (column) from concept i (row), from
    its representation and from its truth; NaN where concept j is constant."""

    score: float
    representations: np.ndarray
    oracle: np.ndarray


def oracle_impurity(
    representations: np.ndarray,
    truth: np.ndarray,
    *,
    predictor: Callable[[], Predictor] | None = None,
    test_share: float = 0.2,
    seed: int = 0,
) -> OracleImpurity:
    """
    OIS: 2 / M times the Frobenius norm of the difference between what concepts' representations and what their truths
    predict. 0: nothing more and nothing less; `sqrt(1 - 1 / M)` where each representation holds all of M independent
    concepts.

    Args:
        predictor: what predicts all concepts from one. `None`: an MLP with 32 hidden units, the paper's, fitted for
            all the concepts together.
        test_share: of the examples, on which AUC is taken.

    Raises:
        ValueError: shapes that do not fit, or fewer than two concepts that vary.
    """
    representations, truth = _checked(representations, truth)
    predictor = predictor or _mlp((32,), seed)
    options = {"predictor": predictor, "test_share": test_share, "seed": seed}
    found = predictability(representations, truth, **options)
    oracle = predictability(truth[:, :, None].astype(np.float64), truth, **options)
    np.fill_diagonal(oracle, np.where(np.isnan(np.diag(oracle)), np.nan, 1.0))
    varied = ~np.isnan(oracle).any(axis=0)
    difference = (found - oracle)[np.ix_(varied, varied)]
    return OracleImpurity(float(2 / varied.sum() * np.linalg.norm(difference)), found, oracle)


def predictability(
    representations: np.ndarray,
    truth: np.ndarray,
    *,
    predictor: Callable[[], Predictor],
    test_share: float = 0.2,
    seed: int = 0,
) -> np.ndarray:
    """`(M, M)`: AUC, on held-out examples, of concept j by a predictor that sees the representation of concept i; NaN
    in the columns of concepts that are constant there."""
    representations, truth = _checked(representations, truth)
    train, test = _split(len(truth), test_share, seed)
    matrix = np.full((truth.shape[1],) * 2, np.nan)
    for concept in range(truth.shape[1]):
        model = predictor()
        model.fit(representations[train, concept], truth[train])
        matrix[concept] = _aucs(truth[test], model.predict_proba(representations[test, concept]))
    return matrix


def niche_impurity(
    representations: np.ndarray,
    truth: np.ndarray,
    *,
    predictor: Callable[[], Predictor] | None = None,
    step: float = 0.05,
    test_share: float = 0.2,
    seed: int = 0,
) -> float:
    """
    NIS: how well a predictor of all representations knows a concept without those that correlate with it.

    For a threshold t, the niche of a concept are the representations whose correlation with its truth exceeds t in
    size (the largest over a vector's entries); with them set to 0, the AUC of the concept is taken, and averaged over
    the concepts. The score is the mean of that over t in [0, 1), by trapezia. One half: what a concept's niche does
    not say, nothing says; above that, it leaks in pieces that correlate little. The authors' code integrates to
    1 - `step` without dividing by that length, so theirs is (1 - step) times ours.

    Args:
        predictor: of all concepts from all representations. `None`: an MLP with two layers of 20, the authors'.
    """
    representations, truth = _checked(representations, truth)
    train, test = _split(len(truth), test_share, seed)
    model = (predictor or _mlp((20, 20), seed))()
    model.fit(representations[train].reshape(len(train), -1), truth[train])
    relation = np.abs(correlation(representations[train], truth[train])).max(axis=1)  # (M, M): whose, with which
    thresholds = np.arange(0.0, 1.0, step)
    scores = []
    for threshold in thresholds:
        predicted = np.zeros((len(test), truth.shape[1]))
        for concept in range(truth.shape[1]):
            kept = (relation[:, concept] <= threshold)[None, :, None]
            seen = np.where(kept, representations[test], 0.0).reshape(len(test), -1)
            predicted[:, concept] = model.predict_proba(seen)[:, concept]
        scores.append(np.nanmean(_aucs(truth[test], predicted)))
    return float(np.trapezoid(scores, thresholds) / (thresholds[-1] - thresholds[0]))


def correlation(representations: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pearson's, `(M, d, M)`, of each entry of each representation with each concept; 0 where one is constant."""
    inputs = representations.reshape(len(truth), -1).astype(np.float64)
    inputs, truth = inputs - inputs.mean(axis=0), truth - truth.mean(axis=0)
    size = np.linalg.norm(inputs, axis=0)[:, None] * np.linalg.norm(truth, axis=0)[None]
    found = np.where(size > 1e-12, inputs.T @ truth / np.maximum(size, 1e-12), 0.0)
    return found.reshape(*representations.shape[1:], truth.shape[1])


def _mlp(hidden: tuple[int, ...], seed: int) -> Callable[[], Predictor]:
    sklearn_metrics()  # for its ImportError
    from sklearn.neural_network import MLPClassifier

    return lambda: MLPClassifier(hidden, random_state=seed, max_iter=1000, early_stopping=False)


def _split(count: int, test_share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    order = np.random.default_rng(seed).permutation(count)
    held_out = max(1, round(test_share * count))
    return order[held_out:], order[:held_out]


def _aucs(truth: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """`(M,)`, column by column; NaN where the truth is constant."""
    metrics = sklearn_metrics()
    return np.array(
        [metrics.roc_auc_score(t, s) if t.min() != t.max() else np.nan for t, s in zip(truth.T, scores.T, strict=True)]
    )


def _checked(representations: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As `(n, M, d)` and `(n, M)` of int."""
    representations, truth = np.asarray(representations), np.asarray(truth).astype(int)
    if truth.ndim != 2 or representations.shape[:2] != truth.shape or truth.shape[1] < 2:
        raise ValueError(
            f"representations {representations.shape} and truth {truth.shape}: they must be (n, M) or (n, M, d), and "
            "(n, M), with M at least 2."
        )
    return representations.reshape(*truth.shape, -1), truth


__all__ = ["OracleImpurity", "Predictor", "correlation", "niche_impurity", "oracle_impurity", "predictability"]
