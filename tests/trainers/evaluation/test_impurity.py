"""Impurity scores against loops over their definitions, and where their value is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("sklearn")

from trainers.evaluation.impurity import (  # noqa: E402
    correlation,
    niche_impurity,
    oracle_impurity,
    predictability,
)


class LeastSquares:
    """A predictor whose solution is known: linear, with an intercept."""

    def fit(self, inputs, truth):
        self.weight = np.linalg.lstsq(np.c_[inputs, np.ones(len(inputs))], truth.astype(float), rcond=None)[0]

    def predict_proba(self, inputs):
        return np.c_[inputs, np.ones(len(inputs))] @ self.weight


def every_combination(concepts, repeats):
    """All combinations of concepts equally often: independent, and each present in half of the examples."""
    return np.array(list(itertools.product([0, 1], repeat=concepts)) * repeats)


def pairs_in_order(truth, scores):
    """AUC by its definition."""
    pairs = [(p, n) for p in scores[truth == 1] for n in scores[truth == 0]]
    return np.mean([float(p > n) + 0.5 * float(p == n) for p, n in pairs])


def split(count, seed=0):
    order = np.random.default_rng(seed).permutation(count)
    return order[round(0.2 * count) :], order[: round(0.2 * count)]


def drawn(seed, examples=60, concepts=3, width=None):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 2, (examples, concepts))
    noise = rng.standard_normal((examples, concepts) if width is None else (examples, concepts, width))
    return (truth if width is None else truth[..., None]) + noise, truth


def test_the_oracle_score_is_its_definition():
    representations, truth = drawn(0, width=2)
    found = oracle_impurity(representations, truth, predictor=LeastSquares)
    train, test = split(len(truth))
    expected, oracle = np.zeros((3, 3)), np.ones((3, 3))
    for i, j in itertools.product(range(3), range(3)):
        for matrix, inputs in ((expected, representations[:, i]), (oracle, truth[:, i : i + 1])):
            if matrix is oracle and i == j:
                continue
            model = LeastSquares()
            model.fit(inputs[train], truth[train][:, [j]])
            matrix[i, j] = pairs_in_order(truth[test, j], model.predict_proba(inputs[test])[:, 0])
    np.testing.assert_allclose(found.representations, expected, atol=1e-9)
    np.testing.assert_allclose(found.oracle, oracle, atol=1e-9)
    assert found.score == pytest.approx(2 / 3 * np.sqrt(((expected - oracle) ** 2).sum()))


def test_the_niche_score_is_its_definition():
    representations, truth = drawn(1, examples=80, width=2)
    train, test = split(len(truth))
    model = LeastSquares()
    model.fit(representations[train].reshape(len(train), -1), truth[train])
    scores, thresholds = [], np.arange(0.0, 1.0, 0.05)
    for threshold in thresholds:
        aucs = []
        for concept in range(3):
            seen = representations[test].copy()
            for other, entry in itertools.product(range(3), range(2)):
                related = np.corrcoef(representations[train, other, entry], truth[train, concept])[0, 1]
                if abs(related) > threshold:
                    seen[:, other] = 0.0
            predicted = model.predict_proba(seen.reshape(len(test), -1))[:, concept]
            aucs.append(pairs_in_order(truth[test, concept], predicted))
        scores.append(np.mean(aucs))
    area = sum((a + b) / 2 for a, b in itertools.pairwise(scores)) / (len(scores) - 1)
    assert niche_impurity(representations, truth, predictor=LeastSquares) == pytest.approx(area)


def test_concepts_that_are_their_truth_are_pure():
    truth = every_combination(3, 25)
    assert oracle_impurity(truth.astype(float), truth).score == pytest.approx(0, abs=1e-9)
    assert niche_impurity(truth.astype(float), truth) == pytest.approx(0.5, abs=0.1)
    # As correlated as they may be: what the truth itself tells does not count.
    tied = np.c_[truth, truth[:, 0]]
    assert oracle_impurity(tied.astype(float), tied, predictor=LeastSquares).score == pytest.approx(0, abs=1e-9)


def test_a_representation_that_holds_all_concepts_is_as_impure_as_can_be():
    truth = every_combination(3, 50)
    everything = np.repeat(truth[:, None, :], 3, axis=1).astype(float)  # (n, M, M)
    found = oracle_impurity(everything, truth, predictor=LeastSquares)
    np.testing.assert_allclose(found.representations, 1.0)
    # One half off the diagonal would make it sqrt(1 - 1 / 3).
    assert np.abs(found.oracle - np.where(np.eye(3), 1.0, 0.5)).max() < 0.1
    assert found.score == pytest.approx(2 / 3 * np.sqrt(((1 - found.oracle) ** 2).sum()))
    # A number that says two concepts at once.
    both = np.stack([truth[:, 0] + 0.3 * truth[:, 1], truth[:, 1], truth[:, 2]], axis=1)
    matrix = predictability(both, truth, predictor=LeastSquares)
    assert matrix[0, 1] > 0.65 and matrix[1, 0] < 0.6


def test_the_niche_score_finds_what_leaks_in_small_pieces():
    rng = np.random.default_rng(0)
    pieces = rng.standard_normal((3000, 9))
    truth = np.c_[pieces.sum(axis=1) > 0, rng.integers(0, 2, (3000, 9))].astype(int)
    clean = truth[:, :, None] * np.ones(2)
    clean[:, 0] = 0.0  # a predictor that is told has no use for pieces
    leaking = clean.copy()
    leaking[:, 1:, 1] = pieces  # each correlates with the first concept by 0.27 only
    pure = niche_impurity(clean, truth, predictor=LeastSquares)
    assert pure == pytest.approx(0.5, abs=0.03)
    # Of ten concepts one leaks, over the thresholds above 0.27 of all up to 0.95.
    impure = niche_impurity(leaking, truth, predictor=LeastSquares)
    assert impure - pure == pytest.approx(0.5 * (0.95 - 0.27) / 0.95 / 10, abs=0.02) and impure > 0.52


def test_constants_and_shapes():
    representations, truth = drawn(2)
    truth[:, 1] = 0
    found = oracle_impurity(representations, truth, predictor=LeastSquares)
    assert np.isnan(found.oracle[:, 1]).all() and np.isfinite(found.score)
    assert np.isfinite(niche_impurity(representations, truth, predictor=LeastSquares))
    assert (correlation(representations, truth)[..., 1] == 0).all()
    with pytest.raises(ValueError, match="M at least 2"):
        oracle_impurity(representations[:, :1], truth[:, :1])
    with pytest.raises(ValueError, match="they must be"):
        niche_impurity(representations[:5], truth)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 50), shift=st.floats(-5, 5))
@settings(max_examples=6, deadline=None)
def test_the_order_of_concepts_and_the_scale_of_representations_do_not_count(seed, scale, shift):
    representations, truth = drawn(seed)
    found = oracle_impurity(representations, truth, predictor=LeastSquares).score
    assert found == pytest.approx(
        oracle_impurity(scale * representations + shift, truth, predictor=LeastSquares).score, abs=1e-6
    )
    order = np.random.default_rng(seed).permutation(3)
    moved = oracle_impurity(representations[:, order], truth[:, order], predictor=LeastSquares)
    assert found == pytest.approx(moved.score, abs=1e-6) and found >= 0
    niche = niche_impurity(representations, truth, predictor=LeastSquares)
    assert 0 <= niche <= 1
    same = niche_impurity(representations[:, order], truth[:, order], predictor=LeastSquares)
    assert niche == pytest.approx(same, abs=1e-6)
