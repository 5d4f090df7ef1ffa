"""Costs against counts by hand, and limits that refuse."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutput

from trainers.device_cloud import DeviceBudget, DeviceBudgetError, DeviceCost
from trainers.device_cloud.budget import device_cost


class Wide(nn.Module):
    """8 -> 1000 -> 1, with the second weight used twice and a buffer."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 1000, bias=False)
        self.down = nn.Linear(1000, 1, bias=False)
        self.tied = self.down.weight
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x, labels=None):
        logits = self.down(torch.relu(self.up(x - self.mean)))[:, 0]
        loss = None if labels is None else (logits - labels).square().mean()
        return SequenceClassifierOutput(loss=loss, logits=logits)


EXAMPLE = {"x": torch.ones(16, 8), "labels": torch.ones(16)}
RESIDENT = 4 * (8000 + 1000 + 8)


def test_parameters_and_bytes_count_once():
    assert device_cost(Wide()) == DeviceCost(parameters=9000, bytes=RESIDENT)


def test_a_forward_pass_is_counted():
    cost = device_cost(Wide(), {"x": EXAMPLE["x"]})
    assert cost.flops == 2 * 16 * (8 * 1000 + 1000)
    inputs, hidden = 4 * 16 * 8, 4 * 16 * 1000
    # at its peak: inputs, inputs less their mean, and the hidden layer before and after the activation
    assert cost.peak_bytes == pytest.approx(RESIDENT + 2 * inputs + 2 * hidden, rel=0.01)


def test_a_backward_pass_costs_more_and_leaves_no_gradient():
    model = Wide().train()
    forward, both = device_cost(model, EXAMPLE), device_cost(model, EXAMPLE, training=True)
    assert both.flops == pytest.approx(3 * forward.flops, rel=0.35) and both.peak_bytes > forward.peak_bytes
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_the_meta_device_gives_the_same_numbers():
    with torch.device("meta"):
        model = Wide()
    example = {name: value.to("meta") for name, value in EXAMPLE.items()}
    assert device_cost(model, example) == device_cost(Wide(), EXAMPLE)


def test_a_transformers_model():
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = BertForSequenceClassification(config)
    ids = torch.randint(0, 50, (1, 12))
    cost = DeviceBudget(max_parameters=100_000).check(model, {"input_ids": ids, "labels": torch.zeros(1).long()})
    assert cost.parameters == model.num_parameters() and cost.flops > 2 * 12 * 16 * 16 * 4
    assert cost.bytes >= 4 * cost.parameters and cost.peak_bytes > cost.bytes


def test_every_broken_limit_is_named():
    budget = DeviceBudget(max_parameters=8999, max_bytes=10**6, max_peak_bytes=RESIDENT, max_flops=100)
    with pytest.raises(DeviceBudgetError) as caught:
        budget.check(Wide(), EXAMPLE)
    message = str(caught.value)
    assert "Wide" in message and "9,000 parameters (at most 8,999)" in message
    assert "peak bytes" in message and "flops (at most 100)" in message and "1,000,000" not in message


def test_what_fits_exactly_passes():
    assert DeviceBudget(max_parameters=9000, max_bytes=RESIDENT).check(Wide()).bytes == RESIDENT


@pytest.mark.parametrize("limit", ["max_peak_bytes", "max_flops"])
def test_a_limit_of_a_pass_needs_an_example(limit):
    with pytest.raises(ValueError, match="example"):
        DeviceBudget(**{limit: 10**9}).check(Wide())


def test_training_needs_a_loss():
    with pytest.raises(ValueError, match="labels"):
        device_cost(Wide(), {"x": EXAMPLE["x"]}, training=True)
