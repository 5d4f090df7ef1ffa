"""Heads that are trained to be sparse, for ANEC: the accuracy that so many concepts a class allow (Srivastava et al.,
arXiv 2408.01432)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .concepts import effective_concepts, sklearn_metrics, sparsified, top1


ANEC = (5, 10, 15, 20, 25, 30)  # the numbers of effective concepts that ANEC averages over


@dataclass(frozen=True)
class SparseHead:
    """A linear head with `nec` weights a class that are not zero, on average: `weight (K, M)`, `bias (K,)`. `strength`
    is scikit-learn's C of the solution that it was cut from, `path_nec` how many that one had."""

    nec: float
    weight: np.ndarray
    bias: np.ndarray
    strength: float
    path_nec: float

    def __call__(self, activations: np.ndarray) -> np.ndarray:
        """Class scores `(n, K)`."""
        return np.asarray(activations) @ self.weight.T + self.bias


@dataclass(frozen=True)
class AccuracyAtNec:
    """Top-1 on the test set for each number of effective concepts, and their mean."""

    by_nec: dict[float, float]
    mean: float
    heads: list[SparseHead]


def sparse_heads(
    activations: np.ndarray,
    labels: np.ndarray,
    necs: Sequence[float] = ANEC,
    *,
    weakest: float = 1e-4,
    strongest: float = 1e2,
    steps: int = 25,
    max_iter: int = 200,
    tolerance: float = 1e-3,
    seed: int = 0,
) -> list[SparseHead]:
    """
    A head for each of `necs`, by multinomial logistic regression with an L1 penalty (SAGA) along a path of penalties.

    Each is cut from the first solution with at least that many weights, or from the last one: the smallest of them are
    set to zero until exactly `nec * K` are left, as VLG-CBM does; biases are free. Solutions start where the last one
    ended, and the path ends when the largest NEC is reached.

    Args:
        activations: `(n, M)`, of the training set, standardised as the head is to see them.
        weakest, strongest, steps: the path of C, in equal ratios.

    Raises:
        ValueError: a NEC that is not positive, or one class.
    """
    activations, labels = np.asarray(activations, dtype=np.float64), np.asarray(labels)
    classes = np.unique(labels)
    if not necs or min(necs) <= 0 or len(classes) < 2 or not np.array_equal(classes, np.arange(len(classes))):
        raise ValueError(
            f"necs={list(necs)}, classes {classes.tolist()}: necs must be positive, classes 0..K-1, at least two."
        )
    wanted = sorted(min(nec, activations.shape[1]) for nec in necs)
    path = _solutions(activations, labels, np.geomspace(weakest, strongest, steps), max_iter, tolerance, seed)
    heads, (strength, weight, bias) = [], next(path)
    for nec in wanted:
        while effective_concepts(weight) < nec:
            following = next(path, None)
            if following is None:
                break
            strength, weight, bias = following
        heads.append(SparseHead(nec, sparsified(weight, nec), bias, strength, effective_concepts(weight)))
    return heads


def accuracy_of_sparse_heads(
    heads: Sequence[SparseHead], activations: np.ndarray, labels: np.ndarray
) -> AccuracyAtNec:
    """ANEC of heads on another set, `activations` being standardised as those that they were trained on."""
    found = {head.nec: top1(head(activations), labels) for head in heads}
    return AccuracyAtNec(found, float(np.mean(list(found.values()))), list(heads))


def _solutions(activations, labels, strengths, max_iter, tolerance, seed):
    """C, weights `(K, M)` and biases `(K,)` along the path, each from the one before."""
    sklearn_metrics()  # for its ImportError
    import warnings

    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    options = {"l1_ratio": 1.0, "solver": "saga", "max_iter": max_iter, "tol": tolerance, "random_state": seed}
    model = LogisticRegression(**options, warm_start=True)
    for strength in strengths:
        model.set_params(C=float(strength))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a point of the path; the next goes on from it
            model.fit(activations, labels)
        weight, bias = model.coef_.copy(), model.intercept_.copy()
        if len(weight) == 1:  # two classes: what speaks for one speaks against the other
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        yield float(strength), weight, bias


__all__ = ["ANEC", "AccuracyAtNec", "SparseHead", "accuracy_of_sparse_heads", "sparse_heads"]
