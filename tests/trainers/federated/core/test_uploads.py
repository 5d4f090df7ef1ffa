"""Corrupt uploads are refused by name, and the receiver's state stays as it was."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.federated.core import Upload, UploadError, WireMeter, check_upload, received_upload


EXPECTED = {"weight": torch.zeros(2, 3), "steps": torch.zeros(1, dtype=torch.int64)}


def upload(*, without=(), round=4, sender="u7", num_samples=5, **tensors):
    values = {"weight": torch.ones(2, 3), "steps": torch.tensor([3])} | tensors
    values = {name: value for name, value in values.items() if name not in without}
    return Upload(round=round, sender=sender, tensors=values, num_samples=num_samples)


def poisoned(value):
    tensor = torch.ones(2, 3)
    tensor[1, 2] = value
    return tensor


CORRUPT = {
    "a tensor is missing": (upload(without=["weight"]), "weight", "missing"),
    "one too many": (upload(extra=torch.ones(1)), "extra", "nobody asked"),
    "a wrong shape": (upload(weight=torch.ones(3, 2)), "weight", r"shape is \(3, 2\) instead of \(2, 3\)"),
    "one that would broadcast": (upload(weight=torch.ones(1, 3)), "weight", "shape"),
    "a wrong dtype": (upload(weight=torch.ones(2, 3).half()), "weight", "dtype is torch.float16"),
    "no tensor": (upload(weight=[1.0]), "weight", "not list"),
    "NaN": (upload(weight=poisoned(math.nan)), "weight", "1 of its 6 values are NaN"),
    "infinity": (upload(weight=poisoned(-math.inf)), "weight", "infinite"),
    "a sparse tensor": (upload(weight=torch.ones(2, 3).to_sparse()), "weight", "sparse or nested"),
    "one without values": (upload(weight=torch.ones(2, 3, device="meta")), "weight", "no values"),
    "a round that is text": (upload(round="4"), None, "its round is '4', a whole number"),
    "a round that is a fraction": (upload(round=4.0), None, "its round is 4.0, a whole number"),
    "no tensors at all": (
        Upload(round=4, sender="u7", tensors=None, num_samples=5),
        None,
        "tensors by name are expected, not NoneType",
    ),
    "an old round": (upload(round=3), None, "round 3, round 4 is being collected"),
    "a future round": (upload(round=5), None, "round 5"),
    "twice": (upload(sender="early"), None, "already"),
    "too large": (upload(weight=torch.full((2, 3), 9.0)), None, "norm"),
    "no samples": (upload(num_samples=0), None, "num_samples is 0"),
    "half a sample": (upload(num_samples=2.5), None, "num_samples is 2.5"),
    "a negative number of samples": (upload(num_samples=-4), None, "num_samples is -4"),
    "more samples than can be": (upload(num_samples=10**400), None, "more than 10.*is believed"),
    "a truth value of samples": (upload(num_samples=True), None, "num_samples is True"),
}


@pytest.mark.parametrize("kind", CORRUPT)
def test_a_corrupt_upload_is_refused_by_name(kind):
    bad, key, reason = CORRUPT[kind]
    state, seen = copy.deepcopy(EXPECTED), {"early"}
    with pytest.raises(UploadError, match=reason) as caught:
        check_upload(bad, expected=state, round=4, max_norm=10.0, seen=seen)
    assert (caught.value.sender, caught.value.key) == (bad.sender, key) and repr(bad.sender) in str(caught.value)
    assert key is None or repr(key) in str(caught.value)
    assert seen == {"early"} and all(torch.equal(state[name], EXPECTED[name]) for name in EXPECTED)


def test_false_is_no_round():
    with pytest.raises(UploadError, match="its round is False"):
        check_upload(upload(round=False), expected=EXPECTED, round=0)


def test_values_whose_squares_leave_double_precision():
    like = {"a": torch.zeros(2, dtype=torch.float64)}
    for value in (1e155, 1e300):
        huge = Upload(round=0, sender=1, tensors={"a": torch.full((2,), value, dtype=torch.float64)}, num_samples=1)
        with pytest.raises(UploadError, match="tensor 'a': its norm is .*, too large"):
            check_upload(huge, expected=like, round=0)


def test_a_sound_tensor_is_looked_at_once():
    """Engines check thousands of uploads a second."""

    class Calls(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    like = {name: torch.zeros(3, 4) for name in "abc"}
    sound = Upload(round=0, sender=1, tensors={name: torch.ones(3, 4) for name in like}, num_samples=1)
    with Calls() as calls:
        check_upload(sound, expected=like, round=0, max_norm=100.0)
    assert calls.names == ["linalg_vector_norm.default", "_local_scalar_dense.default"] * 3


def test_a_sound_upload_passes():
    assert check_upload(upload(), expected=EXPECTED, round=4, max_norm=10.0, seen={"early"}) is None
    on_meta = {name: torch.empty_like(value, device="meta") for name, value in EXPECTED.items()}
    assert check_upload(upload(), expected=on_meta, round=4) is None


def test_the_norm_is_over_all_tensors():
    values = {"a": torch.full((2,), 3.0, dtype=torch.float16), "b": torch.full((2,), 4.0, dtype=torch.float16)}
    both = Upload(round=0, sender=1, tensors=values, num_samples=1)
    norm = math.sqrt(2 * 9 + 2 * 16)
    check_upload(both, expected=values, round=0, max_norm=norm)
    with pytest.raises(UploadError, match="norm"):
        check_upload(both, expected=values, round=0, max_norm=norm - 1e-6)


def test_samples_that_are_not_believed():
    check_upload(upload(num_samples=1000), expected=EXPECTED, round=4, max_samples=1000)
    with pytest.raises(UploadError, match="num_samples is 1001, at most 1000 is believed"):
        check_upload(upload(num_samples=1001), expected=EXPECTED, round=4, max_samples=1000)


def test_complex_numbers_are_checked_too():
    like = {"a": torch.zeros(2, dtype=torch.complex64)}
    sound = Upload(round=0, sender=1, tensors={"a": torch.tensor([3 + 4j, 0j])}, num_samples=1)
    check_upload(sound, expected=like, round=0, max_norm=5.0)
    with pytest.raises(UploadError, match="norm"):
        check_upload(sound, expected=like, round=0, max_norm=4.9)
    poison = {"a": torch.tensor([complex(0, math.nan), 0j])}
    with pytest.raises(UploadError, match="1 of its 2 values are NaN"):
        check_upload(Upload(round=0, sender=1, tensors=poison, num_samples=1), expected=like, round=0)


def test_over_the_wire_and_back():
    meter, sent = WireMeter(), upload()
    got = received_upload(meter.send(sent.tensors, metadata=sent.metadata), sender="u7")
    assert (got.round, got.sender, got.num_samples) == (4, "u7", 5)
    check_upload(got, expected=EXPECTED, round=4)
    assert all(torch.equal(got.tensors[name], sent.tensors[name]) for name in EXPECTED)


@pytest.mark.parametrize("metadata", [None, {"round": "4"}, {"round": "four", "num_samples": "5"}])
def test_bytes_without_a_round_are_refused(metadata):
    with pytest.raises(UploadError, match="'u7' refused: its metadata lacks"):
        received_upload(WireMeter().send(upload().tensors, metadata=metadata), sender="u7")


def test_bytes_that_were_cut_off_are_refused():
    sent = upload()
    payload = WireMeter().send(sent.tensors, metadata=sent.metadata)
    for cut in (0, 5, 50, len(payload) - 1):
        with pytest.raises(UploadError, match="'u7' refused"):
            received_upload(payload[:cut], sender="u7")
