"""Real processes: the watchdog ends the process that it watches."""

import time

import pytest
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tests.forked import run_python
from tests.trainers.callbacks.test_graceful_stop import run
from trainers.callbacks.hang_watchdog import HangWatchdogCallback
from trainers.reliability.events import read_events
from trainers.reliability.signs import EXIT_HUNG


# A run of 8 steps in the folder argv[1]; what hangs comes before `run()`.
PRELUDE = """
import sys, time
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from trainers.callbacks.hang_watchdog import HangWatchdogCallback

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
    def forward(self, x, labels=None):
        return {"loss": (x * self.weight).square().mean()}

class Rows(torch.utils.data.Dataset):
    calls, hangs_at = 0, None
    def __len__(self):
        return 64
    def __getitem__(self, index):
        Rows.calls += 1
        if Rows.calls == self.hangs_at:
            time.sleep(120)
        return {"x": torch.ones(3), "labels": torch.ones(1)}

class SlowTrainer(Trainer):
    def _save_checkpoint(self, *args, **kwargs):
        time.sleep(2.0)
        super()._save_checkpoint(*args, **kwargs)
    def evaluate(self, *args, **kwargs):
        time.sleep(2.0)
        return super().evaluate(*args, **kwargs)

def run(watchdog, kind=Trainer, callbacks=(), **options):
    args = TrainingArguments(output_dir=sys.argv[1], max_steps=8, per_device_train_batch_size=2, report_to="none",
        use_cpu=True, disable_tqdm=True, **{"save_strategy": "no", **options})
    rows = Rows()
    kind(model=Model(), args=args, train_dataset=rows, eval_dataset=rows, callbacks=[watchdog, *callbacks]).train()
"""

HANGS = """
Rows.hangs_at = 11
run(HangWatchdogCallback(seconds=1.5, grace_seconds=0.1))
"""

SAVES_AND_FAILS = """
class Slow(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            time.sleep(2.0)  # as a compilation does

class Breaks(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise RuntimeError("broken")

run(HangWatchdogCallback(seconds=1.5, grace_seconds=0.1), SlowTrainer, [Slow()],
    save_strategy="steps", save_steps=8, eval_strategy="steps", eval_steps=8)
print("saved", flush=True)
try:
    run(HangWatchdogCallback(seconds=1.5, grace_seconds=0.1), callbacks=[Breaks()])
except RuntimeError:
    time.sleep(2.0)
    print("alive", flush=True)
"""


@pytest.mark.fault(
    "A data loader that blocks", survived_if="the process ends by itself and leaves the stack that hung"
)
def test_a_blocked_data_loader_is_left_with_its_stack(tmp_path):
    done = run_python("-c", PRELUDE + HANGS, tmp_path, timeout=100)
    assert done.returncode == EXIT_HUNG, done.stderr
    [event] = read_events(tmp_path, component="hang_watchdog")
    assert (event.severity, event.action, event.evidence["exit_code"]) == ("fatal", "exit", EXIT_HUNG)
    assert event.step in (3, 4)  # 10 rows are 5 batches, of which the loader fetches one ahead
    stacks = (tmp_path / event.evidence["stacks"]).read_text()
    assert "__getitem__" in stacks and "get_batch_samples" in stacks
    assert 1.5 <= event.evidence["seconds_without_step"] < 10


def test_saves_evaluations_compilation_and_exceptions_are_no_hangs(tmp_path):
    done = run_python("-c", PRELUDE + SAVES_AND_FAILS, tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "saved" in done.stdout.split() and done.stdout.split()[-1] == "alive"
    assert read_events(tmp_path, component="hang_watchdog") == []


class Limits(TrainerCallback):
    """The limit in force: inside the steps, the save and the evaluation."""

    def __init__(self, watchdog):
        self.watchdog, self.seen = watchdog, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(("step", state.global_step, self.watchdog.limit()))

    def on_prediction_step(self, args, state, control, **kwargs):
        self.seen.append(("evaluation", state.global_step, self.watchdog.limit()))


class Saves(Trainer):
    limits = None

    def _save_checkpoint(self, *args, **kwargs):
        self.limits.seen.append(("save", self.state.global_step, self.limits.watchdog.limit()))
        super()._save_checkpoint(*args, **kwargs)


def test_limits(tmp_path):
    watchdog = HangWatchdogCallback(seconds=30.0, startup_steps=2)
    limits = Limits(watchdog)
    Saves.limits = limits
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 5}
    run(tmp_path, watchdog, limits, kind=Saves, **options)
    seen = {(what, step): limit for what, step, limit in limits.seen}
    assert seen["step", 0] is None and seen["step", 1] is None
    assert seen["step", 2] == seen["step", 3] == 30.0
    assert seen["save", 3] is None and seen["evaluation", 2] is None and seen["evaluation", 4] is None
    assert watchdog._thread is None


def test_the_limit_follows_the_median_step(tmp_path):
    watchdog = HangWatchdogCallback(seconds=0.5, factor=10.0, startup_steps=1)

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            time.sleep(0.2)

    run(tmp_path, watchdog, Slow(), max_steps=4)
    assert 2.0 <= watchdog.limit() < 10.0 or watchdog._control.should_save


def test_the_clock_stands_until_its_own_turn_after_a_save(tmp_path):
    """Trainer clears its flags before the callbacks' `on_save`, in which ranks may wait for the one that saves."""
    watchdog, control = HangWatchdogCallback(seconds=50, startup_steps=1), TrainerControl()
    args, state = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"), TrainerState()
    watchdog.on_train_begin(args, state, control)
    try:
        control.should_save = control.should_evaluate = True
        watchdog.on_step_end(args, state, control)
        control.should_save = control.should_evaluate = False
        assert watchdog.limit() is None
        watchdog.on_evaluate(args, state, control)
        assert watchdog.limit() is None
        watchdog.on_save(args, state, control)
        assert watchdog.limit() == 50
    finally:
        watchdog.on_train_end(args, state, control)


def test_start_up_may_have_a_limit_too():
    watchdog = HangWatchdogCallback(seconds=1.0, startup_seconds=60.0)
    control = type("Control", (), dict.fromkeys(("should_save", "should_evaluate", "should_training_stop"), False))()
    watchdog._control, watchdog._steps_here, watchdog._loads_best = control, 0, False
    assert watchdog.limit() == 60.0


@pytest.mark.parametrize("name", ["seconds", "factor", "startup_seconds"])
def test_limits_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}=0 must be positive"):
        HangWatchdogCallback(**{name: 0})
