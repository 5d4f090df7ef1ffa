"""The Matryoshka grid: sums, weights, draws and distillation; and beside Sentence Transformers, where it is there."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from trainers.losses import MatryoshkaGridLoss, in_batch_negatives, similarity_kl


FP64 = torch.float64
LAYERS, DIMS = [1, 3], [2, 5, 8]
CELLS = list(itertools.product(LAYERS, DIMS))


def exits(rows=6, dtype=FP64):
    return {layer: torch.randn(rows, 8, dtype=dtype, requires_grad=True) for layer in LAYERS}


def term(queries, documents, layer, dim):
    query, document = (F.normalize(rows[layer][:, :dim], dim=-1) for rows in (queries, documents))
    return F.cross_entropy(query @ document.T / 0.05, torch.arange(len(query)))


@pytest.mark.parametrize("weights", [None, [1, 0, 2, 0.5, 1, 3], [[1, 0, 2], [0.5, 1, 3]]])
def test_it_is_the_weighted_sum_over_all_cells(weights):
    queries, documents = exits(), exits()
    loss = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS, weights=weights)(queries, documents)
    flat = [1.0] * 6 if weights is None else torch.tensor(weights, dtype=FP64).flatten().tolist()
    expected = sum(weight * term(queries, documents, *cell) for weight, cell in zip(flat, CELLS))
    torch.testing.assert_close(loss, expected)
    leaves = [*queries.values(), *documents.values()]
    for got, want in zip(*(torch.autograd.grad(value, leaves) for value in (loss, expected))):
        torch.testing.assert_close(got, want)


def test_any_loss_of_two_embeddings_may_be_the_base():
    queries, documents = exits(), exits(rows=9)
    seen = []

    def base(query, document):
        seen.append((query.shape, document.shape))
        torch.testing.assert_close(query.norm(dim=-1), torch.ones(6, dtype=FP64))
        return (query.sum() - document.sum()) * 0 + query.shape[1]

    assert MatryoshkaGridLoss(base, layers=LAYERS, dims=DIMS)(queries, documents) == 2 * sum(DIMS)
    assert seen == [((6, dim), (9, dim)) for _, dim in CELLS]
    symmetric = MatryoshkaGridLoss(partial(in_batch_negatives, symmetric=True), layers=[3], dims=[8])
    assert symmetric(queries, documents).isfinite()


@pytest.mark.parametrize("cells_per_step", [1, 2, 5])
def test_drawn_cells_are_distinct_and_stand_for_the_grid_on_average(cells_per_step):
    queries, documents = exits(), exits()
    drawn = []

    def base(query, document):
        drawn.append(query.shape[1])
        return in_batch_negatives(query, document)

    loss = MatryoshkaGridLoss(
        base, layers=LAYERS, dims=DIMS, cells_per_step=cells_per_step, generator=torch.Generator().manual_seed(0)
    )
    whole = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS)(queries, documents).item()
    with torch.no_grad():
        values = torch.stack([loss(queries, documents) for _ in range(200)])
    assert len(drawn) == 200 * cells_per_step
    assert abs(values.mean().item() - whole) < 4 * values.std().item() / 14
    assert len(values.unique()) == {1: 6, 2: 15, 5: 6}[cells_per_step]


def test_draws_repeat_with_the_generator():
    queries, documents = exits(), exits()

    def values(seed):
        generator = torch.Generator().manual_seed(seed)
        loss = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS, cells_per_step=2, generator=generator)
        return [loss(queries, documents).item() for _ in range(8)]

    assert values(0) == values(0) != values(1)


def test_distillation_adds_the_divergence_of_every_cell_from_the_largest():
    queries, documents = exits(), exits()
    loss = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS, distill="kl", distill_temperature=0.1)(queries, documents)

    def log_softmax(layer, dim):
        query, document = (F.normalize(rows[layer][:, :dim], dim=-1) for rows in (queries, documents))
        return (query @ document.T / 0.1).log_softmax(-1)

    teacher = log_softmax(3, 8).exp().detach()
    kls = [F.kl_div(log_softmax(*cell), teacher, reduction="batchmean") for cell in CELLS]
    expected = sum(term(queries, documents, *cell) for cell in CELLS) + sum(kls)
    torch.testing.assert_close(loss, expected)
    leaves = [*queries.values(), *documents.values()]
    for got, want in zip(*(torch.autograd.grad(value, leaves) for value in (loss, expected))):
        torch.testing.assert_close(got, want)


def test_rows_of_zeros_are_no_nan():
    queries, documents = exits(dtype=torch.float32), exits(dtype=torch.float32)
    with torch.no_grad():
        queries[1][2] = 0
    loss = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS, distill="kl")(queries, documents)
    loss.backward()
    assert loss.isfinite() and queries[1].grad.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"layers": []}, r"layers=\[\]"),
        ({"dims": [8, 2]}, r"dims=\[8, 2\]"),
        ({"weights": [1.0] * 5}, "5 weights for 2 x 3 cells"),
        ({"cells_per_step": 7, "generator": torch.Generator()}, "must be -1, or from 1 to 6"),
        ({"cells_per_step": 0, "generator": torch.Generator()}, "cells_per_step=0"),
        ({"cells_per_step": 2}, "give a `generator`"),
        ({"distill": "mse"}, "distill='mse' is not known"),
    ],
)
def test_wrong_arguments_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        MatryoshkaGridLoss(**{"layers": LAYERS, "dims": DIMS} | options)


def test_missing_layers_and_too_wide_dims_are_refused():
    loss = MatryoshkaGridLoss(layers=LAYERS, dims=DIMS)
    with pytest.raises(ValueError, match=r"no embeddings of layers \[3\]; given are \[1\]"):
        loss({1: torch.zeros(2, 8)}, exits(2))
    with pytest.raises(ValueError, match="dim=5 is more than the 4"):
        loss({layer: torch.randn(2, 4) for layer in LAYERS}, {layer: torch.randn(2, 4) for layer in LAYERS})


# --- beside Sentence Transformers


class Encoder(nn.Module):
    """What its losses ask of a model: a dict of features to a sentence embedding."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 8, dtype=FP64)

    def forward(self, features):
        return {"sentence_embedding": self.linear(features["rows"])}

    def get_embedding_dimension(self):
        return 8


@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_one_layer_is_the_matryoshka_loss_of_sentence_transformers(weights, negatives):
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    model = Encoder()
    columns = [torch.randn(5, 6, dtype=FP64) for _ in range(2 + negatives)]
    theirs = losses.MatryoshkaLoss(
        model, losses.MultipleNegativesRankingLoss(model, scale=20.0), [2, 5, 8], matryoshka_weights=weights
    )
    expected = theirs([{"rows": rows} for rows in columns], torch.zeros(5))
    query, *documents = (model.linear(rows) for rows in columns)
    loss = MatryoshkaGridLoss(layers=[12], dims=[2, 5, 8], weights=weights)({12: query}, {12: torch.cat(documents)})
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(value, model.parameters()) for value in (loss, expected))):
        torch.testing.assert_close(got, want)


def test_the_divergence_is_the_one_of_similarity_kl():
    queries, documents = exits(), exits()
    pairs = [tuple(F.normalize(rows[3][:, :dim], dim=-1) for rows in (queries, documents)) for dim in (2, 8)]
    grid = MatryoshkaGridLoss(lambda query, document: 0.0, layers=[3], dims=[2, 8], distill="kl")
    torch.testing.assert_close(grid(queries, documents), similarity_kl(*pairs))
