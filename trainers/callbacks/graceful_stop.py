"""End a run at the end of a step, with a checkpoint, when a file or a signal asks for it."""

import os
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..reliability.agreement import any_rank, from_all_ranks
from ..reliability.events import EventLog
from ..reliability.signs import STOP_NAME


SECOND_SIGNAL_SECONDS = 10.0  # launchers and platforms send the same request several times in a row


class GracefulStopCallback(TrainerCallback):
    """Save and stop in the same step on all ranks when the stop file appears or any rank gets a signal.

    A signal handler must not save: the process may be inside a collective that only it would leave. So the handler
    only notes the request, and at the end of the next step that is a multiple of `every` all ranks vote (one
    all-reduce of a number). If anyone has a request, `control.should_save` and `control.should_training_stop` are set
    on all of them. The stop file is looked for by rank 0 alone, and removed once it is obeyed, so that the next run
    starts.

    A signal that comes again more than 10 s after the first is passed on to the handler from before, which by
    default ends the process: the way out of a step that does not end.

    `requested` says afterwards whether the run was stopped so: `Trainer.train` returns as if it were finished.

    Args:
        path: the stop file; by default `STOP` in `args.output_dir`.
        signals: the signals that ask for a stop. They are caught only where the training runs in the main thread.
        every: steps between two votes.

    Raises:
        ValueError: `every` is not positive; in `on_train_begin`, if `args.enable_jit_checkpoint` is set, whose handler
            for SIGTERM saves on one rank at a step of its own.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        signals: Sequence[signal.Signals] = (signal.SIGTERM,),
        every: int = 1,
    ):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 optimizer step.")
        self.path, self.signals, self.every = path, tuple(signals), every
        self.requested = False
        self._signalled: tuple[int, float] | None = None
        self._before: dict[int, object] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if args.enable_jit_checkpoint:
            raise ValueError(
                "enable_jit_checkpoint=True and GracefulStopCallback both answer SIGTERM. Use one of them: "
                "enable_jit_checkpoint=False keeps the ranks in step."
            )
        # Handlers that are still ours: the training before ended in an exception, and may have been asked to stop.
        self._signalled = self._signalled if self._before and not self.requested else None
        self.requested = False
        self._events = EventLog(args.output_dir, rank=args.process_index)
        self._file = Path(self.path) if self.path is not None else Path(args.output_dir) / STOP_NAME
        nccl = dist.is_initialized() and dist.get_backend() == "nccl"
        self._device = args.device if nccl else torch.device("cpu")
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                if number not in self._before:
                    self._before[number] = signal.signal(number, self._note)

    def on_step_end(self, args, state, control, **kwargs):
        if self.requested or state.global_step % self.every:
            return
        reasons = {"signal": self._signalled is not None}
        reasons["file"] = state.is_world_process_zero and self._file.exists()
        if not any_rank(any(reasons.values()), device=self._device):
            return
        self.requested = True
        control.should_save = control.should_training_stop = True
        asked = {rank: names for rank, names in enumerate(from_all_ranks([n for n in reasons if reasons[n]])) if names}
        if state.is_world_process_zero:
            words = "; ".join(f"rank {rank}: {' and '.join(names)}" for rank, names in asked.items())
            self._events.record(
                "graceful_stop",
                "warning",
                step=state.global_step,
                action="stop",
                message=f"stopping after a checkpoint, as asked ({words}).",
                evidence={"asked": asked, "file": any("file" in names for names in asked.values())},
            )
            self._file.unlink(missing_ok=True)

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _note(self, number: int, frame) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = (number, now)
        elif now - self._signalled[1] > SECOND_SIGNAL_SECONDS:
            signal.signal(number, self._before.pop(number, signal.SIG_DFL))
            os.kill(os.getpid(), number)


__all__ = ["GracefulStopCallback"]
