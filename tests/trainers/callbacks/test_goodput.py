import time

import pytest
from transformers import Trainer, TrainerCallback

from tests.trainers.callbacks.test_graceful_stop import Asks, run
from trainers.callbacks.goodput import GoodputCallback
from trainers.callbacks.graceful_stop import GracefulStopCallback
from trainers.reliability.goodput import JOB_VARIABLE, read_goodput
from trainers.reliability.signs import STOP_NAME


class Slow(TrainerCallback):
    """Takes its time everywhere; comes after the callback under test, but before it in evaluation and saving."""

    def on_step_begin(self, args, state, control, **kwargs):
        time.sleep(0.05)

    def on_epoch_begin(self, args, state, control, **kwargs):
        time.sleep(0.1)


class SlowFirst(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0:
            time.sleep(0.2)

    def on_evaluate(self, args, state, control, **kwargs):
        time.sleep(0.1)

    def on_save(self, args, state, control, **kwargs):
        time.sleep(0.07)


class SlowEvaluation(Trainer):
    def evaluation_loop(self, *args, **kwargs):
        time.sleep(0.2)
        return super().evaluation_loop(*args, **kwargs)


class Dies(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise RuntimeError("broken")


def test_time_goes_where_it_was_spent_and_adds_up(tmp_path):
    start = time.time()
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "logging_steps": 1}
    trainer = run(tmp_path, SlowFirst(), GoodputCallback(), Slow(), **options)
    wall = time.time() - start
    goodput = read_goodput(tmp_path)
    seconds = goodput.seconds
    assert sum(seconds.values()) == pytest.approx(goodput.wall_seconds, abs=1e-3)
    assert goodput.wall_seconds <= wall + 1e-3
    assert seconds["startup"] > 0.2 + 0.1 + 0.05
    assert 5 * 0.05 < seconds["productive"] < wall - 0.35
    assert seconds["checkpoint"] > 2 * 0.07
    assert goodput.attempts == {"succeeded": 1}
    assert goodput.timeline[0].saved_step == goodput.timeline[0].step == 6
    ratios = [row["goodput/effective_time_ratio"] for row in trainer.state.log_history if "loss" in row]
    assert len(ratios) == 6 and ratios[0] == 0 and 0 < ratios[-1] < 1


def test_a_run_that_died_and_resumed(tmp_path):
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    with pytest.raises(RuntimeError, match="broken"):
        run(tmp_path, GoodputCallback(flush_seconds=0.0), Slow(), Dies(), **options)
    between = time.time()
    time.sleep(0.3)
    run(tmp_path, GoodputCallback(flush_seconds=0.0), Slow(), resume=True, **options)
    goodput = read_goodput(tmp_path)
    assert goodput.attempts == {"unknown": 1, "succeeded": 1}
    first, second = goodput.timeline
    assert (first.first_step, first.saved_step, first.step, second.first_step, second.step) == (0, 4, 6, 4, 8)
    lost, kept = goodput.seconds["lost"], goodput.seconds["productive"]
    assert 2 * 0.05 < lost < (lost + kept) / 2  # 2 of 10 steps were made twice
    assert 0.3 <= goodput.seconds["restart_gap"] + 1e-3
    assert goodput.seconds["restart_gap"] >= second.start - between
    assert sum(goodput.seconds.values()) == pytest.approx(second.end - first.start, rel=0.01)
    assert first.job == second.job


def test_a_graceful_stop_is_its_users_wish(tmp_path):
    run(tmp_path, GoodputCallback(), GracefulStopCallback(), Asks(3, (tmp_path / STOP_NAME).touch))
    assert read_goodput(tmp_path).attempts == {"user_stop": 1}


def test_the_supervisor_names_the_job(tmp_path, monkeypatch):
    monkeypatch.setenv(JOB_VARIABLE, "the job")
    run(tmp_path, GoodputCallback(), max_steps=1)
    assert read_goodput(tmp_path).timeline[0].job == "the job"


def test_evaluation_is_apart_and_a_second_training_starts_anew(tmp_path):
    callback = GoodputCallback()

    class Evaluates(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = state.global_step == 2

    run(tmp_path, callback, Evaluates(), kind=SlowEvaluation, max_steps=3)
    time.sleep(0.2)
    run(tmp_path, callback, max_steps=3)
    goodput = read_goodput(tmp_path)
    assert 0.2 < goodput.seconds["evaluation"] < goodput.wall_seconds
    assert goodput.attempts == {"succeeded": 2}
    assert goodput.timeline[1].start > goodput.timeline[0].end + 0.2
