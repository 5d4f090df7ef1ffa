"""An operation that errs once, always, or differently each time, under the microscope of one repetition."""

import json
import math

import pytest
import torch
from torch import nn

from tests.trainers.callbacks.test_installation import SEQUENCE, make_model
from trainers.reliability.rerun import (
    RandomState,
    Snapshot,
    Suspicion,
    clear_suspicion,
    diagnose,
    exit_code,
    loss_of,
    read_suspicion,
)
from trainers.reliability.signs import EXIT_FAILED_VALIDATION, EXIT_SUSPECT


class Flaky(nn.Module):
    """The squared error of a linear map with dropout; its op errs in the forwards that `errs` names, by `error`."""

    def __init__(self, errs=lambda call: False, error=math.nan, gradient=False):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.seen = nn.Buffer(torch.zeros(()))
        self.errs, self.error, self.gradient, self.calls = errs, error, gradient, 0

    def forward(self, x):
        self.calls += 1
        self.seen += 1
        hidden = nn.functional.dropout(self.linear(x), 0.5, self.training)
        if self.errs(self.calls):
            if self.gradient:
                if hidden.requires_grad:
                    hidden.register_hook(lambda gradient: gradient * self.error)
            else:
                hidden = hidden * self.error
        return {"loss": hidden.square().mean()}


X = torch.arange(32.0).reshape(8, 4)


def first_run(module):
    snapshot = Snapshot.of(module, (X,), {})
    loss = module(X)["loss"]
    return snapshot, loss.item()


@pytest.mark.parametrize(
    ("errs", "error", "label"),
    [
        (lambda call: call == 1, math.nan, "transient"),  # NaN, then a number
        (lambda call: True, math.nan, "reproducible"),
        (lambda call: True, math.inf, "reproducible"),
        (lambda call: call == 1, 30.0, "transient"),  # a spike that does not come back
        (lambda call: True, 30.0, "reproducible"),  # a real one
        (lambda call: call == 2, math.nan, "transient"),
        (lambda call: False, 1.0, "reproducible"),  # nothing wrong, twice
    ],
)
def test_labels(errs, error, label):
    module = Flaky(errs, error)
    snapshot, first = first_run(module)
    found = diagnose(module, snapshot, first)
    assert found.label == label and module.calls == 2
    assert found.first == pytest.approx(first, nan_ok=True)


@pytest.mark.parametrize(
    ("errs", "label"), [(lambda call: call == 1, "transient"), (lambda call: True, "reproducible")]
)
def test_a_gradient_that_errs(errs, label):
    module = Flaky(errs, gradient=True)
    snapshot, first = first_run(module)
    found = diagnose(module, snapshot, first, gradients_were_finite=False)
    assert found.label == label and found.gradients is (label == "transient")
    assert diagnose(module, snapshot, first, gradients_were_finite=False, backward=False).gradients is None


def test_the_second_run_has_the_dropout_of_the_first():
    module = Flaky()
    snapshot, first = first_run(module)
    torch.rand(100)
    assert diagnose(module, snapshot, first).second == first
    assert Snapshot.of(module, (), {}).random.cpu.equal(RandomState.now().cpu)
    snapshot = Snapshot.of(module, (X,), {})  # another state, another mask
    assert diagnose(module, snapshot, first).second != first


def test_tolerance():
    module = Flaky(lambda call: call == 2, 1.001)
    snapshot, first = first_run(module)
    assert diagnose(module, snapshot, first, tolerance=1e-2).label == "reproducible"
    module.calls = 1
    assert diagnose(module, snapshot, first, tolerance=1e-4).label == "transient"


def test_nothing_is_left_behind():
    module = Flaky()
    loss = module(X)["loss"]
    loss.backward()
    snapshot = Snapshot.of(module, (X,), {})
    gradients = [parameter.grad.clone() for parameter in module.parameters()]
    random = torch.get_rng_state()
    diagnose(module, snapshot, 0.0)
    assert torch.equal(torch.get_rng_state(), random)
    assert module.seen == 1
    for parameter, gradient in zip(module.parameters(), gradients):
        assert torch.equal(parameter.grad, gradient)


def test_experts_and_counts_of_a_model_that_routes():
    """The second run has the experts per token of the first, and the balance loss does not count it."""
    model = make_model(router_aux_loss_type="global_batch").train()
    model.routing_window.managed = True
    ids = torch.randint(0, 40, (2, SEQUENCE))
    model.set_experts_per_token([3, 2])
    snapshot = Snapshot.of(model, (), {"input_ids": ids, "labels": ids})
    first = model(input_ids=ids, labels=ids).loss.item()
    model.set_experts_per_token(1)
    counts = model.routing_window.counts_of_all_ranks.clone()

    found = diagnose(model, snapshot, first)
    assert found.label == "reproducible" and found.second == first
    assert [router.top_k for router in model.routers] == [1, 1]
    assert torch.equal(model.routing_window.counts_of_all_ranks, counts)


def test_where_the_loss_is():
    loss = torch.tensor(2.0)
    assert loss_of({"loss": loss}) is loss_of((loss, 1)) is loss
    model = make_model()
    ids = torch.randint(0, 40, (1, SEQUENCE))
    assert loss_of(model(input_ids=ids, labels=ids)).dim() == 0
    assert loss_of(model(input_ids=ids)) is None
    assert loss_of((torch.zeros(2, 3),)) is loss_of({"logits": loss}) is loss_of(None) is None


def test_exit_codes():
    here = Suspicion(step=7, rank=1, micro_batch=0, batch="abc", host="a")
    assert exit_code(None, here, host="a") == EXIT_SUSPECT == 16
    assert exit_code(here, here, host="a") == EXIT_SUSPECT  # the same machine is no second opinion
    assert exit_code(here, here, host="b") == EXIT_FAILED_VALIDATION == 17
    other = Suspicion(step=7, rank=1, micro_batch=0, batch="def", host="a")
    assert exit_code(other, here, host="b") == EXIT_SUSPECT


def test_a_suspicion_on_file(tmp_path):
    assert read_suspicion(tmp_path) is None
    suspicion = Suspicion(step=7, rank=1, micro_batch=0, batch="abc", host="a")
    suspicion.file(tmp_path / "run")
    assert read_suspicion(tmp_path / "run") == suspicion
    assert json.loads((tmp_path / "run" / "rerun.json").read_text())["host"] == "a"
    clear_suspicion(tmp_path / "run")
    clear_suspicion(tmp_path / "run")
    assert read_suspicion(tmp_path / "run") is None
    (tmp_path / "rerun.json").write_text('{"step": 3')
    assert read_suspicion(tmp_path) is None
