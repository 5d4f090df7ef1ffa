import os
import shutil
import socket
import time

import pytest
import torch
from transformers import TrainerCallback

from tests.trainers.reliability.interrupted_run import SERVER, same_weights, tiny_data, tiny_model, tiny_trainer
from trainers.callbacks.validated_checkpoint import ABANDONED_MANIFEST, ValidatedCheckpointCallback
from trainers.reliability.checkpoints import (
    MANIFEST_NAME,
    checkpoint_folders,
    config_fingerprint,
    find_last_valid_checkpoint,
    manifest_state,
    read_latest,
    read_manifest,
    stop_requiring_manifests,
    validate_checkpoint,
)
from trainers.reliability.events import EVENTS_NAME, read_events


def names(folder) -> list[str]:
    return [path.name for path in checkpoint_folders(folder)]


@pytest.mark.parametrize("background", [True, False])
def test_every_checkpoint_is_committed_and_nothing_is_said(tmp_path, background):
    trainer = tiny_trainer(tmp_path, ValidatedCheckpointCallback(background=background), max_steps=5, save_steps=2)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-5"]
    assert all(validate_checkpoint(folder, require_manifest=True) == [] for folder in checkpoint_folders(tmp_path))
    assert read_latest(tmp_path) == "checkpoint-5"
    manifest = read_manifest(tmp_path / "checkpoint-4")
    assert (manifest["step"], manifest["world_size"]) == (4, 1)
    assert manifest["config_sha256"] == config_fingerprint(trainer.model.config)
    assert "training_args.bin" not in manifest["files"]
    assert not (tmp_path / EVENTS_NAME).exists()


def test_the_weights_are_those_of_a_run_without_it(tmp_path):
    tiny_trainer(tmp_path / "a", ValidatedCheckpointCallback(), max_steps=4).train()
    tiny_trainer(tmp_path / "b", max_steps=4).train()
    assert same_weights(tmp_path / "a" / "checkpoint-4", tmp_path / "b" / "checkpoint-4")


class Poison(TrainerCallback):
    """Weights that are never used, so that they do not spoil the others."""

    def __init__(self, *steps):
        self.steps = steps

    def on_step_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            model.get_input_embeddings().weight[64, 0] = float("nan") if state.global_step in self.steps else 0.0


def test_weights_that_are_not_finite_are_refused(tmp_path):
    callbacks = Poison(2, 6), ValidatedCheckpointCallback(background=False)
    tiny_trainer(tmp_path, *callbacks, max_steps=6, model=tiny_model(vocab_size=65)).train()
    assert [manifest_state(f) for f in checkpoint_folders(tmp_path)] == ["refused", "committed", "refused"]
    assert find_last_valid_checkpoint(tmp_path).name == read_latest(tmp_path) == "checkpoint-4"
    events = read_events(tmp_path)
    assert [(e.severity, e.step) for e in events] == [("error", 2), ("error", 6)]
    assert (
        "model.embed_tokens.weight in model.safetensors has 1 of" in events[0].message
        and events[0].evidence["count"] == 1
    )


def test_a_limit_never_counts_what_is_not_committed(tmp_path):
    """With Trainer's own rotation the refused checkpoint-6 would have pushed out the last good one."""
    options = {"max_steps": 6, "save_total_limit": 1, "model": tiny_model(vocab_size=65)}
    trainer = tiny_trainer(tmp_path, Poison(4, 6), ValidatedCheckpointCallback(), **options)
    trainer.train()
    assert find_last_valid_checkpoint(tmp_path).name == "checkpoint-2"
    assert trainer.args.save_total_limit == 1, "given back"


def test_the_limit_is_kept(tmp_path):
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), save_total_limit=2).train()
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-10"]


def test_the_limit_keeps_whole_checkpoints_from_before_the_callback(tmp_path):
    tiny_trainer(tmp_path, max_steps=6).train()
    trainer = tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=10, save_total_limit=3)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert names(tmp_path) == ["checkpoint-6", "checkpoint-8", "checkpoint-10"]


def test_a_run_that_goes_on_without_it_is_not_asked_for_manifests(tmp_path):
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=4).train()
    stop_requiring_manifests(tmp_path)
    tiny_trainer(tmp_path, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert find_last_valid_checkpoint(tmp_path).name == "checkpoint-6"
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=8).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-6")
    )
    (tmp_path / "checkpoint-8" / MANIFEST_NAME).unlink()
    assert find_last_valid_checkpoint(tmp_path).name == "checkpoint-6"


def test_the_best_is_kept(tmp_path):
    class WorseAndWorse(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    callbacks = WorseAndWorse(), ValidatedCheckpointCallback()
    tiny_trainer(tmp_path, *callbacks, max_steps=6, eval_dataset=tiny_data(4), **options).train()
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-6"], "the best, and what to resume from"


def test_an_interrupted_run_still_holds_its_limit(tmp_path):
    """An exception leaves the limit with the callback; another run with the same objects goes on with it."""

    class Break(TrainerCallback):
        broken = False

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 5 and not self.broken:
                self.broken = True
                raise KeyError("something else")

    trainer = tiny_trainer(tmp_path, Break(), ValidatedCheckpointCallback(), save_total_limit=2)
    with pytest.raises(KeyError):
        trainer.train()
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert names(tmp_path) == ["checkpoint-8", "checkpoint-10"] and trainer.args.save_total_limit == 2


def test_files_of_other_callbacks_belong_to_the_checkpoint(tmp_path):
    class Note(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (tmp_path / f"checkpoint-{state.global_step}" / "note.json").write_text("{}")

    tiny_trainer(tmp_path, ValidatedCheckpointCallback(background=False), Note(), max_steps=2).train()
    assert "note.json" in read_manifest(tmp_path / "checkpoint-2")["files"]


def test_saved_at_the_end_of_an_epoch(tmp_path):
    options = {"save_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), data=tiny_data(8), **options).train()
    assert [manifest_state(f) for f in checkpoint_folders(tmp_path)] == ["committed", "committed"]


def test_a_branch_that_was_left_is_put_aside(tmp_path):
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=6).train()
    again = tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=3, save_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert find_last_valid_checkpoint(tmp_path).name == read_latest(tmp_path) == "checkpoint-3"
    assert (tmp_path / "checkpoint-6" / ABANDONED_MANIFEST).exists()
    assert [e.message for e in read_events(tmp_path)] == [
        f"checkpoint-{step} is of a branch that was left: resuming does not use it any more." for step in (4, 6)
    ]


def test_checkpoints_from_before_the_callback_still_count(tmp_path):
    tiny_trainer(tmp_path, max_steps=2).train()
    trainer = tiny_trainer(tmp_path, ValidatedCheckpointCallback(), max_steps=4)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert find_last_valid_checkpoint(tmp_path).name == "checkpoint-2"


def test_a_folder_that_vanishes_is_no_incident(tmp_path):
    class Vanish(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / f"checkpoint-{state.global_step}")

    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), Vanish(), max_steps=2).train()
    assert not (tmp_path / EVENTS_NAME).exists()


def train_rank(rank: int, folder, port: int) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}

    class Late(TrainerCallback):
        """Rank 1 comes to `on_save` late, as if its disk was slow: rank 0 must not commit without its files."""

        def on_save(self, args, state, control, **kwargs):
            if rank == 1:
                file = folder / f"checkpoint-{state.global_step}" / "rng_state_1.pth"
                content = file.read_bytes()
                file.unlink()
                time.sleep(0.5)
                file.write_bytes(content)

    trainer = tiny_trainer(folder, Late(), ValidatedCheckpointCallback(background=False), max_steps=2)
    assert trainer.args.world_size == 2
    trainer.train()


def test_two_ranks(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [SERVER.Process(target=train_rank, args=(rank, tmp_path, port)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0, 0]
    manifest = read_manifest(tmp_path / "checkpoint-2")
    assert manifest["world_size"] == 2 and {"rng_state_0.pth", "rng_state_1.pth"} <= set(manifest["files"])
    assert validate_checkpoint(tmp_path / "checkpoint-2") == [] and not (tmp_path / EVENTS_NAME).exists()
