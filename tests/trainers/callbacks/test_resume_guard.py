import dataclasses
import json
import logging

import pytest
import torch
from transformers import TrainerCallback, get_scheduler

from tests.trainers.reliability.interrupted_run import same_weights, tiny_data, tiny_model, tiny_trainer
from trainers.callbacks.resume_guard import (
    RECORD_NAME,
    BatchRampUp,
    ResumeError,
    ResumeGuardCallback,
    batch_ramp_up,
    read_record,
    set_learning_rate,
    tokenizer_fingerprint,
)
from trainers.callbacks.validated_checkpoint import ValidatedCheckpointCallback
from trainers.data import train_tokenizer
from trainers.reliability.checkpoints import read_manifest
from trainers.reliability.events import EVENTS_NAME, read_events


class Seen(TrainerCallback):
    """The rows and the learning rate of each step."""

    def __init__(self):
        self.rows, self.rates = [], []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._hook = model.register_forward_pre_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs):
        if module.training:
            self.rows += [8 * int(row[0]) + int(row[1]) for row in kwargs["input_ids"]]

    def on_pre_optimizer_step(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rates.append(lr_scheduler.get_last_lr()[0])

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()


def run(folder, resume=None, *, guard=None, data=None, **options):
    seen = Seen()
    guard = ResumeGuardCallback() if guard is None else guard
    trainer = tiny_trainer(folder, seen, guard, data=data, **options)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume}") if resume else None)
    return seen, trainer


def keyed(key: str, **options) -> ResumeGuardCallback:
    return ResumeGuardCallback(data_key=key, **options)


# --- what is recorded ---------------------------------------------------------------------------------------------


def test_the_record(tmp_path):
    _, trainer = run(tmp_path, guard=keyed("a"), max_steps=4, gradient_accumulation_steps=2)
    record = read_record(tmp_path / "checkpoint-4")
    assert (record.step, record.batch_size, record.consumed_samples) == (4, 8, 32)
    assert (record.data_key, record.data_start_step, record.steps_per_epoch) == ("a", 0, 5)
    assert (record.samples_per_epoch, record.world_size, record.seed, record.learning_rate) == (40, 1, 1, 1e-2)
    assert not (tmp_path / EVENTS_NAME).exists()


def test_the_manifest_knows_it(tmp_path):
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), ResumeGuardCallback(), max_steps=2).train()
    assert RECORD_NAME in read_manifest(tmp_path / "checkpoint-2")["files"]


def test_the_same_run_goes_on_bit_for_bit_and_in_silence(tmp_path):
    whole, _ = run(tmp_path / "a", num_train_epochs=1, max_steps=-1)
    run(tmp_path / "b", max_steps=6, lr_scheduler_type="constant")
    run(tmp_path / "c", num_train_epochs=1, max_steps=-1)
    rest, _ = run(tmp_path / "c", 6, num_train_epochs=1, max_steps=-1)
    assert rest.rows == whole.rows[24:] and rest.rates == whole.rates[6:]
    assert same_weights(tmp_path / "a" / "checkpoint-10", tmp_path / "c" / "checkpoint-10")
    assert not (tmp_path / "c" / EVENTS_NAME).exists()


# --- what must be the same ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("seed", {"seed": 2}, "seed=2, the checkpoint has 1: set seed=1"),
        ("seed", {"data_seed": 3}, "data_seed=3, the checkpoint has None"),
        ("data", {"data": tiny_data(36)}, "36 samples, the checkpoint's had 40"),
        ("config", {"model": tiny_model(rms_norm_eps=1e-3)}, "take config.json of the checkpoint folder"),
    ],
)
def test_differences_are_loud(tmp_path, kind, options, said):
    run(tmp_path, max_steps=2)
    with pytest.raises(ResumeError, match=said) as raised:
        run(tmp_path, 2, max_steps=4, **options)
    assert f"accept={{{kind!r}}}" in str(raised.value)
    (event,) = read_events(tmp_path)
    assert (event.severity, event.action, event.step) == ("fatal", "stop", 2)
    _, trainer = run(tmp_path, 2, max_steps=4, guard=ResumeGuardCallback(accept={kind}), **options)
    assert trainer.state.global_step == 4
    assert read_events(tmp_path)[-1].message.startswith("Accepted: ")


def test_all_differences_at_once(tmp_path):
    run(tmp_path, max_steps=2)
    file = tmp_path / "checkpoint-2" / RECORD_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"world_size": 8, "tokenizer_sha256": "other"}))
    with pytest.raises(ResumeError, match="(?s)world_size=1, the checkpoint has 8.*seed=9") as raised:
        run(tmp_path, 2, max_steps=4, seed=9)
    assert "tokenizer" not in str(raised.value), "none here to compare"


def test_tokenizers(tmp_path):
    text = ["def f(x):\n    return x\n"] * 20
    one, other = (train_tokenizer(text, vocab_size=size, show_progress=False) for size in (270, 280))
    before = tokenizer_fingerprint(one)
    one(["a", "a b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(one) == before != tokenizer_fingerprint(other)
    assert tokenizer_fingerprint(None) is None


def test_a_checkpoint_without_a_record(tmp_path):
    tiny_trainer(tmp_path, max_steps=2).train()
    run(tmp_path, 2, max_steps=4)
    (event,) = read_events(tmp_path)
    assert event.severity == "warning" and f"checkpoint-2 has no {RECORD_NAME}" in event.message
    (tmp_path / "checkpoint-4" / RECORD_NAME).write_text("{")
    with pytest.raises(ResumeError, match="cannot be read"):
        run(tmp_path, 4, max_steps=6)


def test_unknown_differences_cannot_be_accepted():
    with pytest.raises(ValueError, match="accept=\\['batch'\\] is not known"):
        ResumeGuardCallback(accept={"batch"})


# --- other data ---------------------------------------------------------------------------------------------------

NEW = {"data": tiny_data(28, first=100), "max_steps": 20}  # seven steps an epoch, where the old data has ten


def test_new_data_starts_at_its_first_sample_and_the_schedule_goes_on(tmp_path):
    old, _ = run(tmp_path / "old", guard=keyed("a"), max_steps=20)
    new, trainer = run(tmp_path / "old", 4, guard=keyed("b"), **NEW)
    fresh, _ = run(tmp_path / "fresh", **NEW)
    assert trainer.state.global_step == 20
    assert new.rows == fresh.rows[: 16 * 4], "the order of a run that knows nothing else, over two borders of epochs"
    assert new.rates == old.rates[4:]
    (event,) = read_events(tmp_path / "old")
    assert event.severity == "info" and event.evidence == {"offset_samples": -16}
    assert trainer.args.ignore_data_skip is False


@pytest.mark.parametrize("stopped", [8, 10, 12, 18])
def test_new_data_goes_on_where_it_stood(tmp_path, stopped):
    """The second resume: the same weights as without it, across epochs of the data and of Trainer."""
    run(tmp_path, guard=keyed("a"), max_steps=20)
    whole, _ = run(tmp_path, 4, guard=keyed("b"), **NEW)
    (tmp_path / "checkpoint-20").rename(tmp_path / "whole")
    rest, trainer = run(tmp_path, stopped, guard=keyed("b"), **NEW)
    assert read_record(tmp_path / f"checkpoint-{stopped}").data_start_step == 4
    assert rest.rows == whole.rows[(stopped - 4) * 4 :] and trainer.state.global_step == 20
    assert same_weights(tmp_path / "whole", tmp_path / "checkpoint-20")


def test_new_data_that_is_streamed(tmp_path):
    def stream(first):
        return tiny_data(80, first=first).to_iterable_dataset()

    run(tmp_path, guard=keyed("a"), data=stream(0), max_steps=10)
    new, _ = run(tmp_path, 4, guard=keyed("b"), data=stream(100), max_steps=10)
    assert new.rows == list(range(100, 124))
    again, _ = run(tmp_path, 6, guard=keyed("b"), data=stream(100), max_steps=10)
    assert again.rows == list(range(108, 124))


def test_who_wants_no_skipping_gets_none(tmp_path):
    run(tmp_path, guard=keyed("a"), max_steps=4)
    _, trainer = run(tmp_path, 4, guard=keyed("b"), max_steps=6, ignore_data_skip=True)
    assert trainer.args.ignore_data_skip is True


# --- another batch ------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_the_ramp_up():
    """Section 4: B0 = consumed // iteration, start B0, increment B1 - B0, over B0 * iteration - 1 samples."""
    assert batch_ramp_up(1000, 10, 100) is None
    ramp_up = batch_ramp_up(1000, 10, 160)
    assert ramp_up == BatchRampUp(start=100, increment=60, samples=999)
    assert [ramp_up.batch_size(consumed) for consumed in (0, 900, 999, 1000, 5000)] == [100, 100, 100, 160, 160]
    assert batch_ramp_up(1000, 10, 40).batch_size(1000) == 40
    with pytest.raises(ValueError, match="step=0"):
        batch_ramp_up(0, 0, 8)


@pytest.mark.parametrize(
    ("options", "batch"), [({"per_device_train_batch_size": 2}, 2), ({"gradient_accumulation_steps": 2}, 8)]
)
def test_another_batch_goes_on_behind_what_was_consumed(tmp_path, options, batch):
    whole, _ = run(tmp_path / "whole", max_steps=10)
    run(tmp_path / "b", max_steps=4)
    rest, trainer = run(tmp_path / "b", 4, max_steps=8, **options)
    assert rest.rows[: 40 - 16] == whole.rows[16 : 16 + 4 * batch]
    record = read_record(tmp_path / "b" / "checkpoint-8")
    assert record.batch_size == batch and record.consumed_samples == 16 + 4 * batch
    (event,) = read_events(tmp_path / "b")
    assert event.evidence == {
        "consumed_samples": 16,
        "ramp_up": {"start": 4, "increment": batch - 4, "samples": 15},
    }


# --- another learning rate ----------------------------------------------------------------------------------------


def test_the_checkpoint_wins_unless_asked(tmp_path, caplog):
    old, _ = run(tmp_path / "old")
    with caplog.at_level(logging.WARNING):
        kept, _ = run(tmp_path / "old", 4, learning_rate=1.3e-3)
    assert kept.rates == old.rates[4:]
    assert "learning_rate=0.0013 has no effect: the checkpoint's 0.01 goes on" in caplog.text
    assert read_record(tmp_path / "old" / "checkpoint-10").learning_rate == 1e-2
    other, _ = run(tmp_path / "other", learning_rate=1.3e-3)
    asked, trainer = run(
        tmp_path / "old", 4, guard=ResumeGuardCallback(override_learning_rate=True), learning_rate=1.3e-3
    )
    assert asked.rates == other.rates[4:], "exactly the schedule of a run that had it from the start"
    assert read_record(tmp_path / "old" / "checkpoint-10").learning_rate == 1.3e-3


class Chain:
    def __init__(self, *optimizers):
        self.optimizers = optimizers


def test_every_optimizer_of_a_chain_and_groups_of_their_own_rate():
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(3)]
    one = torch.optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:2], "lr": 0.02}], lr=0.1)
    other = torch.optim.AdamW(parameters[2:], lr=0.1)
    scheduler = get_scheduler("linear", one, num_warmup_steps=0, num_training_steps=10)
    for _ in range(5):
        one.step()
        scheduler.step()
    set_learning_rate(Chain(one, other), scheduler, old=0.1, new=0.2)
    assert [group["lr"] for group in one.param_groups] == [0.1, 0.02] and other.param_groups[0]["lr"] == 0.2
    assert scheduler.base_lrs == [0.2, 0.04] and scheduler.get_last_lr() == [0.1, 0.02]


def test_a_record_is_all_of_its_fields(tmp_path):
    run(tmp_path, max_steps=2)
    record = read_record(tmp_path / "checkpoint-2")
    assert dataclasses.asdict(record) == json.loads((tmp_path / "checkpoint-2" / RECORD_NAME).read_text())
