"""What crosses a wire comes back as it was, and weighs what the meter says."""

import torch

from tests.trainers.federated.tiny_federation import assert_same
from trainers.federated.core import ClientUpdate, Payload, WireMeter, pack, unpack
from trainers.federated.messages import LayoutMeter, payload_from, payload_message, update_from, update_message


ROWS = {"table": torch.tensor([1, 5, 9])}


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"table": torch.randn(3, 2, generator=generator), "bias": torch.randn(2, generator=generator)}


def test_payloads_and_updates_come_back():
    payload = Payload(7, tensors(), ROWS, {"learning_rate": 0.1, "block": 2, "why": "ü\n"}, separate=tensors(1))
    back = payload_from(*unpack(pack(*payload_message(payload))))
    assert (back.round, back.config) == (7, payload.config)
    assert_same(back.tensors, payload.tensors)
    assert_same(back.rows, payload.rows)
    assert_same(back.separate, payload.separate)
    update = ClientUpdate("user 17", 7, tensors(2), ROWS, 12, {"loss": float("nan")}, "separate")
    content = pack(*update_message(update))
    assert b"user 17" not in content
    back = update_from("whoever sent it", *unpack(content))
    assert (back.client, back.round, back.num_examples, back.chain) == ("whoever sent it", 7, 12, "separate")
    assert back.metrics["loss"] != back.metrics["loss"]
    assert_same(back.tensors, update.tensors)
    assert_same(back.rows, update.rows)


def test_sizes_are_those_of_what_is_written():
    meter = LayoutMeter(keep=3)
    for seed in range(3):
        for rows in range(4):
            for text in ("", "x" * 9, "ü"):
                payload = Payload(
                    seed, {"table": torch.randn(rows, 2)}, {"table": torch.arange(rows)}, {"note": text, "seed": seed}
                )
                message = payload_message(payload)
                size = meter.size(message)
                assert size == len(WireMeter().send(message[0], metadata=message[1]))
                meter.add(size, direction="down", round=seed)
    assert meter.of_latest(2) == meter.by_round()[2] and meter.of_latest(5) == {"up": 0, "down": 0}
    assert meter.totals()["down"] == sum(found["down"] for found in meter.by_round().values())
