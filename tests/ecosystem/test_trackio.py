"""Trackio, Hugging Face's own tracker, keeps what a Trainer logs."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from tests.ecosystem.families import CAUSAL_LMS, LEARNERS, Learner


def token_rows():
    ids = torch.arange(1, 25).reshape(4, 6)
    return [{"input_ids": row, "labels": row} for row in ids]


TRAINED = LEARNERS + [Learner(method=family.method, model=family.model, rows=token_rows) for family in CAUSAL_LMS]


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """Trackio's own, in a folder of its own: it reads where that is when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        pytest.importorskip(
            "trackio", reason="needs trackio, which wants pillow < 13: pip install trackio 'pillow<13'"
        )
        from trackio.sqlite_storage import SQLiteStorage

        yield SQLiteStorage


@pytest.mark.parametrize("family", TRAINED, ids=lambda family: family.method)
@pytest.mark.compatibility("Trackio", library="trackio")
def test_trackio_keeps_the_loss_of_every_step(family, storage, tmp_path):
    args = TrainingArguments(
        str(tmp_path), max_steps=3, logging_steps=1, learning_rate=1e-2, save_strategy="no", use_cpu=True,
        report_to="trackio", project="families", run_name=family.method, trackio_static_space_id=False,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(family.model(), args, train_dataset=family.rows())
    trainer.train()
    kept = storage.get_logs("families", family.method)
    losses = {entry["train/global_step"]: entry["train/loss"] for entry in kept if "train/loss" in entry}
    logged = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    assert losses == pytest.approx(logged, rel=1e-6) and len(logged) == 3
