"""Go back to the last valid checkpoint and on without the data that was seen since.

A component that finds the run beyond repair raises [`RollbackRequested`] on all ranks in the same step;
[`train_with_rollback`] runs `trainer.train` and catches it. What Trainer's resume restores is restored: weights and
buffers (the expert bias), optimizer, scheduler, random states, the number of finished steps, and with that number the
stage of a sparsification schedule. The data goes on behind the incident (our proposal, after common practice; the
SIGMA stack names the rollback but not the rule).

The position in the data is a function of the step and of the file `data_skips.json` of the run folder, so that a
process that is started again goes on in the same place:

    position(step) = micro-batches of `step` steps + sum of the skips at steps <= `step`

counted per rank, over epochs: behind the last batch of one comes the first of the next, in that one's order.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME, skip_first_batches
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, has_length
from transformers.utils import logging

from ..report import write_text_atomically
from .agreement import from_all_ranks
from .events import EventLog


logger = logging.get_logger(__name__)
SKIPS_NAME = "data_skips.json"
ABANDONED = "abandoned-"


class RollbackRequested(RuntimeError):
    """Raised on all ranks together: go back, skip the data.

    Args:
        step: optimizer steps that were finished.
        reason: one sentence for people.
        skip_batches: micro-batches of each rank that were seen after those steps, and are not to be seen again.
        newest: the newest checkpoint that may be gone back to, as its step; later ones have learned from what went
            wrong. `None`: any.
    """

    def __init__(self, step: int, reason: str, skip_batches: int = 0, *, newest: int | None = None):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason, self.skip_batches, self.newest = step, reason, skip_batches, newest


@dataclass(frozen=True)
class DataSkip:
    """From step `step` on the data is `batches` micro-batches of each rank further on."""

    step: int
    batches: int
    reason: str = ""


def read_skips(folder: str | Path) -> list[DataSkip]:
    """The skips of a run folder; none if there is no file.

    Raises:
        ValueError: a file that cannot be read: going on without it would show the skipped data again.
    """
    file = Path(folder) / SKIPS_NAME
    if not file.exists():
        return []
    try:
        return [DataSkip(**row) for row in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} is not a list of skips ({error}). Restore it, or delete it to skip nothing."
        ) from error


def skipped_batches(skips: list[DataSkip], step: int) -> int:
    """Micro-batches that were skipped before the step that follows `step` finished ones."""
    return sum(skip.batches for skip in skips if skip.step <= step)


def with_skip(
    skips: list[DataSkip], *, checkpoint: int, step: int, batches_per_step: int, seen: int, reason: str = ""
) -> list[DataSkip]:
    """`skips` after going back from `step` to `checkpoint`, so that the data goes on behind what had been seen.

    Skips behind the checkpoint are those of a branch that is given up; the new one covers their data, too. `seen`:
    micro-batches beyond `step`.
    """
    kept = [skip for skip in skips if skip.step <= checkpoint]
    position = step * batches_per_step + skipped_batches(skips, step) + seen
    return kept + [
        DataSkip(checkpoint, position - checkpoint * batches_per_step - skipped_batches(kept, checkpoint), reason)
    ]


def train_with_rollback(
    trainer: Trainer,
    resume_from_checkpoint: str | Path | bool | None = None,
    max_rollbacks: int = 3,
    *,
    find_checkpoint: Callable[[Path], Path | None] | None = None,
    skip_data: bool = True,
    train: Callable[[str | None], TrainOutput] | None = None,
) -> TrainOutput:
    """`trainer.train(...)`, which goes back to the last valid checkpoint when a component asks for it.

    Every start of a run with rollbacks goes through here, resumed ones too: only so does the data go on where
    `data_skips.json` says. With `ignore_data_skip=True` the data starts anew at each resume, and nothing is skipped.

    Args:
        resume_from_checkpoint: where to start, as for `trainer.train`.
        max_rollbacks: after so many the request is raised to the caller.
        find_checkpoint: the last valid checkpoint of the run folder; default
            `trainers.reliability.checkpoints.find_last_valid_checkpoint`. Rank 0's answer counts.
        skip_data: `False`: see the same data again.
        train: replaces `trainer.train(resume_from_checkpoint=...)`, for a model whose files Trainer cannot load.

    Raises:
        RollbackRequested: more often than `max_rollbacks`.
        RuntimeError: no valid checkpoint to go back to.
    """
    train = train or (lambda checkpoint: trainer.train(resume_from_checkpoint=checkpoint))
    folder = Path(trainer.args.output_dir)
    if isinstance(resume_from_checkpoint, bool):
        resume_from_checkpoint = (find_checkpoint or _find_last_valid)(folder) if resume_from_checkpoint else None
    checkpoint = None if resume_from_checkpoint is None else str(resume_from_checkpoint)
    if checkpoint is None and trainer.is_world_process_zero():
        (folder / SKIPS_NAME).unlink(missing_ok=True)  # a new run in an old folder
    from_all_ranks(None)
    collect, rollbacks = trainer.get_batch_samples, 0
    try:
        while True:
            if skip_data and not trainer.args.ignore_data_skip:
                trainer.get_batch_samples = _SkippingBatches(trainer, collect)
            try:
                return train(checkpoint)
            except RollbackRequested as request:
                rollbacks += 1
                if rollbacks > max_rollbacks:
                    raise
                checkpoint = str(_go_back(trainer, request, find_checkpoint or _find_last_valid, skip_data))
    finally:
        trainer.__dict__.pop("get_batch_samples", None)
        if collect != trainer.get_batch_samples:  # somebody else's replacement
            trainer.get_batch_samples = collect


def _go_back(
    trainer: Trainer, request: RollbackRequested, find_checkpoint: Callable[[Path], Path | None], skip_data: bool
) -> Path:
    folder, first = Path(trainer.args.output_dir), trainer.is_world_process_zero()
    log, checkpoint, failure = EventLog(folder, rank=trainer.args.process_index), None, ""
    if first:
        try:
            checkpoint = _checkpoint_before(trainer, request, find_checkpoint)
        except OSError as error:  # the other ranks wait for what this one found
            failure = f" ({error})"
    checkpoint, failure = from_all_ranks((checkpoint, failure))[0]
    if checkpoint is None:
        raise RuntimeError(
            f"step {request.step}: {request.reason} There is no valid checkpoint in {folder} to go back to{failure}. "
            "Save more often (save_steps), or start anew."
        ) from request
    step = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if first:
        skips = read_skips(folder)
        if skip_data and not trainer.args.ignore_data_skip:
            skips = with_skip(
                skips,
                checkpoint=step,
                step=request.step,
                batches_per_step=trainer.args.gradient_accumulation_steps,
                seen=request.skip_batches,
                reason=request.reason,
            )
            write_text_atomically(folder / SKIPS_NAME, json.dumps([asdict(skip) for skip in skips], indent=1) + "\n")
        log.record(
            "rollback",
            "warning",
            step=request.step,
            action="rollback",
            message=f"{request.reason} Going back to {Path(checkpoint).name}.",
            evidence={
                "checkpoint": step,
                "lost_steps": request.step - step,
                "skipped_batches": skips[-1].batches if skips and skip_data else 0,
            },
        )
    from_all_ranks(None)  # the others read the file
    return Path(checkpoint)


def _checkpoint_before(
    trainer: Trainer, request: RollbackRequested, find_checkpoint: Callable[[Path], Path | None]
) -> Path | None:
    """The checkpoint to go back to. Those that are too new for the request get another name, by which neither rotation
    nor a resume finds them; where nothing older is valid, they keep theirs."""
    from ..callbacks import ValidatedCheckpointCallback  # which imports parts of this package

    folder, renamed = Path(trainer.args.output_dir), []
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ValidatedCheckpointCallback):
            callback.wait()  # the newest checkpoint may be in the middle of its commit
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if request.newest is not None else ():
        number = path.name.rsplit("-", 1)[1]
        if number.isdigit() and int(number) > request.newest:
            free = path.with_name(f"{ABANDONED}{path.name}")
            times = 1
            while free.exists():  # from an earlier rollback
                times += 1
                free = path.with_name(f"{ABANDONED}{path.name}-{times}")
            renamed.append((path, path.rename(free)))
    checkpoint = find_checkpoint(folder)
    if checkpoint is None:
        for path, abandoned in renamed:
            abandoned.rename(path)
    return checkpoint


def _find_last_valid(folder: Path) -> Path | None:
    from .checkpoints import find_last_valid_checkpoint

    return find_last_valid_checkpoint(folder)


class _SkippingBatches:
    """In the place of `Trainer.get_batch_samples`, which is called once per optimizer step: hands on Trainer's own
    iterator until there is something to skip, then one that stands where `position` says."""

    def __init__(self, trainer: Trainer, collect: Callable[..., Any]):
        self.trainer, self.collect = trainer, collect
        self.skips = read_skips(trainer.args.output_dir)
        self.batches: Iterator[Any] | None = None

    def __call__(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        step = self.trainer.state.global_step
        skipped = skipped_batches(self.skips, step)
        if skipped and self.batches is None:
            self.batches = _batches_from(self.trainer, step, skipped)
        return self.collect(self.batches if skipped else epoch_iterator, num_batches, device)


def _batches_from(trainer: Trainer, step: int, skipped: int) -> Iterator[Any]:
    loader, step = trainer.get_train_dataloader(), step - _data_start_step(trainer)
    accumulation = trainer.args.gradient_accumulation_steps
    if has_length(loader):
        length = len(loader)
        # As Trainer counts: the last step of an epoch may have fewer micro-batches.
        steps_per_epoch = max(-(-length // accumulation), 1)
        epoch, within = divmod(step, steps_per_epoch)
        epoch, offset = divmod(epoch * length + within * accumulation + skipped, length)
    else:
        length, epoch, offset = None, 0, step * accumulation + skipped
    while True:
        taken = 0
        _set_epoch(loader, epoch)
        for batch in skip_first_batches(loader, offset) if offset else loader:
            taken += 1
            yield batch
        if not taken and not offset:
            return
        if length is None and not taken:
            raise RuntimeError(
                f"The stream ended before batch {offset}, behind which the data was to go on. Give it more data, or "
                "train with skip_data=False."
            )
        epoch, offset = epoch + 1, 0


def _data_start_step(trainer: Trainer) -> int:
    """The step at which the data is at its first sample: another than 0 where a resumed run changed data or batch."""
    from ..callbacks import ResumeGuardCallback  # which imports parts of this package

    guards = (each for each in trainer.callback_handler.callbacks if isinstance(each, ResumeGuardCallback))
    return next((guard.data_start_step for guard in guards), 0)


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    # Before batches are skipped: the wrapper that skips hides the sampler whose order depends on the epoch.
    sampler = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    for each in (loader, sampler):
        if hasattr(each, "set_epoch"):
            each.set_epoch(epoch)


__all__ = [
    "SKIPS_NAME",
    "DataSkip",
    "RollbackRequested",
    "read_skips",
    "skipped_batches",
    "train_with_rollback",
    "with_skip",
]
