"""Whose row is whose, and how rows become batches."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import default_data_collator

from tests.trainers.federated.tiny_federation import Quadratic, federation
from trainers.federated import ClientRows, FedAvg


def rows_of(dataset, partition_by=None, **options):
    return ClientRows(dataset, partition_by, **({"collate": default_data_collator} | options))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-3, 12), min_size=1, max_size=40))
def test_every_row_has_one_owner_and_keeps_its_order(owners):
    dataset = Dataset.from_dict({"who": owners, "x": list(range(len(owners)))})
    for rows in (rows_of(dataset, "who"), rows_of(dataset, np.array(owners))):
        assert rows.names == [str(owner) for owner in sorted(set(owners))]
        for client in rows.names:
            mine = [index for index, owner in enumerate(owners) if str(owner) == client]
            assert rows.indices(client).tolist() == mine
            assert rows.num_examples[client] == len(mine) == len(rows.data(client))
            assert rows.data(client).batch(None)["x"].tolist() == mine


def test_a_column_is_read_through_a_selection():
    dataset = Dataset.from_dict({"who": list("abcab"), "x": list(range(5))}).select([4, 0, 2])
    rows = rows_of(dataset, "who")
    assert {client: rows.data(client).batch(None)["x"].tolist() for client in rows.names} == {
        "a": [0],
        "b": [4],
        "c": [2],
    }


def test_a_dataset_for_each_client():
    parts = {"first": Dataset.from_dict({"x": [1, 2]}), "second": Dataset.from_dict({"x": [3]})}
    rows = rows_of(parts)
    assert rows.num_examples == {"first": 2, "second": 1}
    assert rows.data("second").batch(None)["x"].tolist() == [3]
    assert rows.data("first").batch(torch.tensor([1]))["x"].tolist() == [2]


def test_blocks_are_parts_of_a_client():
    dataset = Dataset.from_dict({"who": list("aabb"), "block": [0, 1, 1, 1], "x": [0, 1, 2, 3]})
    rows = rows_of(dataset, "who", block_by="block")
    assert rows.num_blocks == 2
    assert [rows.count(client, block) for client in "ab" for block in (0, 1, 2)] == [1, 1, 0, 0, 2, 0]
    assert rows.data("b", 1).batch(None)["x"].tolist() == [2, 3] and not len(rows.data("b", 0))
    assert rows.data("a").batch(None)["x"].tolist() == [0, 1]


def test_kept_rows_give_the_collators_batches():
    dataset = Dataset.from_dict({"who": list("aaab"), "label": [0, 1, 0, 1], "x": [[1.5, 2.0]] * 4})
    kept, fresh = (
        rows_of(dataset.remove_columns("who"), list("aaab"), rowwise=True),
        rows_of(dataset.remove_columns("who"), list("aaab")),
    )
    chosen = torch.tensor([2, 0])
    mine, theirs = kept.data("a").batch(chosen), fresh.data("a").batch(chosen)
    assert mine.keys() == theirs.keys() == {"labels", "x"}
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name])
    assert kept.data("a") is kept.data("a") and fresh.data("a") is not fresh.data("a")
    nothing = rows_of(dataset.remove_columns("who"), list("aaab"), rowwise=True, room=0)
    assert nothing.data("a") is not nothing.data("a")


def test_a_collator_that_pads_and_takes_rows_apart_is_called_for_each_batch(tmp_path):
    def collate(rows):
        return {"target": torch.tensor([row.pop("target") for row in rows])}

    dataset = Dataset.from_dict({"user": ["a"] * 3, "target": [0.0, 1.0, 2.0]})
    fed = federation(
        tmp_path,
        Quadratic(),
        dataset,
        FedAvg(),
        rounds=2,
        data_collator=collate,
        args={"per_device_train_batch_size": 2},
        local_steps=4,
    )
    fed.train()
    assert 0 < float(fed.strategy.parameters["x"]) < 2


def test_what_is_no_partition_is_refused():
    dataset = Dataset.from_dict({"who": ["a", None], "x": [1, 2]})
    with pytest.raises(ValueError, match="1 rows have no client"):
        rows_of(dataset, "who")
    with pytest.raises(ValueError, match="no column 'user' among who, x"):
        rows_of(dataset, "user")
    with pytest.raises(ValueError, match="3 values for 2 rows"):
        rows_of(dataset, [1, 2, 3])
    with pytest.raises(ValueError, match="partition_by= with one dataset"):
        rows_of(dataset)
    with pytest.raises(ValueError, match="no rows"):
        rows_of(dataset.select([]), "who")
    with pytest.raises(ValueError, match="a list has none"):
        rows_of([1, 2], "who")
    with pytest.raises(ValueError, match="whole number from 0 on"):
        rows_of(dataset, ["a", "b"], block_by=[-1, 0])


def test_a_fingerprint_is_of_owners_and_of_stored_rows():
    columns = {"who": list("abca"), "x": [1, 2, 3, 4]}
    dataset = Dataset.from_dict(columns)
    first = rows_of(dataset, "who").fingerprint()
    assert first == rows_of(dataset.with_transform(lambda rows: {"x": torch.rand(1)}), "who").fingerprint()
    assert first != rows_of(Dataset.from_dict(columns | {"x": [1, 2, 3, 5]}), "who").fingerprint()
    assert first != rows_of(dataset, ["a", "b", "a", "c"]).fingerprint()
    assert first != rows_of(dataset, "who", block_by=[0, 0, 0, 1]).fingerprint()
    parts = [{"a": dataset.select([0, 1]), "b": dataset.select([last])} for last in (2, 3)]
    assert rows_of(parts[0]).fingerprint() != rows_of(parts[1]).fingerprint()


@pytest.mark.parametrize("owners", [["a", None], [1.0, float("nan")], np.array([1.0, np.nan])])
def test_rows_without_a_client_are_refused(owners):
    with pytest.raises(ValueError, match="1 rows have no client"):
        rows_of(Dataset.from_dict({"x": [1, 2]}), owners)
    with pytest.raises(ValueError, match="1 rows have no client"):
        rows_of(Dataset.from_dict({"x": [1, 2], "who": list(owners)}), "who")
