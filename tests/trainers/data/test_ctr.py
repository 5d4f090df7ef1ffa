"""From impressions to tensors: vocabularies of the training split, histories of the past, batches without loops."""

import datetime

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hf_models.ctr import CtrForCtrPrediction
from trainers.data.ctr import CtrCollator, CtrColumns, CtrRows, CtrVocabulary, encode_ctr, past_clicks


COLUMNS = CtrColumns(
    user="who",
    item="what",
    label="clicked",
    user_features=("town",),
    item_features=("maker",),
    context_features=("hour",),
    numeric_features=("price",),
    bag_features=("tags",),
    time="when",
)


def table(rows):
    names = ("who", "what", "town", "maker", "hour", "price", "tags", "when", "clicked")
    return Dataset.from_list([dict(zip(names, row)) for row in rows])


def splits():
    train = [
        ("ann", 10, "rome", "x", 1, 2.0, ["a", "b"], 1, 1),
        ("bob", 11, None, "y", 2, 4.0, [], 1, 0),
        ("ann", 12, "rome", "x", 3, 6.0, ["b"], 2, 1),
        ("ann", 11, "rome", "y", 1, 8.0, ["c", "a", "b"], 2, 0),
    ]
    test = [
        ("ann", 10, "rome", "x", 9, 5.0, ["a", "z"], 3, 1),
        ("cid", 13, "oslo", "z", 1, None, None, 1, 0),
        ("bob", 10, None, "x", 2, 5.0, ["b"], 0, 1),
    ]
    return DatasetDict(train=table(train), test=table(test))


def test_ids_columns_and_scales():
    data = encode_ctr(splits(), COLUMNS)
    assert data.vocabularies["who"].values == ["ann", "bob"] and data.vocabularies["what"].values == ["10", "11", "12"]
    assert data.user_names == ["ann", "bob", "cid"] and data.prior == 0.5
    assert [(f["name"], f["role"], f.get("vocab_size")) for f in data.features] == [
        ("who", "user", 4),
        ("town", "user", 3),
        ("what", "item", 5),
        ("maker", "item", 4),
        ("hour", "context", 5),
        ("price", "context", None),
        ("tags", "item", 5),
    ]
    rows = data.rows("train")
    assert rows.tensors["categorical_features"].tolist() == [
        [2, 2, 2, 2, 2],
        [3, 0, 3, 3, 3],
        [2, 2, 4, 2, 4],
        [2, 2, 3, 3, 2],
    ]
    assert rows.tensors["labels"].tolist() == [1, 0, 1, 0] and rows.users.tolist() == [0, 1, 0, 0]
    price = rows.tensors["numeric_features"][:, 0]
    assert price.mean().abs() < 1e-6 and price.std(correction=0) == pytest.approx(1.0)
    assert rows.tensors["sequence_features"].tolist() == [[[2, 3, 0]], [[0] * 3], [[3, 0, 0]], [[4, 2, 3]]]
    test = data.rows("test").tensors
    assert test["categorical_features"].tolist() == [[2, 2, 2, 2, 1], [1, 1, 1, 1, 2], [3, 0, 2, 2, 3]]
    assert test["sequence_features"].tolist() == [[[2, 1]], [[0, 0]], [[3, 0]]]
    assert test["numeric_features"][:, 0].tolist() == [0.0, 0.0, 0.0], "5 is the mean; what is missing is, too"


def test_histories_are_earlier_clicks_of_the_same_user():
    data = encode_ctr(splits(), COLUMNS, history_length=2)
    assert data.features[-1] == {"name": "history", "kind": "sequence", "role": "user", "shares": "what"}
    history = [data.rows(split).tensors["sequence_features"][:, 1].tolist() for split in ("train", "test")]
    # both rows of ann at time 2 know the click at time 1, and neither knows the other; bob's past is in another split
    assert history[0] == [[0, 0, 0], [2, 0, 0], [2, 0, 0], [2, 0, 0]]
    # padded to the longest bag; bob's row comes before all others of his
    assert history[1] == [[2, 4], [0, 0], [0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 6), st.booleans(), st.integers(2, 9)), min_size=1),
    st.integers(1, 4),
)
def test_histories_equal_the_loop_over_rows(rows, length):
    users, times, clicked, items = map(np.array, zip(*rows))
    found = past_clicks(users, times, clicked, items, length)
    order = np.lexsort((times, users))
    for row in range(len(rows)):
        past = [i for i in order if users[i] == users[row] and times[i] < times[row] and clicked[i]]
        expected = [items[i] for i in past][-length:]
        assert found[row].tolist() == expected + [0] * (length - len(expected))


def test_rare_values_are_unknown():
    vocabulary = CtrVocabulary.fit(["a", "b", "a", None, 3, "3"], min_count=2)
    assert vocabulary.values == ["3", "a"] and len(vocabulary) == 4
    assert vocabulary.encode(["b", None, "a", 3, "c"]).tolist() == [1, 0, 3, 2, 1]
    assert CtrVocabulary.fit([]).encode(["x", None]).tolist() == [1, 0]
    data = encode_ctr(splits(), COLUMNS, min_count={"what": 2})
    assert data.vocabularies["what"].values == ["11"] and data.vocabularies["who"].values == ["ann", "bob"]
    with pytest.raises(ValueError, match="repeats a value"):
        CtrVocabulary(["a", "a"])


def test_batches_of_tensors_and_of_rows_are_the_same():
    data = encode_ctr(splits(), COLUMNS, history_length=2)
    rows, encoded = data.rows("train"), data.splits["train"]
    assert {"user", "time", "labels"} <= set(encoded.column_names)
    batches = [
        next(iter(DataLoader(source, batch_size=3, collate_fn=CtrCollator())))
        for source in (rows, encoded, encoded.with_format("torch"), [rows[i] for i in range(3)])
    ]
    for batch in batches:
        assert set(batch) == {"categorical_features", "numeric_features", "sequence_features", "labels"}
        for name, tensor in batch.items():
            assert tensor.dtype == rows.tensors[name].dtype
            assert torch.equal(tensor, rows.tensors[name][:3]), name
    model = CtrForCtrPrediction(data.config("din", embedding_dim=4))
    assert model(**batches[0]).loss.isfinite() and model.config.prior == 0.5


def test_columns_that_a_correction_adds_reach_the_model():
    encoded = encode_ctr(splits(), COLUMNS).splits["train"]
    soft = encoded.map(lambda row: {"labels": row["labels"] / 2, "sample_weight": 3.0})
    rows = CtrRows.from_dataset(soft)
    assert rows.tensors["labels"].tolist() == [0.5, 0, 0.5, 0] and rows.tensors["sample_weight"].tolist() == [3.0] * 4
    assert torch.equal(rows.tensors["sequence_features"], CtrRows.from_dataset(encoded).tensors["sequence_features"])
    few = CtrRows.from_dataset(encoded.select([2, 0]))
    assert few.tensors["categorical_features"][:, 2].tolist() == [4, 2]


def test_rows_of_each_user():
    rows = encode_ctr(splits(), COLUMNS).rows("train")
    parts = rows.by_user()
    assert {user: len(part) for user, part in parts.items()} == {0: 3, 1: 1}
    assert parts[0].tensors["labels"].tolist() == [1, 1, 0]
    assert rows.select(rows.users == 1).tensors["labels"].tolist() == [0]
    for tensors, users, message in (
        ({"a": torch.zeros(2), "b": torch.zeros(3)}, None, "must agree"),
        ({"a": torch.zeros(2)}, torch.zeros(3), "2 rows, but 3 users"),
    ):
        with pytest.raises(ValueError, match=message):
            CtrRows(tensors, users)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda s: s.map(lambda row: {"who": None}), {}, "rows have no 'who'"),
        (lambda s: s.map(lambda row: {"when": None}), {}, "rows have no 'when'"),
        (lambda s: s.map(lambda row: {"price": float("inf")}), {}, "values of 'price' are infinite"),
        (lambda s: s, {"history_length": 1, "history_until": "test"}, "history_until='test' is not known"),
        (lambda s: s.rename_column("town", "city"), {}, r"lacks the columns \['town'\]"),
        (lambda s: s.map(lambda row: {"clicked": 4}), {}, "'clicked' holds .*4.*; clicks are 0 or 1"),
        (lambda s: DatasetDict(test=s["test"]), {}, "no split 'train' with rows"),
    ],
)
def test_tables_that_do_not_fit(change, options, message):
    with pytest.raises(ValueError, match=message):
        encode_ctr(change(splits()), COLUMNS, **options)


def test_a_history_needs_a_time():
    with pytest.raises(ValueError, match="name the column of the time"):
        encode_ctr(splits(), CtrColumns(user="who", item="what", label="clicked"), history_length=3)


# Histories, numbers and times that would mislead


def test_histories_can_end_where_training_ends():
    """Rows of a test know what was clicked in training, and not the test's own earlier labels."""
    rows = [("ann", item, "rome", "x", 1, 1.0, [], when, 1) for when, item in enumerate([10, 11, 12, 10, 11])]
    parts = DatasetDict(train=table(rows[:3]), validation=table(rows[3:4]), test=table(rows[4:]))
    ids = {10: 2, 11: 3, 12: 4}
    histories = {}
    for until in ("row", "train"):
        data = encode_ctr(parts, COLUMNS, history_length=3, history_until=until)
        histories[until] = {s: data.rows(s).tensors["sequence_features"][:, 1].tolist() for s in parts}
    trained = [[0, 0, 0], [ids[10], 0, 0], [ids[10], ids[11], 0]]
    assert histories["train"] == {"train": trained} | {
        s: [[ids[10], ids[11], ids[12]]] for s in ("validation", "test")
    }
    assert histories["row"]["train"] == trained
    assert histories["row"]["test"] == [[ids[11], ids[12], ids[10]]]


def test_a_number_that_does_not_vary_is_not_blown_up():
    """The deviation of .1, .1, .1 is 1.4e-17 by rounding: dividing by it made .2 a 7e15."""

    def prices(values):
        return table([("ann", 1, "rome", "x", 1, value, [], 1, 1) for value in values])

    data = encode_ctr(DatasetDict(train=prices([0.1] * 3), test=prices([0.2, None])), COLUMNS)
    assert data.rows("train").tensors["numeric_features"].abs().max() < 1e-6
    assert data.rows("test").tensors["numeric_features"].flatten().tolist() == pytest.approx([0.1, 0.0])
    empty = encode_ctr(DatasetDict(train=prices([None] * 2), test=prices([0.2])), COLUMNS)
    assert empty.rows("train").tensors["numeric_features"].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("kind", [datetime.datetime, datetime.date])
def test_dates_are_times(kind):
    rows = splits()["train"]
    days = [kind(2026, 1, 1 + when) for when in rows["when"][:]]
    dated = rows.remove_columns("when").add_column("when", days)
    expected = encode_ctr(DatasetDict(train=rows), COLUMNS, history_length=2).rows("train")
    data = encode_ctr(DatasetDict(train=dated), COLUMNS, history_length=2)
    found = data.rows("train")
    assert torch.equal(found.tensors["sequence_features"], expected.tensors["sequence_features"])
    assert np.diff(np.unique(data.splits["train"]["time"][:])).tolist() == [24 * 3600 * 10**6]


def test_users_can_be_held_from_the_cloud():
    data = encode_ctr(splits(), COLUMNS)
    part = data.without_users([0], ("train",))
    assert list(part.splits) == ["train"] and part.rows("train").users.tolist() == [1] and part.prior == 0.0
    assert part.features == data.features and data.rows("train").users.tolist() == [0, 1, 0, 0]
    assert part.fingerprint != data.fingerprint == encode_ctr(splits(), COLUMNS).fingerprint
    changed = splits()
    changed["test"] = changed["test"].map(lambda row, i: {"clicked": row["clicked"] if i else 0}, with_indices=True)
    assert encode_ctr(changed, COLUMNS).fingerprint != data.fingerprint
