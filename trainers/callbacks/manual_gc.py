"""Python's garbage collector on a schedule that all ranks share, instead of at a moment of each rank's own."""

import gc
import weakref

from transformers import TrainerCallback


class ManualGCCallback(TrainerCallback):
    """Switch automatic collection off for the training and collect on every rank at the same optimizer step.

    Ranks that collect at different moments make each other wait in the next collective. As in the SIGMA stack
    (arXiv 2512.13488, section on system noise; 20 steps in its scripts), there is one full collection every `every`
    steps, and one right after a save, when the time is lost anyway. What lives when the training begins (modules,
    code, the model) is frozen: no collection looks at it.

    The state from before comes back in `on_train_end`. `Trainer.train` calls that only if it returns: where an
    exception is caught and the process goes on, call [`~ManualGCCallback.restore`], or use the callback as a context
    manager:

        with ManualGCCallback() as manual_gc:
            Trainer(..., callbacks=[manual_gc]).train()

    Args:
        every: optimizer steps between two collections.

    Raises:
        ValueError: `every` is not positive.
    """

    def __init__(self, every: int = 20):
        if every < 1:
            raise ValueError(f"every={every} must be at least 1 optimizer step. To never collect, leave it out.")
        self.every = every
        self._restore = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self._restore is not None and self._restore.alive:  # the training before ended in an exception
            return
        gc.collect()
        # unfreeze() knows no owner: what somebody else froze (a fork server) would thaw with ours
        freeze = gc.get_freeze_count() == 0
        # Of the callback, so that automatic collection also comes back when a failed Trainer is let go.
        self._restore = weakref.finalize(self, _restore, enabled=gc.isenabled(), unfreeze=freeze)
        if freeze:
            gc.freeze()
        gc.disable()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            gc.collect()

    def on_save(self, args, state, control, **kwargs):
        gc.collect()

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Put the collector back as it was before the training. Does nothing the second time."""
        if self._restore is not None:
            self._restore()

    def __enter__(self) -> "ManualGCCallback":
        return self

    def __exit__(self, *exception) -> None:
        self.restore()


def _restore(*, enabled: bool, unfreeze: bool) -> None:
    if unfreeze:
        gc.unfreeze()
    if enabled:
        gc.enable()


__all__ = ["ManualGCCallback"]
