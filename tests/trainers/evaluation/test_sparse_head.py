"""Heads trained to be sparse: the optimality conditions of their penalty, and how many weights they keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


pytest.importorskip("sklearn")

from trainers.evaluation.concepts import accuracy_at_nec, effective_concepts, top1  # noqa: E402
from trainers.evaluation.sparse_head import _solutions, accuracy_of_sparse_heads, sparse_heads  # noqa: E402


def noisy(classes=4, examples=160, extra=6, seed=0):
    """One concept for each class, and concepts of no use, all standardised."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(examples) % classes)
    useful = np.eye(classes)[labels] + 0.3 * rng.standard_normal((examples, classes))
    concepts = np.c_[useful, rng.standard_normal((examples, extra))]
    return (concepts - concepts.mean(0)) / concepts.std(0), labels


@pytest.mark.parametrize("classes", [2, 4])
def test_solutions_of_the_path_meet_the_conditions_of_an_l1_penalty(classes):
    activations, labels = noisy(classes)
    for strength, weight, bias in _solutions(activations, labels, [0.02, 0.1], 20_000, 1e-9, 0):
        scores = activations @ weight.T + bias
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        slope = strength * (shares - np.eye(classes)[labels]).T @ activations  # (K, M), of the unpenalised part
        if classes == 2:  # one row was fitted, and is handed out as two halves
            slope, weight = slope[1:] - slope[:1], 2 * weight[1:]
            slope = slope / 2
        assert np.abs(slope).max() <= 1 + 1e-4
        np.testing.assert_allclose(slope[weight != 0], -np.sign(weight[weight != 0]), atol=1e-4)
        assert 0 < (weight != 0).sum() < weight.size
        np.testing.assert_allclose((shares - np.eye(classes)[labels]).sum(0), 0, atol=1e-4)  # biases are free


def test_one_concept_a_class_is_enough_where_there_is_one():
    activations, labels = noisy()
    heads = sparse_heads(activations, labels, (1, 3, 5))
    found = accuracy_of_sparse_heads(heads, activations, labels)
    assert list(found.by_nec) == [1, 3, 5] and found.by_nec[1] > 0.9
    assert (np.abs(heads[0].weight).argmax(1) == np.arange(4)).all() and effective_concepts(heads[0].weight) == 1
    assert found.mean == pytest.approx(np.mean(list(found.by_nec.values())))
    assert heads[0].strength < heads[-1].strength


def test_it_is_better_than_a_dense_head_that_was_cut():
    activations, labels = noisy(classes=6, examples=240, extra=40, seed=1)
    test, truth = noisy(classes=6, examples=600, extra=40, seed=2)
    dense = sparse_heads(activations, labels, (46,), strongest=1e4)[0]
    cut = accuracy_at_nec(test, truth, dense.weight, dense.bias, (1,))[1]
    trained = accuracy_of_sparse_heads(sparse_heads(activations, labels, (1,)), test, truth).by_nec[1]
    assert trained > cut - 0.02


def test_more_than_there_are_is_all_there_are_and_bad_questions_are_refused():
    activations, labels = noisy()
    (head,) = sparse_heads(activations, labels, (30,))
    assert head.nec == 10 and head.path_nec <= 10
    assert top1(head(activations), labels) == accuracy_of_sparse_heads([head], activations, labels).mean
    for bad in ({"necs": (0,)}, {"necs": ()}, {"labels": labels + 1}, {"labels": labels * 0}):
        with pytest.raises(ValueError, match="necs="):
            sparse_heads(activations, **({"labels": labels} | bad))


@given(seed=st.integers(0, 1000), nec=st.sampled_from([0.5, 1, 1.5, 2, 3]))
@settings(max_examples=8, deadline=None)
def test_exactly_as_many_weights_are_left(seed, nec):
    activations, labels = noisy(seed=seed)
    (head,) = sparse_heads(activations, labels, (nec,))
    assert (head.weight != 0).sum() == round(nec * 4) and head.path_nec >= nec
