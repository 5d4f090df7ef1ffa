"""The cloud's training, by a real Trainer: the best epoch is kept, and what was measured is what the model gives."""

import dataclasses

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from hf_models.ctr import CtrForCtrPrediction
from trainers.data import CtrColumns, encode_ctr
from trainers.evaluation import ranking_metrics
from trainers.recipes.ctr_training import CtrTrainingArguments, predict_ctr, train_ctr


def clicks(rows: int = 3000):
    """Every user likes every third item, from another one on."""
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 30, rows), rng.integers(0, 24, rows)
    chance = np.where((users + items) % 3 == 0, 0.9, 0.1)
    columns = {
        "user": users,
        "item": items,
        "label": (rng.random(rows) < chance).astype(float),
        "time": np.arange(rows),
    }
    table = Dataset.from_dict(columns)
    parts = {
        "train": range(0, rows // 2),
        "validation": range(rows // 2, 3 * rows // 4),
        "test": range(3 * rows // 4, rows),
    }
    splits = DatasetDict({name: table.select(part) for name, part in parts.items()})
    return encode_ctr(splits, CtrColumns(user="user", item="item", label="label", time="time"), history_length=4)


def arguments(folder, **fields):
    quiet = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    shape = {"embedding_dim": 8, "hidden_sizes": [16], "per_device_train_batch_size": 128, "num_train_epochs": 12}
    return CtrTrainingArguments(output_dir=str(folder), **(quiet | shape | {"learning_rate": 0.02} | fields))


def test_the_best_epoch_is_kept_and_measured(tmp_path):
    data = clicks()
    model, found = train_ctr(arguments(tmp_path / "run"), data)
    assert found["test"]["gauc"] > 0.8 and found["validation"]["auc"] > 0.8
    assert 1 <= found["best_epoch"] <= found["epochs"] <= 12 and found["rows_per_second"] > 0
    assert not model.training and model.config.prior == data.prior
    for split in ("validation", "test"):
        rows = data.rows(split)
        logits = predict_ctr(model, rows, batch_size=100)
        assert ranking_metrics(logits, rows.tensors["labels"].numpy(), rows.users.numpy()) == found[split]
        np.testing.assert_allclose(logits, predict_ctr(model, rows), atol=1e-5)
    kept = [CtrForCtrPrediction.from_pretrained(folder) for folder in (tmp_path / "run").glob("checkpoint-*")]
    logits = [predict_ctr(other, data.rows("test")) for other in kept]
    assert any(np.allclose(other, predict_ctr(model, data.rows("test")), atol=1e-5) for other in logits)


def test_the_same_seed_gives_the_same_model_and_patience_ends_training(tmp_path):
    data, options = clicks(900), {"learning_rate": 0.2, "patience": 1, "num_train_epochs": 30, "architecture": "pnn"}
    first, again, other = (
        train_ctr(arguments(tmp_path / str(i), seed=seed, **options), data) for i, seed in enumerate((0, 0, 1))
    )
    assert first[1]["test"] == again[1]["test"] != other[1]["test"]
    assert first[1]["epochs"] == first[1]["best_epoch"] + 1 < 30


def test_what_cannot_be_trained(tmp_path):
    data = clicks(300)
    without = dataclasses.replace(data, splits=DatasetDict(train=data.splits["train"]))
    with pytest.raises(ValueError, match="chosen on a split 'validation'"):
        train_ctr(arguments(tmp_path), without)
    alone = data.splits["validation"].filter(lambda label: label == 1, input_columns="labels")
    one_class = dataclasses.replace(data, splits=DatasetDict(train=data.splits["train"], validation=alone))
    with pytest.raises(ValueError, match="No user of the validation split"):
        train_ctr(arguments(tmp_path / "one", num_train_epochs=1), one_class)
