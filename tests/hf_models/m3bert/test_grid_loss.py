"""The loss over the grid is the sum of its cross-entropies, whatever computes it, however a step is split."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.m3bert import M3BertForMaskedLM
from hf_models.m3bert import grid_loss as grid_loss_module
from hf_models.m3bert.grid_loss import chunked_cross_entropy, summed_cross_entropies
from tests.hf_models.m3bert.tiny_m3bert import IDS, KINDS, MASK, tiny


QUIET = {"attention_dropout": 0.0, "embedding_dropout": 0.0}
LABELS = torch.where((IDS % 2 == 1) & (MASK == 1), IDS, -100)
WEIGHTS = [[0.0, 1.0, 2.0, 0.5], [1.0, 0.25, 3.0, 1.0], [1.0, 1.0, 0.0, 4.0]]


@pytest.fixture(params=["kernels", "torch"])
def backend(request, monkeypatch):
    """What computes the cross-entropies; `sigma_kernels` cannot be imported in the second case."""
    if request.param == "torch":
        monkeypatch.setitem(sys.modules, "sigma_kernels", None)
        monkeypatch.setattr(grid_loss_module, "LOGITS_AT_ONCE", 150)  # of 61 classes: two tokens a chunk
    return request.param


def naive(model, ids=IDS, mask=MASK, labels=LABELS):
    """Terms `(layers, dims)` by the logits of every cell in float64."""
    rows = []
    for layer in model.config.mrl_layers:
        cells = [
            model(ids, attention_mask=mask, exit_layer=layer, embed_dim=dim).logits for dim in model.config.mrl_dims
        ]
        rows.append(torch.stack([F.cross_entropy(c.reshape(-1, 61), labels.reshape(-1)) for c in cells]))
    return torch.stack(rows)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_and_its_gradient_are_those_of_twelve_plain_cross_entropies(backend, kind, weights):
    model = tiny(M3BertForMaskedLM, **QUIET, **KINDS[kind], mrl_weights=weights).double().train()
    terms = naive(model)
    expected = (terms * (1.0 if weights is None else torch.tensor(weights, dtype=torch.float64))).sum()
    wanted = gradients(model, expected)
    out = model(IDS, attention_mask=MASK, labels=LABELS)
    assert out.logits is None and terms.shape == (3, 4) and not out.grid_losses.requires_grad
    torch.testing.assert_close(out.grid_losses, terms.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.loss, expected, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(model, out.loss).items():
        limit = 1e-9 if name.startswith("head.") and kind != "tied" else 1e-5  # the encoder's norms compute in fp32
        assert (gradient - wanted[name]).norm() <= limit * wanted[name].norm(), name


def test_labels_with_a_cell_are_the_loss_of_that_cell(backend):
    model = tiny(M3BertForMaskedLM, **QUIET).double()
    terms = naive(model)
    for row, layer in enumerate((2, 4, 6)):
        for column, dim in enumerate((4, 8, 16, 32)):
            out = model(IDS, attention_mask=MASK, labels=LABELS, exit_layer=layer, embed_dim=dim)
            torch.testing.assert_close(out.loss, terms[row, column])
            assert out.grid_losses is None
    only_dim = model(IDS, attention_mask=MASK, labels=LABELS, embed_dim=8)
    torch.testing.assert_close(only_dim.loss, terms[2, 1])


def test_logits_come_outside_of_training_or_when_asked_for():
    model = tiny(M3BertForMaskedLM)
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    whole = model(**inputs).logits
    assert torch.equal(model(**inputs, labels=LABELS).logits, whole)
    assert model(**inputs, labels=LABELS, return_logits=False).logits is None
    model.train()
    assert model(**inputs, labels=LABELS).logits is None
    assert model(**inputs, labels=LABELS, return_logits=True).logits.shape == whole.shape
    assert model(**inputs).logits.shape == whole.shape and model(**inputs).loss is None


@pytest.mark.parametrize("cell", [{}, {"exit_layer": 2, "embed_dim": 8}])
def test_a_batch_without_labels_has_loss_zero_with_a_graph(backend, cell):
    model = tiny(M3BertForMaskedLM).train()
    for count in (None, torch.tensor(5), torch.tensor(0.0), 0):
        out = model(IDS, attention_mask=MASK, labels=torch.full_like(IDS, -100), num_items_in_batch=count, **cell)
        assert out.loss == 0 and out.loss.requires_grad
        model.zero_grad()
        out.loss.backward()
        assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.randoms())
def test_a_step_split_into_micro_batches_has_the_loss_of_the_whole(sizes, random):
    rows = torch.tensor([random.choices(range(3, 61), k=9) for _ in range(sum(sizes) or 1)])
    labels = torch.where(rows % 3 == 0, rows, -100)
    labels[0, 0] = rows[0, 0]
    with torch.no_grad():
        whole = MODEL(rows, labels=labels).loss
        items = (labels != -100).sum()
        parts = zip(rows.split(sizes if sum(sizes) else [1]), labels.split(sizes if sum(sizes) else [1]), strict=True)
        losses = [MODEL(ids, labels=of, num_items_in_batch=items).loss for ids, of in parts if len(ids)]
    torch.testing.assert_close(sum(losses), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_in_value_and_gradient(dtype):
    hidden = torch.randn(7, 8).to(dtype).requires_grad_()
    weight, bias = torch.randn(61, 32).to(dtype).requires_grad_(), torch.randn(61).to(dtype).requires_grad_()
    labels = torch.randint(0, 61, (7,))
    results = []
    for value in (
        summed_cross_entropies([hidden], weight, bias, labels)[0],
        chunked_cross_entropy(hidden, weight, bias, labels),
        F.cross_entropy(hidden.double() @ weight[:, :8].double().T + bias.double(), labels, reduction="sum"),
    ):
        results.append((value, *torch.autograd.grad(value, (hidden, weight, bias))))
    tolerance = {"rtol": 3e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    for others in results[:2]:
        for found, expected in zip(others, results[2], strict=True):
            torch.testing.assert_close(found.double(), expected.double(), **tolerance)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.compatibility("bf16 training", method="m3bert")
def test_bf16_in_training(backend, autocast):
    model = tiny(M3BertForMaskedLM, **QUIET).train()
    exact = model(IDS, attention_mask=MASK, labels=LABELS).loss
    if not autocast:
        model = model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(IDS, attention_mask=MASK, labels=LABELS).loss
    torch.testing.assert_close(loss.float(), exact, rtol=3e-2, atol=0.0)
    assert all(g.isfinite().all() and g.any() for g in gradients(model, loss).values())


def test_a_grid_with_a_single_cell_is_the_plain_loss(backend):
    model = tiny(M3BertForMaskedLM, **QUIET, mrl_layers=[6], mrl_dims=[32]).double()
    out = model(IDS, attention_mask=MASK, labels=LABELS)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits.reshape(-1, 61), LABELS.reshape(-1)))
    assert out.grid_losses.shape == (1, 1)


def test_training_on_the_grid_lowers_every_cell():
    model = tiny(M3BertForMaskedLM, **QUIET, initializer_range=0.02).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    first = None
    for _ in range(30):
        out = model(IDS, attention_mask=MASK, labels=LABELS)
        first = out.grid_losses if first is None else first
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert (out.grid_losses < 0.8 * first).all()


MODEL = tiny(M3BertForMaskedLM).double()
