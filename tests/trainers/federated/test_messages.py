"""What crosses a wire comes back as it was, and weighs what the meter says."""

import json
import re

import pytest
import torch

from tests.trainers.federated.tiny_federation import assert_same
from trainers.federated.core import ClientUpdate, FedAvg, Payload, WireMeter, pack, unpack
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


SAID = {"round": 7, "num_examples": 3, "metrics": {}, "chain": "mixed"}
DEEP = '{"round": ' + "[" * 100_000


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        *({"message": text} for text in ("", "[]", "null", "7", '"round"', "{}", "{", DEEP, "9" * 10_000)),
        *({"message": json.dumps({k: v for k, v in SAID.items() if k != missing})} for missing in SAID),
    ],
    ids=range(15),
)
def test_what_is_no_message_is_a_value_error(metadata):
    with pytest.raises(ValueError, match="message"):
        update_from("u1", {}, metadata)
    if metadata is None or "config" not in metadata.get("message", ""):
        with pytest.raises(ValueError, match="message"):
            payload_from({}, metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.uint8])
def test_rows_that_are_no_row_numbers(dtype):
    rows = torch.tensor([0.4, 1.9]).to(dtype)
    with pytest.raises(ValueError, match="rows of 't' are torch"):
        update_from("u1", {"rows/t": rows}, {"message": json.dumps(SAID)})
    with pytest.raises(ValueError, match="rows of 't' are torch"):
        payload_from({"rows/t": rows}, {"message": '{"round": 1, "config": {}}'})


@pytest.mark.parametrize(("round", "config"), [(True, {}), ("1", {}), (1.0, {}), (1, []), (1, None)])
def test_a_payload_has_a_round_and_a_config(round, config):
    with pytest.raises(ValueError, match="no whole round, or no config"):
        payload_from({}, {"message": json.dumps({"round": round, "config": config})})


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"chain": []}, r"its chain is \[\]"),
        ({"chain": None}, "its chain is None"),
        ({"metrics": None}, "its metrics are None"),
        ({"metrics": {"loss": "low"}}, "its metric 'loss' is 'low'"),
        ({"metrics": {"loss": [1]}}, "its metric 'loss' is"),
        ({"round": False}, "its round is False"),
        ({"num_examples": "many"}, "num_samples is 'many'"),
    ],
)
def test_what_a_client_says_wrongly_is_refused_by_its_name(said, reason):
    """It is a message, so it arrives; the algorithm names who sent it."""
    algorithm = FedAvg()
    algorithm.start({"x": torch.zeros(1)}, ["a", "b"])
    bad = update_from("a", {"parameters/x": torch.ones(1)}, {"message": json.dumps(SAID | {"round": 0} | said)})
    good = update_from("b", {"parameters/x": torch.ones(1)}, {"message": json.dumps(SAID | {"round": 0})})
    log = algorithm.aggregate(0, [bad, good])
    assert log.accepted == ["b"] and re.match(reason, log.rejected["a"])


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
