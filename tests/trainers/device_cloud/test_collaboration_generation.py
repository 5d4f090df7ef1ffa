"""Ways of writing: the cloud's words whoever drafts, bytes by hand, budgets before anything is sent."""

import pytest
import torch

from tests.trainers.device_cloud.test_collaboration_drafting import causal_lm
from trainers.device_cloud import DeviceBudget, DeviceBudgetError
from trainers.device_cloud.collaboration_generation import (
    AssistedGeneration,
    CloudGeneration,
    DeviceGeneration,
    GenerationTask,
    next_token_accuracy,
    written_as_json,
)
from trainers.federated.core import WireMeter, pack


TEXTS = torch.randint(1, 40, (3, 12), generator=torch.Generator().manual_seed(0))


def task():
    return GenerationTask(model=lambda: causal_lm("m_moe"), texts=TEXTS, prompt=5, max_new_tokens=7)


def test_all_ways_fill_the_same_columns():
    found, written = {}, {}
    for method in (AssistedGeneration(), AssistedGeneration(drafter="layers"), CloudGeneration(), DeviceGeneration()):
        meter = WireMeter()
        written[method.name] = method.train(task(), meter, None)
        found[method.name] = written_as_json(written[method.name], meter, task())
    cloud = written["cloud_generation"]
    assert len({tuple(columns) for columns in found.values()}) == 1 and cloud.sequences.shape == (3, 12)
    for name in ("assisted_generation_fewer_experts", "assisted_generation_fewer_layers"):
        assert torch.equal(written[name].sequences, cloud.sequences)
        assert found[name]["served_accuracy"] == found["cloud_generation"]["served_accuracy"]
        assert 0 < found[name]["cloud_calls_per_request"] <= 7
    alone = found["device_generation_fewer_experts"]
    assert alone["served_accuracy"] == alone["device_accuracy"] and alone["cloud_calls_per_request"] == 0
    assert alone["request_bytes_up"] == alone["request_bytes_down"] == 0 < alone["bytes_down"]
    sizes = {n: len(pack({"tokens": torch.zeros(n, dtype=torch.int32)})) for n in (5, 7)}
    once = found["cloud_generation"]
    assert (once["request_bytes_up"], once["request_bytes_down"]) == (sizes[5], sizes[7])
    assert once["bytes_down"] == 0 and once["device_parameters"] is None
    assert found["assisted_generation_fewer_layers"]["device_parameters"] < alone["device_parameters"]


def test_accuracy_of_the_next_token_by_hand():
    model, one = causal_lm("m_moe"), task()
    right = 0
    for text in TEXTS:
        for place in range(5, 12):
            with torch.no_grad():
                right += int(model(text[None, :place]).logits[0, -1].argmax() == text[place])
    assert next_token_accuracy(model, one) == pytest.approx(right / 21)


def test_what_does_not_fit_is_refused_before_anything_is_sent():
    for method in (AssistedGeneration(), DeviceGeneration()):
        meter = WireMeter()
        with pytest.raises(DeviceBudgetError):
            method.train(task(), meter, DeviceBudget(max_parameters=10))
        assert meter.totals() == {"up": 0, "down": 0}
