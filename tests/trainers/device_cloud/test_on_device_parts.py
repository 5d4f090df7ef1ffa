"""Padding, chunks, tables of a few rows, and the AUC of many users at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call

from hf_models.ctr import CtrForCtrPrediction
from trainers.data import CtrColumns, encode_ctr, user_split
from trainers.data.drifted_clicks import draw_drifted_clicks
from trainers.device_cloud.on_device import OnDeviceArguments, OnDeviceFineTuner
from trainers.device_cloud.on_device_rows import RowsByUser, auc_of_users, batch_positions, chunks_of
from trainers.device_cloud.on_device_tables import OwnRows, own_rows, read_rows, rows_of_users, tables_among
from trainers.evaluation.users import auc_by_user


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(1, 4))
def test_padding_holds_every_row_once(users, last):
    users = torch.tensor(users)
    by_user = RowsByUser(users, last=last)
    asked = torch.arange(8)
    padded = by_user.padded(asked)
    for user, index, mask in zip(asked.tolist(), padded.index, padded.mask):
        own = (users == user).nonzero()[:, 0]
        assert index[mask].tolist() == own[-last:].tolist() and not index[~mask].any()
    assert sorted(by_user.kept().tolist()) == sorted(padded.index[padded.mask].tolist())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 60))
def test_chunks_hold_everybody_and_fit(counts, limit):
    counts = torch.tensor(counts)
    chunks = list(chunks_of(torch.arange(len(counts)), counts, bytes_of=lambda count: 2 * count, max_bytes=limit))
    assert sorted(torch.cat(chunks).tolist()) == list(range(len(counts)))
    for chunk in chunks:
        assert len(chunk) == 1 or len(chunk) * 2 * int(counts[chunk].max()) <= limit


def test_batches_are_epochs_of_each_users_own_order():
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    both = batch_positions(mask, torch.tensor([7, 9]), steps=5, batch_size=3, seed=1)
    alone = batch_positions(mask[1:], torch.tensor([9]), steps=5, batch_size=3, seed=1)
    assert torch.equal(both[1:], alone)
    for row, count in zip(both.flatten(1), (3, 5)):
        for epoch in row.view(-1, count):
            assert sorted(epoch.tolist()) == list(range(count))
    assert not torch.equal(both, batch_positions(mask, torch.tensor([7, 9]), steps=5, batch_size=3, seed=2))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=6), min_size=1, max_size=4))
def test_auc_of_many_users(users):
    width = max(1, max(map(len, users)))
    scores, labels = torch.zeros(len(users), width).double(), torch.zeros(len(users), width)
    mask = torch.zeros(len(users), width).bool()
    for row, samples in enumerate(users):
        for column, (score, label) in enumerate(samples):
            scores[row, column], labels[row, column], mask[row, column] = score, label, True
    found = auc_of_users(scores, labels, mask).numpy()
    for row, samples in enumerate(users):
        if not samples:
            assert np.isnan(found[row])
            continue
        expected = auc_by_user(*np.array(samples, dtype=float).T, np.zeros(len(samples))).values[0]
        assert found[row] == pytest.approx(expected, nan_ok=True)


class Bag(nn.Module):
    """Two tables, one of them read twice, and one of positions."""

    def __init__(self):
        super().__init__()
        self.word = nn.Embedding(9, 2, padding_idx=0)
        self.other = nn.Embedding(5, 2)
        self.place = nn.Embedding(4, 2)
        self.tied = nn.Embedding(9, 2)
        self.out = nn.Linear(2, 9, bias=False)
        self.out.weight = self.tied.weight

    def forward(self, a, b, c):
        places = self.place(torch.arange(2)[None])
        return self.word(a).sum(1) + self.word(b) + self.other(c) + places.sum(1)


def test_the_rows_that_samples_read():
    model = Bag()
    names = [name for name, _ in model.named_parameters()]
    tables = tables_among(model, names)
    assert set(tables) == {"word", "other", "place"}  # a tied weight is read whole by somebody else
    a, b, c = torch.tensor([[1, 2], [0, 3], [3, 3]]), torch.tensor([4, 0, 3]), torch.tensor([0, 4, 4])

    def predict():
        model(a[:2], b[:2], c[:2])
        model(a[2:], b[2:], c[2:])
        return [2, 1]

    read = read_rows(tables, predict)
    assert set(read) == {"word", "other"}
    assert read["word"].tolist() == [[1, 2, 4], [9, 3, 9], [3, 3, 3]]
    assert read["other"].tolist() == [[0], [4], [4]]
    padded = RowsByUser(torch.tensor([5, 5, 6])).padded(torch.tensor([5, 6, 8]))
    assert rows_of_users(read["word"], padded, 9).tolist() == [[1, 2, 3, 4], [3, 9, 9, 9], [9, 9, 9, 9]]
    assert not model.word._forward_pre_hooks


def test_own_rows_come_before_the_table():
    model = Bag()
    ids = (torch.tensor([[1, 2], [0, 3]]), torch.tensor([4, 0]), torch.tensor([0, 4]))
    expected = model(*ids)
    with own_rows(model, {"word": model.word}):
        assert isinstance(model.word, OwnRows)
        torch.testing.assert_close(model(*ids), expected)
        own, rows = torch.randn(2, 2), torch.tensor([2, 4])
        found = functional_call(model, {"word.own": own, "word.rows": rows}, ids)
    assert type(model.word) is nn.Embedding
    with torch.no_grad():
        model.word.weight[rows] = own
    torch.testing.assert_close(found, model(*ids))


COLUMNS = CtrColumns(user="user", item="item", label="label", time="time", item_features=("kind",))


@pytest.mark.parametrize("architecture", ["lr", "wide_deep", "pnn", "deepfm", "din"])
def test_every_ctr_model_in_batches_as_one_by_one(architecture):
    drawn = draw_drifted_clicks(num_users=6, num_items=40, num_local=20, num_test=5)
    rows = drawn.splits["train"]
    rows = rows.add_column("time", list(range(len(rows)))).add_column("kind", [i % 3 for i in rows["item"]])
    data = encode_ctr(user_split(rows, "user", time_column="time"), COLUMNS, history_length=4)
    torch.manual_seed(0)
    model = CtrForCtrPrediction(data.config(architecture, embedding_dim=4, hidden_sizes=[6])).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    train, test = data.rows("train"), data.rows("test")
    logits = []
    for vectorized in (True, False):
        args = OnDeviceArguments(device_steps=3, device_learning_rate=0.5, min_samples=2, vectorized=vectorized)
        tuner = OnDeviceFineTuner(model, args)
        logits.append(tuner.fit(train, validation=data.rows("validation"), predict={"t": test}).logits["t"])
    torch.testing.assert_close(*logits, rtol=1e-6, atol=1e-8)
    assert not torch.allclose(logits[0], tuner.predict_cloud(test), atol=1e-3)


@pytest.mark.slow
def test_a_users_package_runs_under_onnxruntime(tmp_path):
    """Saved, loaded, exported: a phone computes what was fine-tuned."""
    onnxruntime = pytest.importorskip("onnxruntime")
    data = draw_drifted_clicks(num_users=4, num_items=30, num_local=10, num_test=4).data()
    torch.manual_seed(0)
    model = CtrForCtrPrediction(data.config("deepfm", embedding_dim=4, hidden_sizes=[6]))
    train, test = data.rows("train"), data.rows("test")
    tuner = OnDeviceFineTuner(model, OnDeviceArguments(min_samples=2, device_learning_rate=0.5))
    results = tuner.fit(train, predict={"test": test}, store=tmp_path / "users")
    tuner.save_user(tmp_path / "users", 2, tmp_path / "package")
    package = CtrForCtrPrediction.from_pretrained(tmp_path / "package").eval()
    mine = test.users == 2
    inputs = {"categorical_features": test.tensors["categorical_features"][mine]}
    with torch.no_grad():
        torch.testing.assert_close(package(**inputs).logits, results.logits["test"][mine])

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.package = package

        def forward(self, categorical_features):
            return self.package(categorical_features).logits

    rows, path = {"categorical_features": {0: torch.export.Dim.DYNAMIC}}, tmp_path / "package.onnx"
    options = {"dynamo": True, "dynamic_shapes": rows, "output_names": ["logits"], "verbose": False}
    torch.onnx.export(Logits().eval(), (), path, kwargs=inputs, **options)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(["logits"], {name: tensor.numpy() for name, tensor in inputs.items()})
    np.testing.assert_allclose(found, results.logits["test"][mine].numpy(), atol=1e-5)
    assert not np.allclose(found, tuner.predict_cloud(test)[mine].numpy(), atol=1e-3)
