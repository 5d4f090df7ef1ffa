"""A checkpoint that counts only once every byte of it is on the disk and written down."""

import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..reliability.agreement import any_rank
from ..reliability.checkpoints import (
    MANIFEST_NAME,
    CheckpointError,
    NotFiniteError,
    checkpoint_folders,
    checkpoint_step,
    config_fingerprint,
    manifest_state,
    manifests_required_after,
    require_manifests,
    structural_problems,
    write_latest,
    write_manifest,
    write_refusal,
)
from ..reliability.events import EventLog


COMPONENT = "validated_checkpoint"
ABANDONED_MANIFEST = "manifest.abandoned.json"


@dataclass(frozen=True)
class _Commit:
    """What the worker needs to know of a save; the state of the run goes on changing."""

    folder: Path
    step: int
    world_size: int
    ranks: int
    config_hash: str | None
    best: str | None
    limit: int | None
    before: tuple[Path, ...]


class ValidatedCheckpointCallback(TrainerCallback):
    """Commit every checkpoint that Trainer saves; a kill at any moment then costs what was done since the last commit.

    Trainer writes into `checkpoint-N` itself, and no hook lets a callback give it another name. So the commit is not a
    rename of the folder but the appearance of its manifest: files and folders are synced to the disk, then
    `manifest.json` is written under a temporary name, synced and renamed, then the pointer `latest` likewise. At every
    moment before the manifest's rename the folder is one that [`find_last_valid_checkpoint`] refuses, since the run
    folder says that this run writes manifests; at every moment after it the checkpoint is whole. `latest` is for
    readers outside (uploads, people): a kill between the two leaves it one behind, which resuming does not mind.

    * Weights that are NaN or infinite are refused: an event of severity `"error"`, and a mark in the folder. The run
      goes on; stopping it is a loss guard's business.
    * Trainer rotates (`save_total_limit`) before callbacks hear of a save, and would so delete the last checkpoint
      that is valid in favour of one that is not yet. The limit is therefore taken over for the time of training
      (`args.save_total_limit` is `None` meanwhile) and applied after each commit: to the newest that count, the best,
      and never to the one just committed. At the end of training Trainer's special case of a limit of 1, which
      deletes the last checkpoint in favour of the best, does not happen: both stay.
    * A committed checkpoint ahead of the one just committed belongs to a branch that was left by resuming from an
      older one: its manifest is put aside (`manifest.abandoned.json`), so that a later resume does not jump to it.
    * All ranks meet on each save, so that their files (random states, shards) are there; the rank that saves commits,
      one for each node with `save_on_each_node`.

    The commit starts with the first event after the save, when every callback has done what it does in `on_save`.
    A disk that refuses the manifest is an event of severity `"error"`: the checkpoint does not count, the run goes on.

    The protocol is ours: the SIGMA stack (arXiv 2512.13488) is known to upload checkpoints in order, not how it tells
    whole ones.

    Args:
        background: check, sync and hash in a thread beside training, one checkpoint at a time: a save that comes
            while the one before is still being committed waits for it. A kill may then cost two saves, the one that
            is being written and the one that is being committed. `False`: before training goes on; a kill costs one.
    """

    def __init__(self, *, background: bool = True):
        self.background = background
        self._worker: threading.Thread | None = None
        self._due: _Commit | None = None
        self._limit: int | None = None
        self._limited_args = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._start()
        self.wait()
        self._log = EventLog(args.output_dir, rank=args.process_index)
        if args is not self._limited_args:
            self._limited_args, self._limit = args, None
        if args.save_total_limit is not None:  # None where an exception left it to us
            self._limit, args.save_total_limit = args.save_total_limit, None
        if args.should_save:
            require_manifests(args.output_dir, after_step=state.global_step)

    def on_save(self, args, state, control, model=None, **kwargs):
        self._start()
        any_rank(False, device=args.device)  # a barrier: from here on every rank has written its files
        if not args.should_save:
            return
        config = getattr(model, "config", None)
        self._due = _Commit(
            folder=Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}",
            step=state.global_step,
            world_size=args.world_size,
            ranks=0 if args.save_on_each_node else args.world_size,
            config_hash=config_fingerprint(config) if config is not None else None,
            best=state.best_model_checkpoint,
            limit=self._limit,
            before=tuple(checkpoint_folders(args.output_dir)),
        )

    def _start_what_is_due(self, args, state, control, **kwargs):
        self._start()

    on_step_begin = on_epoch_begin = on_epoch_end = on_log = on_evaluate = _start_what_is_due

    def on_train_end(self, args, state, control, **kwargs):
        self._start()
        self.wait()
        if args is self._limited_args:
            args.save_total_limit, self._limited_args = self._limit, None

    def wait(self) -> None:
        """Return when no checkpoint is being committed."""
        if self._worker is not None:
            self._worker.join()
            self._worker = None

    def _start(self) -> None:
        if self._due is None:
            return
        commit, self._due = self._due, None
        self.wait()
        if not self.background:
            return self._commit(commit)
        # Not a daemon: a run that ends by an exception still commits what it has saved.
        self._worker = threading.Thread(target=self._commit, args=(commit,), name=f"commit {commit.folder.name}")
        self._worker.start()

    def _commit(self, commit: _Commit) -> None:
        try:
            write_manifest(
                commit.folder,
                step=commit.step,
                world_size=commit.world_size,
                config_hash=commit.config_hash,
                ranks=commit.ranks,
            )
            write_latest(commit.folder.parent, commit.folder.name)
            self._put_aside_what_lies_ahead(commit)
            self._rotate(commit)
        except NotFiniteError as error:
            self._refuse(commit, error.tensors)
        except CheckpointError as error:
            self._incident(commit, f"{error} It does not count as a checkpoint.")
        except Exception as error:  # nothing that happens to a checkpoint may end the run
            self._incident(
                commit,
                f"{commit.folder.name} was not committed ({error}). Earlier checkpoints are untouched; free space on "
                "the disk or mend it, and the next save is tried again.",
            )

    def _refuse(self, commit: _Commit, tensors: list[str]) -> None:
        message = f"{commit.folder.name} is refused: {tensors[0]}. Earlier checkpoints stay; the cause lies before it."
        self._incident(commit, message, evidence={"tensors": tensors[:20], "count": len(tensors)})
        try:
            write_refusal(commit.folder, step=commit.step, reason=tensors[0])
        except OSError:
            pass  # without a manifest it is refused all the same

    def _put_aside_what_lies_ahead(self, commit: _Commit) -> None:
        for folder in commit.before:
            if checkpoint_step(folder) > commit.step and manifest_state(folder) == "committed":
                _unless_gone(lambda folder=folder: os.replace(folder / MANIFEST_NAME, folder / ABANDONED_MANIFEST))
                self._log.record(
                    COMPONENT,
                    "warning",
                    step=commit.step,
                    message=f"{folder.name} is of a branch that was left: resuming does not use it any more.",
                )

    def _rotate(self, commit: _Commit) -> None:
        """Delete what the limit does not keep, of the folders that were there when this checkpoint was saved: by now
        Trainer may be writing another."""
        if commit.limit is None or commit.limit <= 0:
            return
        older = [folder for folder in commit.before if checkpoint_step(folder) < commit.step]
        best = [f for f in older if commit.best is not None and Path(commit.best).absolute() == f.absolute()]
        others = [f for f in reversed(older) if f not in best and self._counts(f)]
        kept = best + others[: max(0, commit.limit - 1 - len(best))]
        for folder in older:
            if folder not in kept:
                # The manifest first: a folder that is half deleted must not look committed.
                _unless_gone((folder / MANIFEST_NAME).unlink)
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _counts(folder: Path) -> bool:
        """Committed, or whole and from before this run wrote manifests."""
        after = manifests_required_after(folder.parent)
        from_before = after is None or checkpoint_step(folder) <= after
        return manifest_state(folder) == "committed" or (from_before and not structural_problems(folder))

    def _incident(self, commit: _Commit, message: str, **fields) -> None:
        if commit.folder.is_dir():  # else it was deleted or renamed meanwhile, by a rollback for instance
            self._log.record(COMPONENT, "error", step=commit.step, message=message, **fields)


def _unless_gone(action: Callable[[], object]) -> None:
    try:
        action()
    except FileNotFoundError:
        pass


__all__ = ["ValidatedCheckpointCallback"]
