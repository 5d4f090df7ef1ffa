"""What is counted is what is sent, and what is sent comes back bit for bit."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.federated.core import WireError, WireMeter, pack, unpack


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@st.composite
def tensors(draw):
    names = draw(
        st.lists(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1, max_size=6), unique=True)
    )
    shape = st.lists(st.integers(0, 4), max_size=3)
    return {
        name: torch.randint(0, 100, draw(shape)).to(draw(st.sampled_from(DTYPES))) for name in names
    }  # fmt: skip


messages = st.tuples(
    tensors(),
    st.sampled_from(["up", "down"]),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(0, 3), st.sampled_from(["a", "b"])),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(messages, max_size=6))
def test_bytes_counted_are_bytes_sent(sent):
    meter, sizes = WireMeter(), {"up": 0, "down": 0}
    for values, direction, turn, user, metadata in sent:
        payload = meter.send(values, direction=direction, round=turn, user=user, what="test", metadata=metadata)
        sizes[direction] += len(payload)
        back, own = unpack(payload)
        assert own == metadata and back.keys() == values.keys()
        for name, value in values.items():
            assert back[name].dtype == value.dtype and torch.equal(back[name], value)
    assert meter.totals() == sizes
    for view in (meter.by_round(), meter.by_user(), meter.by_purpose()):
        assert {way: sum(part[way] for part in view.values()) for way in sizes} == sizes
    other = WireMeter()
    other.load_state_dict(json.loads(json.dumps(meter.state_dict())))
    assert other.by_user() == meter.by_user() and other.by_round() == meter.by_round()
    assert list(meter.by_round()) == sorted(meter.by_round())


def test_views_and_tied_weights_are_sent_each():
    table = torch.arange(12.0).reshape(3, 4)
    values, _ = unpack(pack({"column": table[:, 1], "turned": table.T, "all": table, "again": table}))
    assert torch.equal(values["column"], table[:, 1]) and torch.equal(values["turned"], table.T)
    values["all"].zero_()
    assert torch.equal(values["again"], table) and table.sum() == 66


def test_equal_tensors_are_equal_bytes():
    a, b = torch.ones(2), torch.zeros(3)
    assert pack({"a": a, "b": b}) == pack({"b": b.clone(), "a": a.clone()})


def test_a_parameter_is_sent_without_its_history():
    parameter = torch.nn.Parameter(torch.ones(2))
    value = unpack(pack({"w": parameter * 2}))[0]["w"]
    assert not value.requires_grad and torch.equal(value, torch.full((2,), 2.0))


@pytest.mark.parametrize("payload", [b"", b"x", b"\xff" * 40, pack({"a": torch.ones(4)})[:-1]])
def test_what_is_no_payload_is_said_to_be_none(payload):
    with pytest.raises(WireError, match=f"{len(payload)} bytes are no safetensors file"):
        unpack(payload)


@pytest.mark.parametrize(
    ("values", "metadata", "name"),
    [({"a": 1.0}, None, "a"), ({3: torch.ones(1)}, None, "3"), ({}, {"k": 1}, "k"), ({}, {2: "v"}, "2")],
)
def test_what_cannot_be_sent_is_named(values, metadata, name):
    with pytest.raises(WireError, match=name):
        pack(values, metadata)


def test_a_direction_is_up_or_down():
    meter = WireMeter()
    with pytest.raises(ValueError, match="sideways"):
        meter.send({}, direction="sideways")
    assert meter.totals() == {"up": 0, "down": 0}


def test_a_payload_that_goes_to_many_is_counted_for_each():
    meter, other = WireMeter(), WireMeter()
    for user in (1, 2):
        size = len(meter.send({"a": torch.ones(4)}, direction="down", user=user, what="model"))
        other.count(size, direction="down", user=user, what="model")
    assert other.state_dict() == meter.state_dict()
    with pytest.raises(ValueError, match="sideways"):
        other.count(1, direction="sideways")


def test_metadata_may_be_null():
    header = b'{"__metadata__":null}'
    assert unpack(len(header).to_bytes(8, "little") + header) == ({}, {})
