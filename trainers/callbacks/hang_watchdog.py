"""End a process that has stopped making steps, leaving behind where it hung."""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from transformers import TrainerCallback

from ..reliability.events import EventLog
from ..reliability.signs import EXIT_HUNG


REPORT_SECONDS = 5.0  # a hung main thread may hold the lock of the log


class HangWatchdogCallback(TrainerCallback):
    """Exit with a code that `trainers.reliability.supervise` retries if no optimizer step ends for too long.

    A thread from `on_train_begin` on compares the time since the last step with
    `max(seconds, factor * median of the last 100 steps)`. Beyond it, the stacks of all threads go to
    `hang/rank<r>-<time>.txt` of the run folder, an event of severity `"fatal"` to its `events.jsonl`, and the process
    ends by `os._exit`: nothing is saved and no handler runs, because a collective, or a lock of the hung thread, would
    hang this thread as well. All ranks hang together and write their stacks; the one whose stack is outside of a
    collective is the one to look at. (After the SIGMA stack, arXiv 2512.13488; the rule itself is our proposal.)

    The clock stands while Trainer saves or evaluates, while it loads the best model at the end, and until
    `startup_steps` steps of this process have ended (compilation, the first batch). It also ends, without an exit, if
    the training left by an exception.

    Not seen: a thread that never gives the interpreter's lock back, and a hang while saving.

    Args:
        seconds: shortest time without a step that counts as a hang.
        factor: how many median steps count as a hang.
        startup_steps: steps that may take as long as they like.
        startup_seconds: limit for those, too; `None`: no limit.
        grace_seconds: time between the stacks and the exit, in which the other ranks write theirs before the launcher
            ends them.
        exit_code: status of the process.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(
        self,
        seconds: float = 600.0,
        *,
        factor: float = 10.0,
        startup_steps: int = 2,
        startup_seconds: float | None = None,
        grace_seconds: float = 5.0,
        exit_code: int = EXIT_HUNG,
    ):
        for name, value in (("seconds", seconds), ("factor", factor), ("startup_seconds", startup_seconds)):
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be positive.")
        self.seconds, self.factor = seconds, factor
        self.startup_steps, self.startup_seconds = startup_steps, startup_seconds
        self.grace_seconds, self.exit_code = grace_seconds, exit_code
        self._thread: threading.Thread | None = None
        self._held: set[str] = set()  # what Trainer is about to do after this step, until our turn in it

    def on_train_begin(self, args, state, control, **kwargs):
        self._end()
        self._folder, self._step, self._steps_here = Path(args.output_dir), state.global_step, 0
        self._events = EventLog(args.output_dir, rank=args.process_index)
        self._rank, self._loads_best = args.process_index, args.load_best_model_at_end
        self._durations: deque[float] = deque(maxlen=100)
        self._control, self._last, self._begin = control, time.monotonic(), None
        self._held.clear()
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=self._watch,
            args=(self._stopped, threading.get_ident(), _training_frame()),
            name="hang-watchdog",
            daemon=True,
        )
        self._thread.start()

    def on_step_begin(self, args, state, control, **kwargs):
        self._control = control
        self._held.clear()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last, self._step, self._control = now, state.global_step, control
        self._steps_here += 1
        self._hold(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._hold(control)

    def on_evaluate(self, args, state, control, **kwargs):
        self._last, self._control = time.monotonic(), control
        self._held.discard("evaluate")

    def on_save(self, args, state, control, **kwargs):
        self._last, self._control = time.monotonic(), control
        self._held.discard("save")

    def _hold(self, control) -> None:
        # Trainer clears its flags before it calls the callbacks, in which ranks may wait for the one that saves.
        wanted = {"save": control.should_save, "evaluate": control.should_evaluate}
        self._held |= {name for name, want in wanted.items() if want}

    def on_train_end(self, args, state, control, **kwargs):
        self._end()

    def _end(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread = None

    def limit(self) -> float | None:
        """Seconds without a step that are a hang at this moment; `None` while the clock stands."""
        # Trainer has no hook before a save: these are set by whoever asks for one and cleared when it is done.
        if self._held or self._control.should_save or self._control.should_evaluate:
            return None
        if self._control.should_training_stop and self._loads_best:
            return None
        if self._steps_here < max(self.startup_steps, 1):
            return self.startup_seconds
        return max(self.seconds, self.factor * statistics.median(list(self._durations)))

    def _watch(self, stopped: threading.Event, thread: int, frame) -> None:
        poll = min(1.0, (min(self.seconds, self.startup_seconds or self.seconds)) / 10)
        while not stopped.wait(poll):
            if not _is_on_stack(frame, thread):  # the training left by an exception: on_train_end never comes
                return
            limit = self.limit()
            if limit is None:
                self._last = time.monotonic()
            elif time.monotonic() - self._last > limit:
                self._leave(limit)

    def _leave(self, limit: float) -> None:
        quiet = time.monotonic() - self._last
        file = self._folder / "hang" / f"rank{self._rank}-{int(time.time())}.txt"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w") as output:
                faulthandler.dump_traceback(file=output, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        stacks = f"{file.parent.name}/{file.name}"
        evidence = {"seconds_without_step": round(quiet, 1), "limit": round(limit, 1), "exit_code": self.exit_code}
        report = threading.Thread(
            target=self._events.record,
            args=("hang_watchdog", "fatal"),
            kwargs={
                "step": self._step,
                "action": "exit",
                "message": f"no step for {quiet:.0f} s (limit {limit:.0f} s); stacks in {stacks}.",
                "evidence": {**evidence, "stacks": stacks},
            },
            daemon=True,
        )
        report.start()
        report.join(REPORT_SECONDS)
        time.sleep(self.grace_seconds)
        os._exit(self.exit_code)


def _training_frame():
    """The frame of the training loop that called `on_train_begin`: while it is on the stack, training goes on."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") in (__name__, "transformers.trainer_callback"):
        frame = frame.f_back
    return frame


def _is_on_stack(frame, thread: int) -> bool:
    current = sys._current_frames().get(thread)
    while current is not None:
        if current is frame:
            return True
        current = current.f_back
    return False


__all__ = ["HangWatchdogCallback"]
