"""Keep the ledger of a run's wall time."""

import os
import time

from transformers import TrainerCallback

from ..reliability.events import read_events
from ..reliability.goodput import JOB_VARIABLE, GoodputLedger, job_hash
from .installation import add_to_log


class GoodputCallback(TrainerCallback):
    """Write what the time of this process goes into to `goodput.jsonl` of the run folder (rank 0 only).

    From `on_step_begin` to `on_step_end` is `productive`, except for the first `startup_steps` steps, which with
    everything before them are `startup`; what ends in `on_evaluate` is `evaluation`, in `on_save` `checkpoint`; the
    rest (the next batch, logging) is `idle`. [`trainers.reliability.goodput.read_goodput`] adds up over attempts.
    `goodput/effective_time_ratio`, the productive share of this process so far, goes to the log.

    Args:
        startup_steps: steps that count as start-up (compilation).
        flush_seconds: longest time between two lines of the ledger; what SIGKILL may take with it.
    """

    def __init__(self, *, startup_steps: int = 1, flush_seconds: float = 10.0):
        self.startup_steps, self.flush_seconds = startup_steps, flush_seconds
        self._created: float | None = time.time()
        self._ledger: GoodputLedger | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self._ledger = GoodputLedger(args.output_dir, flush_seconds=self.flush_seconds)
        self._first, self._productive = state.global_step, 0.0
        job = os.environ.get(JOB_VARIABLE) or job_hash(args.to_sanitized_dict())
        self._began = self._created or time.time()
        # A second training with the same callback did not begin when the callback was made.
        self._created = None
        self._ledger.begin(job=job, step=state.global_step, since=self._began)
        self._ledger.credit("startup", step=state.global_step)

    def on_step_begin(self, args, state, control, **kwargs):
        self._credit("idle", state)
        self._begin = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self._credit("productive", state)
        if self._ledger is not None and state.global_step - self._first > self.startup_steps:
            self._productive += time.perf_counter() - self._begin

    def on_log(self, args, state, control, logs=None, **kwargs):
        # An evaluation logs what it found before `on_evaluate` comes.
        evaluated = any(name.startswith("eval_") for name in logs or {})
        self._credit("evaluation" if evaluated else "idle", state, always=evaluated)
        if self._ledger is not None and "loss" in (logs or {}):
            ratio = self._productive / max(self._ledger.now() - self._began, 1e-9)
            add_to_log(state, logs, {"goodput/effective_time_ratio": round(ratio, 4)})

    def on_evaluate(self, args, state, control, **kwargs):
        self._credit("evaluation", state, always=True)

    def on_save(self, args, state, control, **kwargs):
        self._credit("checkpoint", state, always=True)
        if self._ledger is not None:
            self._ledger.checkpoint(step=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        if self._ledger is None:
            return
        asked = read_events(args.output_dir, component="graceful_stop")
        stopped = any(event.time >= self._began and event.step == state.global_step for event in asked)
        self._ledger.end(outcome="user_stop" if stopped else "succeeded", step=state.global_step)
        self._ledger = None

    def _credit(self, category: str, state, *, always: bool = False) -> None:
        if self._ledger is None:
            return
        done = state.global_step - self._first
        if not always and (done < self.startup_steps or (done == self.startup_steps and category == "productive")):
            category = "startup"
        self._ledger.credit(category, step=state.global_step)
        if done == self.startup_steps and category == "startup":
            self._ledger.flush()


__all__ = ["GoodputCallback"]
