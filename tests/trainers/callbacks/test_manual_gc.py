import gc
import time

import pytest
from transformers import TrainerCallback

from tests.trainers.callbacks.test_installation import make_model, train
from trainers.callbacks.manual_gc import ManualGCCallback


@pytest.fixture(autouse=True)
def collector():
    """Every test finds nothing frozen, and whatever it does to the collector, the next one finds it running."""
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()  # as conftest.py does


class Collections(TrainerCallback):
    """Full collections by the time each step and save ends. The step in which they ran is what is asserted."""

    def __init__(self):
        self.at_step, self.states, self.full, self.other = [], [], 0, 0

    def on_train_begin(self, args, state, control, **kwargs):
        gc.callbacks.append(self.count)

    def count(self, phase, info):
        if phase == "start":
            self.full += info["generation"] == 2
            self.other += info["generation"] < 2

    def on_step_end(self, args, state, control, **kwargs):
        self.at_step.append(self.full)
        self.states.append((gc.isenabled(), gc.get_freeze_count() > 0))

    def on_save(self, args, state, control, **kwargs):
        self.at_save = self.full

    def on_train_end(self, args, state, control, **kwargs):
        gc.callbacks.remove(self.count)


def test_collects_at_the_given_steps_and_after_a_save_and_at_no_other_time(tmp_path):
    seen = Collections()
    train(make_model(), tmp_path, ManualGCCallback(every=3), seen, max_steps=7, save_strategy="steps", save_steps=4)
    steps = [step for step, (before, after) in enumerate(zip([0, *seen.at_step], seen.at_step), 1) if after > before]
    assert steps == [3, 5, 6]  # the one of the save after step 4 is seen by step 5
    assert seen.other == 0
    assert set(seen.states) == {(False, True)}
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_collector_that_was_off_stays_off_and_what_others_froze_stays_frozen(tmp_path):
    gc.disable()
    gc.freeze()
    train(make_model(), tmp_path, ManualGCCallback())
    assert not gc.isenabled() and gc.get_freeze_count() > 0


class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("broken")


def test_as_a_context_manager_it_restores_after_an_exception(tmp_path):
    with pytest.raises(RuntimeError, match="broken"), ManualGCCallback() as manual_gc:
        train(make_model(), tmp_path, manual_gc, Breaks())
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_second_training_after_an_exception_knows_the_first_state(tmp_path):
    callback = ManualGCCallback()
    with pytest.raises(RuntimeError, match="broken"):
        train(make_model(), tmp_path, callback, Breaks())
    assert not gc.isenabled()
    train(make_model(), tmp_path, callback)
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_a_callback_that_is_let_go_restores():
    callback = ManualGCCallback()
    callback.on_train_begin(None, None, None)
    assert not gc.isenabled()
    del callback
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_costs_next_to_nothing_where_it_does_not_collect():
    callback = ManualGCCallback(every=10**9)
    state = type("State", (), {"global_step": 1})()
    begin = time.perf_counter()
    for _ in range(10_000):
        callback.on_step_end(None, state, None)
    assert (time.perf_counter() - begin) / 10_000 < 5e-5


def test_every_must_be_positive():
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        ManualGCCallback(every=0)
