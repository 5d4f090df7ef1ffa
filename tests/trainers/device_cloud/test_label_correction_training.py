"""The callback and the collator in real Trainers: the training set alone is corrected, once, and what cannot be is
refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedConfig, PreTrainedModel, Trainer
from transformers import TrainingArguments as Arguments
from transformers.modeling_outputs import SequenceClassifierOutput

from trainers.device_cloud.label_correction import LabelCorrectionError, correct_labels, local_shares
from trainers.device_cloud.label_correction_training import LabelCorrectionCallback, LabelCorrectionCollator


class TinyConfig(PreTrainedConfig):
    """One weight a feature."""

    model_type = "tiny_click"


class TinyClicks(PreTrainedModel):
    """Logistic regression that remembers the labels it was shown, by mode."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.linear = nn.Linear(2, 1)
        self.seen = {True: [], False: []}
        self.post_init()

    def forward(self, x, labels=None):
        logits = self.linear(x)[:, 0]
        self.seen[self.training] += labels.tolist()
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


USERS = ["a"] * 8 + ["b"] * 4
LABELS = [1.0] * 6 + [0.0] * 2 + [0.0] * 3 + [1.0]


def dataset(labels=LABELS, column="labels"):
    x = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(1))
    return Dataset.from_dict({"x": x.tolist(), column: labels, "user": USERS[: len(labels)]}).cast_column(
        "x", Dataset.from_dict({"x": x.tolist()}).features["x"]
    )


def trainer_of(folder, train=None, model=None, **options):
    arguments = Arguments(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    model = TinyClicks(TinyConfig()) if model is None else model
    data = dataset() if train is None else train
    return Trainer(model, arguments, train_dataset=data, eval_dataset=dataset())


def test_only_the_training_set_is_corrected(tmp_path):
    trainer = trainer_of(tmp_path)
    LabelCorrectionCallback(p_ref=0.4, group_column="user").install(trainer)
    trainer.train()
    soft = correct_labels(np.array(LABELS), 0.4, groups=USERS)
    assert set(np.round(trainer.model.seen[True], 5)) == set(np.round(soft, 5))
    assert set(trainer.model.seen[False]) == {0.0, 1.0}
    first, *later = [row for row in trainer.state.log_history if "loss" in row]
    assert first["label_correction/mean_label"] == pytest.approx(0.4)
    assert first["label_correction/p_local"] == pytest.approx(np.mean(LABELS), abs=1e-6)
    assert first["label_correction/p_ref"] == 0.4
    assert later and not any("label_correction/p_ref" in row for row in later)


def test_the_new_column_keeps_what_was_there(tmp_path):
    before = dataset(np.array(LABELS, dtype=np.float32), "label")
    fingerprints = []
    for p in (0.4, 0.4, 0.5):
        trainer = trainer_of(tmp_path, before)
        LabelCorrectionCallback(p_ref=p, method="shift").install(trainer)
        after = trainer.train_dataset
        assert after.features == before.features and after["user"][:] == before["user"][:]
        assert np.mean(after["label"][:]) == pytest.approx(p, abs=1e-6)
        fingerprints.append(after._fingerprint)
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]
    assert before["label"][:] == LABELS


def test_the_prior_of_the_model(tmp_path):
    trainer = trainer_of(tmp_path)
    with torch.no_grad():
        trainer.model.linear.weight.zero_()
        trainer.model.linear.bias.fill_(-1.0)
    LabelCorrectionCallback(p_ref="model", group_column="user").install(trainer)
    soft = np.array(trainer.train_dataset["labels"][:])
    expected = torch.tensor(-1.0).sigmoid().item()
    assert [soft[:8].mean(), soft[8:].mean()] == pytest.approx([expected] * 2, abs=1e-6)


def test_a_sequence_classifier_of_transformers(tmp_path):
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
        problem_type="multi_label_classification",
    )
    labels = [[float(i % 4 > 0)] for i in range(12)]
    data = Dataset.from_dict({"input_ids": [[1, 2, i % 20] for i in range(12)], "labels": labels})
    trainer = trainer_of(tmp_path, data, BertForSequenceClassification(config))
    trainer.eval_dataset = data
    LabelCorrectionCallback(p_ref=0.3).install(trainer)
    assert np.mean(trainer.train_dataset["labels"][:]) == pytest.approx(0.3, abs=1e-6)
    trainer.train()
    assert np.mean(trainer.eval_dataset["labels"][:]) == 0.75


def test_a_second_correction_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    LabelCorrectionCallback(p_ref=0.4).install(trainer)
    corrected = trainer.train_dataset
    with pytest.raises(LabelCorrectionError, match="already"):
        LabelCorrectionCallback(p_ref=0.4).install(trainer)
    with pytest.raises(LabelCorrectionError, match="already"):
        LabelCorrectionCallback(p_ref=0.5).install(trainer_of(tmp_path, corrected))
    with pytest.raises(LabelCorrectionError, match="corrected before"):
        LabelCorrectionCallback(p_ref=0.5).install(trainer_of(tmp_path, corrected.shuffle(seed=0)))
    corrected.save_to_disk(tmp_path / "saved")
    with pytest.raises(LabelCorrectionError, match="corrected"):
        LabelCorrectionCallback(p_ref=0.4).install(trainer_of(tmp_path, Dataset.load_from_disk(tmp_path / "saved")))
    assert trainer.train_dataset is corrected


def test_integers_are_refused(tmp_path):
    whole = dataset([int(label) for label in LABELS])
    with pytest.raises(LabelCorrectionError, match="float32"):
        LabelCorrectionCallback(p_ref=0.4).install(trainer_of(tmp_path, whole))
    collator = LabelCorrectionCollator(0.4, 0.6)
    with pytest.raises(LabelCorrectionError, match="float32"):
        collator([whole[0]])


@pytest.mark.parametrize("corrector", [LabelCorrectionCallback(p_ref=0.4), LabelCorrectionCollator(0.4, 0.5)])
def test_a_head_of_integers_is_refused(tmp_path, corrector):
    model = TinyClicks(TinyConfig(problem_type="single_label_classification"))
    with pytest.raises(LabelCorrectionError, match="single_label_classification"):
        corrector.install(trainer_of(tmp_path, model=model))


def test_without_install_it_does_not_train(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.add_callback(LabelCorrectionCallback(p_ref=0.4))
    with pytest.raises(LabelCorrectionError, match="callback.install"):
        trainer.train()


def test_a_stream_is_refused(tmp_path):
    with pytest.raises(LabelCorrectionError, match="LabelCorrectionCollator"):
        LabelCorrectionCallback(p_ref=0.4).install(trainer_of(tmp_path, dataset().to_iterable_dataset()))


def test_several_labels_a_row_are_refused(tmp_path):
    wide = dataset().remove_columns("labels").add_column("labels", [[0.0, 1.0]] * len(LABELS))
    with pytest.raises(LabelCorrectionError, match="2 labels a row"):
        LabelCorrectionCallback(p_ref=0.4).install(trainer_of(tmp_path, wide))


def test_no_label_is_said(tmp_path):
    with pytest.raises(LabelCorrectionError, match="No column labels or label in x, y"):
        LabelCorrectionCollator(0.4, 0.5)([{"x": 1.0, "y": 1.0}])


def test_the_collator_does_the_same_on_the_fly(tmp_path):
    trainer = trainer_of(tmp_path, remove_unused_columns=False)
    trainer.eval_dataset = dataset().remove_columns("user")
    collator = LabelCorrectionCollator.of_dataset(trainer.train_dataset, 0.4, group_column="user")
    collator.install(trainer)
    trainer.train()
    soft = correct_labels(np.array(LABELS), 0.4, groups=USERS)
    assert set(np.round(trainer.model.seen[True], 5)) == set(np.round(soft, 5))
    assert set(trainer.model.seen[False]) == {0.0, 1.0}
    with pytest.raises(LabelCorrectionError, match="already"):
        LabelCorrectionCollator(0.4, 0.5).install(trainer)


def test_the_collator_leaves_rows_as_they_are():
    rows = [dataset()[0] | {"labels": 1.0}]
    shares = {"a": 0.75, "b": 0.25}
    collator = LabelCorrectionCollator(0.3, shares, group_column="user")
    assert collator(rows)["labels"].tolist() == pytest.approx([0.4]) and rows[0]["labels"] == 1.0
    soft = [row | {"labels": value} for row, value in zip(rows, [0.4])]
    with pytest.raises(LabelCorrectionError, match="corrected before"):
        collator(soft)
    listed = LabelCorrectionCollator(0.3, 0.75)([{"x": [0.0, 1.0], "labels": [1.0]}])
    assert listed["labels"].shape == (1, 1)


def test_the_groups_must_reach_the_collator(tmp_path):
    collator = LabelCorrectionCollator(0.4, local_shares(np.array(LABELS), USERS), group_column="user")
    with pytest.raises(ValueError, match="remove_unused_columns"):
        collator.install(trainer_of(tmp_path))
    with pytest.raises(ValueError, match="group_column"):
        LabelCorrectionCollator(0.4, {"a": 0.5})
