"""Rounds that are there as a whole or not at all: kills at every point of a commit, and files that were damaged."""

import json
import os
import shutil
import signal

import pytest
import torch

from trainers.federated.core import RoundError, RoundStore
from trainers.federated.core import rounds as module


def tensors(round):
    return {
        "model": {"w": torch.full((4, 5), float(round)), "b": torch.arange(3) + round},
        "server-state": {"momentum": torch.full((2,), -float(round), dtype=torch.bfloat16)},
    }


def commit(store, *rounds):
    for number in rounds:
        store.commit(number, tensors(number), {"accuracy": number / 10, "users": ["a", "b"]})


def assert_is_round(store, number):
    found, record = store.load(number)
    assert record == {"accuracy": number / 10, "users": ["a", "b"]}
    for name, values in tensors(number).items():
        assert found[name].keys() == values.keys()
        assert all(torch.equal(found[name][key], value) for key, value in values.items())


def test_what_was_committed_is_loaded(tmp_path):
    store = RoundStore(tmp_path / "rounds")
    assert store.latest() is None and store.rounds() == [] and not store.folder.exists()
    commit(store, 0, 1, 12)
    again = RoundStore(tmp_path / "rounds")
    assert again.latest() == 12 and again.rounds() == [0, 1, 12]
    for number in again.rounds():
        assert_is_round(again, number)


def test_a_round_without_tensors_is_a_round(tmp_path):
    store = RoundStore(tmp_path)
    store.commit(0, {}, {"note": "nobody came"})
    assert store.load(0) == ({}, {"note": "nobody came"})


def test_a_round_is_written_once(tmp_path):
    store = RoundStore(tmp_path)
    commit(store, 3)
    with pytest.raises(RoundError, match="Round 3 is committed already"):
        store.commit(3, {}, {})
    assert_is_round(store, 3)


def in_a_process_that_dies(work):
    """Run `work` in a child that ends by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(3)  # `work` was to be killed
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def dying(function, call, *, after):
    """`function`, during whose `call`-th call the process is killed, before its work or after."""
    calls = 0

    def replacement(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls == call and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return replacement


# Of a commit: three files, then their folder are synced, the folder is renamed, its parent synced.
POINTS = [("fsync", call, after) for call in (1, 2, 3, 4, 5) for after in (False, True)]
POINTS += [("rename", 1, False), ("rename", 1, True)]


@pytest.mark.fault("kill -9 in the middle of committing a round", survived_if="the round before is read, unharmed")
@pytest.mark.parametrize(("where", "call", "after"), POINTS)
def test_a_kill_loses_no_round(tmp_path, where, call, after, survived):
    store = RoundStore(tmp_path)
    commit(store, 0, 1)

    def work():
        setattr(os, where, dying(getattr(os, where), call, after=after))
        commit(store, 2)

    in_a_process_that_dies(work)
    renamed = (where, call) == ("fsync", 5) or (where, after) == ("rename", True)
    back = RoundStore(tmp_path)
    assert back.latest() == (2 if renamed else 1)
    assert_is_round(back, back.latest())
    commit(back, back.latest() + 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-{n:08d}" for n in back.rounds()]
    for number in back.rounds():
        assert_is_round(back, number)
    survived()


@pytest.mark.parametrize("call", [1, 2])
def test_a_kill_while_old_rounds_are_removed_leaves_no_half_round(tmp_path, call):
    store = RoundStore(tmp_path, keep=2)
    commit(store, 0, 1)

    def work():
        shutil.rmtree = dying(shutil.rmtree, 1, after=False) if call == 1 else shutil.rmtree
        os.unlink = dying(os.unlink, 1, after=True) if call == 2 else os.unlink
        commit(store, 2)

    in_a_process_that_dies(work)
    back = RoundStore(tmp_path, keep=2)
    assert back.rounds() == [1, 2] and back.latest() == 2
    commit(back, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-00000002", "round-00000003"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a bit of a tensor": lambda folder: flip(folder / "model.safetensors"),
    "a file cut off": lambda folder: os.truncate(folder / "model.safetensors", 20),
    "a file gone": lambda folder: (folder / "server-state.safetensors").unlink(),
    "no record": lambda folder: (folder / "record.json").unlink(),
    "half a record": lambda folder: os.truncate(folder / "record.json", 30),
    "the record of another round": lambda folder: rewrite(folder, round=7),
    "another format": lambda folder: rewrite(folder, format=99),
    "no object": lambda folder: (folder / "record.json").write_text("[]"),
    "a list of files": lambda folder: rewrite(folder, files=["model.safetensors"]),
    "a hash that is none": lambda folder: rewrite(folder, files={"model.safetensors": "0"}),
    "no record of its own": lambda folder: rewrite(folder, record=None),
    "a file outside": lambda folder: rewrite(folder, files={"../x.safetensors": {"sha256": "0"}}),
}


def rewrite(folder, **changes):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_round_is_passed_over_and_replaced(tmp_path, damage):
    store = RoundStore(tmp_path)
    commit(store, 0, 1, 2)
    DAMAGE[damage](tmp_path / "round-00000002")
    assert store.latest() == 1
    with pytest.raises(RoundError, match="Round 2"):
        store.load(2)
    commit(store, 2)
    assert store.latest() == 2
    assert_is_round(store, 2)
    commit(store, 3)
    assert not list(tmp_path.glob(f"{module._UNFINISHED}*"))


def test_old_rounds_go(tmp_path):
    store = RoundStore(tmp_path, keep=2)
    commit(store, *range(5))
    assert store.rounds() == [3, 4]
    with pytest.raises(RoundError, match="Round 0"):
        store.load(0)


@pytest.mark.parametrize(
    ("number", "values", "record", "message"),
    [
        (-1, {}, {}, "round=-1"),
        (True, {}, {}, "round=True"),
        (0, {"../x": {}}, {}, "no plain file name"),
        (0, {".hidden": {}}, {}, "no plain file name"),
        (0, {}, {"loss": float("nan")}, "JSON"),
    ],
)
def test_what_cannot_be_a_round_leaves_none(tmp_path, number, values, record, message):
    store = RoundStore(tmp_path)
    with pytest.raises(ValueError, match=message):
        store.commit(number, values, record)
    assert store.latest() is None


def test_one_round_alone_is_no_choice():
    with pytest.raises(ValueError, match="keep=1"):
        RoundStore("anywhere", keep=1)


def test_the_disk_refuses(tmp_path, monkeypatch):
    store = RoundStore(tmp_path)
    commit(store, 0)

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        commit(store, 1)
    monkeypatch.undo()
    assert store.latest() == 0
    commit(store, 1)
    assert_is_round(store, 1)
