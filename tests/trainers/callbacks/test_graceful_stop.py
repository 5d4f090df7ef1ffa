import json
import os
import signal
import traceback
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from tests.forked import start_ranks
from trainers.callbacks.graceful_stop import GracefulStopCallback
from trainers.reliability.events import read_events
from trainers.reliability.signs import STOP_NAME


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))

    def forward(self, x, labels=None):
        return {"loss": (x * self.weight).square().mean()}


class Asks(TrainerCallback):
    """Does `action` in the middle of the given step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            self.action()


def run(folder, *callbacks, kind=Trainer, resume=None, **options):
    args = TrainingArguments(
        **{
            "output_dir": str(folder), "max_steps": 10, "per_device_train_batch_size": 2, "save_strategy": "no",
            "report_to": "none", "use_cpu": True, "disable_tqdm": True, **options,
        }
    )  # fmt: skip
    rows = [{"x": torch.ones(3), "labels": torch.ones(1)}] * 64
    trainer = kind(model=Model(), args=args, train_dataset=rows, eval_dataset=rows[:4], callbacks=list(callbacks))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def saved_step(folder):
    [checkpoint] = folder.glob("checkpoint-*")
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


def test_the_stop_file_ends_the_run_with_a_checkpoint_and_is_consumed(tmp_path):
    stop = GracefulStopCallback()
    trainer = run(tmp_path, Asks(4, (tmp_path / STOP_NAME).touch), stop)
    assert trainer.state.global_step == saved_step(tmp_path) == 4
    assert stop.requested and not (tmp_path / STOP_NAME).exists()
    [event] = read_events(tmp_path)
    assert (event.component, event.action, event.step) == ("graceful_stop", "stop", 4)
    assert event.evidence == {"asked": {"0": ["file"]}, "file": True}


def test_sigterm_ends_the_run_with_a_checkpoint_and_the_handler_goes(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    stop = GracefulStopCallback()
    trainer = run(tmp_path, stop, Asks(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert trainer.state.global_step == saved_step(tmp_path) == 3
    assert signal.getsignal(signal.SIGTERM) is before
    [event] = read_events(tmp_path)
    assert event.evidence["asked"] == {"0": ["signal"]}


def test_a_request_outlives_a_training_that_ends_in_an_exception(tmp_path):
    """As a rollback does: the training that goes on must know."""
    stop, broken = GracefulStopCallback(), []

    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3 and not broken:
                broken.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
                raise RuntimeError("broken")

    breaks = Breaks()
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, stop, breaks)
    assert run(tmp_path, stop, breaks).state.global_step == 1 and stop.requested
    assert run(tmp_path / "next", stop, breaks).state.global_step == 10 and not stop.requested


def test_nothing_happens_where_nobody_asks(tmp_path):
    stop = GracefulStopCallback()
    assert run(tmp_path, stop, max_steps=3).state.global_step == 3
    assert not stop.requested and read_events(tmp_path) == [] and not list(tmp_path.glob("checkpoint-*"))


def test_votes_only_every_so_many_steps(tmp_path):
    trainer = run(tmp_path, Asks(4, (tmp_path / STOP_NAME).touch), GracefulStopCallback(every=3))
    assert trainer.state.global_step == 6


def test_another_file_and_another_signal(tmp_path):
    stop = GracefulStopCallback(tmp_path / "please", signals=[signal.SIGUSR1])
    trainer = run(tmp_path / "run", stop, Asks(2, lambda: os.kill(os.getpid(), signal.SIGUSR1)))
    assert trainer.state.global_step == 2
    trainer = run(tmp_path / "other", stop, Asks(5, (tmp_path / "please").touch))
    assert trainer.state.global_step == 5 and stop.requested


def test_a_second_signal_much_later_goes_to_the_handler_before(tmp_path, monkeypatch):
    monkeypatch.setattr("trainers.callbacks.graceful_stop.SECOND_SIGNAL_SECONDS", -1.0)
    got = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: got.append(number))
    try:

        def twice():
            os.kill(os.getpid(), signal.SIGTERM)
            assert got == []
            os.kill(os.getpid(), signal.SIGTERM)

        run(tmp_path, GracefulStopCallback(), Asks(2, twice))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [signal.SIGTERM]


def test_refuses_two_handlers_of_sigterm(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="enable_jit_checkpoint=True and GracefulStopCallback"):
            run(tmp_path, GracefulStopCallback(), enable_jit_checkpoint=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ValueError, match="every=0"):
        GracefulStopCallback(every=0)


# --- two ranks -------------------------------------------------------------------------------------------------------


def run_ranks(rank, folder):
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    result = {}
    try:
        stop = GracefulStopCallback()
        asks = [Asks(4, lambda: os.kill(os.getpid(), signal.SIGTERM))] if rank == 1 else []
        result["steps"] = run(f"{folder}/run", stop, *asks).state.global_step
        result["requested"] = stop.requested
    except Exception:
        result["error"] = traceback.format_exc()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(result, file)
    dist.barrier()
    dist.destroy_process_group()


def test_a_signal_to_one_rank_stops_both_in_the_same_step(tmp_path):
    start_ranks(run_ranks, str(tmp_path))
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert results == [{"steps": 4, "requested": True}] * 2
    assert saved_step(tmp_path / "run") == 4
    [event] = read_events(tmp_path / "run")
    assert event.rank == 0 and event.evidence["asked"] == {"1": ["signal"]}
