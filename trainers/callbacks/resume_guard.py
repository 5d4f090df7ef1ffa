"""What must be the same when a run goes on, and what may differ if its consequences are drawn."""

import hashlib
import json
import random
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderDispatcher
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from ..reliability.agreement import from_all_ranks
from ..reliability.checkpoints import config_fingerprint, write_text_durably
from ..reliability.events import EventLog


COMPONENT = "resume_guard"
RECORD_NAME = "resume.json"
ACCEPTABLE = ("world_size", "seed", "tokenizer", "config", "data")


class ResumeError(ValueError):
    """The run differs from its checkpoint in what must be the same; the message lists everything with its remedy."""


@dataclass(frozen=True, kw_only=True)
class ResumeRecord:
    """What a checkpoint says of its run, in `resume.json`. Hashes are SHA-256; `None`: not known, not compared.

    Args:
        step: optimizer steps that were finished.
        consumed_samples: samples that were trained on, over all data, in whole batches.
        batch_size: samples of one optimizer step over all ranks.
        data_key: the name that the user gave to the data.
        data_start_step: the data stands where it would stand after `step - data_start_step` steps from its beginning.
            It is 0 in a run that never changed its data or batch.
        steps_per_epoch: optimizer steps of one pass over the data.
        samples_per_epoch: of one pass, in whole micro-batches; `None` for a stream.
    """

    step: int
    consumed_samples: int
    batch_size: int
    data_key: str | None
    data_start_step: int
    steps_per_epoch: int
    samples_per_epoch: int | None
    world_size: int
    seed: int
    data_seed: int | None
    tokenizer_sha256: str | None
    config_sha256: str | None
    learning_rate: float


@dataclass(frozen=True)
class BatchRampUp:
    """`start` samples a step until `samples` are consumed, then `start + increment`: Megatron's arguments, chosen so
    that the past is counted at the batch it had, and everything from now on at the new one."""

    start: int
    increment: int
    samples: int

    def batch_size(self, consumed_samples: int) -> int:
        """Of the step that follows `consumed_samples`."""
        return self.start + (self.increment if consumed_samples > self.samples else 0)


def batch_ramp_up(consumed_samples: int, step: int, batch_size: int) -> BatchRampUp | None:
    """The ramp-up that goes over to `batch_size` now; `None` if the mean batch so far was the same.

    B0 = consumed // step; start B0, increment B1 - B0, over B0 * step - 1 samples (SIGMA stack, arXiv 2512.13488,
    framework layer: resume with new batch).
    """
    if step < 1:
        raise ValueError(f"step={step} must be at least 1: before the first step there is no batch to change from.")
    before = consumed_samples // step
    return None if before == batch_size else BatchRampUp(before, batch_size - before, before * step - 1)


class ResumeGuardCallback(TrainerCallback):
    """Record with each checkpoint what a run depends on (`resume.json`); compare when it goes on.

    * World size, seeds, tokenizer and model configuration must be the same, and so must the length of the data, unless
      its key changed: [`ResumeError`] lists every difference with its remedy before the first step, on all ranks.
    * Another `data_key`: the new data starts at its first sample, the learning-rate schedule goes on counting. Kept
      over further resumes: the offset is in the record.
    * Another batch (per device, accumulation, accepted world size): the data goes on behind the samples that were
      consumed, rounded down to whole new batches; the event carries the ramp-up arithmetic ([`batch_ramp_up`]).
    * Another `learning_rate`: the checkpoint's value wins, as in any Trainer, and a warning says so; with
      `override_learning_rate` the argument wins in every optimizer and in the scheduler, after they were loaded.

    The rules are those of the SIGMA stack (arXiv 2512.13488, framework layer: resume with new data, batch, LR), where
    a sampler takes the offset. Here Trainer's own skipping of seen data is switched off in such a resume and its
    loader starts where it should; random states are restored as Trainer does. In all other resumes Trainer is left
    alone, and so it is with `ignore_data_skip=True`.

    A checkpoint without a record (made before the guard was there) is resumed with a warning.

    Args:
        data_key: names the data; change it when the data changes. `None`: never compared.
        accept: differences to go on with all the same, of `"world_size"`, `"seed"`, `"tokenizer"`, `"config"`,
            `"data"`; each is a warning.
        override_learning_rate: see above. Groups that had another rate than the run's keep their ratio to it.
        checkpoint: the folder that is resumed from; by default `args.resume_from_checkpoint`, or `checkpoint-STEP` of
            the run folder.
    """

    def __init__(
        self,
        *,
        data_key: str | None = None,
        accept: Collection[str] = (),
        override_learning_rate: bool = False,
        checkpoint: str | Path | None = None,
    ):
        accept = {accept} if isinstance(accept, str) else set(accept)
        if strangers := sorted(accept - set(ACCEPTABLE)):
            raise ValueError(f"accept={strangers} is not known. Choose of {ACCEPTABLE}.")
        self.data_key, self.accept, self.override_learning_rate = data_key, accept, override_learning_rate
        self.checkpoint = checkpoint

    def on_train_begin(
        self, args, state, control, model=None, processing_class=None, optimizer=None, lr_scheduler=None, **kwargs
    ):
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self._ignore_data_skip = self._random_states = None
        loader = kwargs.get("train_dataloader")
        self._now = now = _describe(args, state, self.data_key, model, processing_class, loader)
        if state.global_step == 0:
            return
        folder = self._resumed_from(args, state.global_step)
        before = from_all_ranks(read_record(folder))[0]
        if before is None:
            message = f"{folder.name} has no {RECORD_NAME}: whether this run is the same is not known."
            return self._tell(args, "warning", now.step, message)
        self._refuse_differences(args, before, now)
        start = self._data_start(args, before, now)
        self._now = now = ResumeRecord(
            **asdict(now) | {"data_start_step": start, "consumed_samples": before.consumed_samples}
        )
        if start != 0 and loader is not None and not args.ignore_data_skip:
            _start_at(loader, *_position(args, now), args.world_size)
            # Read once more by Trainer, before the first step; given back then.
            self._ignore_data_skip, args.ignore_data_skip = args.ignore_data_skip, True
            self._random_states = _random_states_file(folder, args)
        self._learning_rate(args, before, now, optimizer, lr_scheduler)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._ignore_data_skip is not None:
            args.ignore_data_skip, self._ignore_data_skip = self._ignore_data_skip, None
        if self._random_states is not None:
            # Here, after the data was skipped, as Trainer does it: skipping may draw random numbers.
            _restore_random_states(self._random_states, args)
            self._random_states = None

    def on_save(self, args, state, control, **kwargs):
        if not args.should_save:
            return
        done = state.global_step - self._now.step
        values = asdict(self._now) | {
            "step": state.global_step,
            "consumed_samples": self._now.consumed_samples + done * self._now.batch_size,
        }
        file = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / RECORD_NAME
        write_text_durably(file, json.dumps(values, indent=1) + "\n")

    @property
    def data_start_step(self) -> int:
        """The step at which this run's data is, or would have been, at its first sample."""
        return self._now.data_start_step

    def _resumed_from(self, args, step: int) -> Path:
        default = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        named = self.checkpoint or args.resume_from_checkpoint
        # Of another step after a rollback, which goes to a checkpoint of this run.
        return Path(named) if isinstance(named, str | Path) and _step_of(Path(named)) in (step, None) else default

    def _refuse_differences(self, args, before: ResumeRecord, now: ResumeRecord) -> None:
        refused = []
        for kind, message in _differences(before, now):
            if kind in self.accept:
                self._tell(args, "warning", now.step, f"Accepted: {message}")
            else:
                refused.append(f"{message} Or go on all the same: accept={{{kind!r}}}.")
        if refused:
            message = f"step {now.step}: this run is not the one of its checkpoint.\n  " + "\n  ".join(refused)
            self._tell(args, "fatal", now.step, message, action="stop")
            raise ResumeError(message)

    def _data_start(self, args, before: ResumeRecord, now: ResumeRecord) -> int:
        """`data_start_step` of this run."""
        if _changed(before.data_key, now.data_key):
            message = f"The data is {now.data_key!r} from here on (was {before.data_key!r}), from its first sample."
            evidence = {"offset_samples": -before.consumed_samples}
            self._tell(args, "info", now.step, message, evidence=evidence)
            return now.step
        if before.batch_size == now.batch_size:
            return before.data_start_step
        ramp_up = batch_ramp_up(before.consumed_samples, before.step, now.batch_size)
        message = f"The batch is {now.batch_size} samples from here on (was {before.batch_size})."
        evidence = {"consumed_samples": before.consumed_samples, "ramp_up": ramp_up and asdict(ramp_up)}
        self._tell(args, "info", now.step, message, evidence=evidence)
        epochs, steps = divmod(before.step - before.data_start_step, before.steps_per_epoch)
        samples = steps * before.batch_size
        return now.step - (epochs * now.steps_per_epoch + samples // now.batch_size)

    def _learning_rate(self, args, before: ResumeRecord, now: ResumeRecord, optimizer, scheduler) -> None:
        old, new = before.learning_rate, now.learning_rate
        if old == new:
            return
        if self.override_learning_rate:
            set_learning_rate(optimizer, scheduler, old=old, new=new)
            self._tell(args, "info", now.step, f"learning_rate is {new:g} from here on (was {old:g}).")
            return
        self._now = ResumeRecord(**asdict(now) | {"learning_rate": old})
        message = f"learning_rate={new:g} has no effect: the checkpoint's {old:g} goes on. To change it pass "
        self._tell(args, "warning", now.step, message + "override_learning_rate=True.")

    def _tell(self, args, severity: str, step: int, message: str, **fields: Any) -> None:
        if args.process_index == 0:
            self._log.record(COMPONENT, severity, step=step, message=message, **fields)


def _step_of(checkpoint: Path) -> int | None:
    """Its finished steps; `None` if it does not say, -1 if there is no such folder."""
    if not checkpoint.is_dir():
        return -1
    file = checkpoint / TRAINER_STATE_NAME
    return TrainerState.load_from_json(str(file)).global_step if file.is_file() else None


def read_record(folder: str | Path) -> ResumeRecord | None:
    """The record of a checkpoint; `None` if it has none. `ResumeError` if it cannot be read."""
    file = Path(folder) / RECORD_NAME
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return ResumeRecord(**{field.name: values[field.name] for field in fields(ResumeRecord)})
    except (ValueError, TypeError, KeyError) as error:
        raise ResumeError(
            f"{file} cannot be read ({error!r}). Resume from the checkpoint before, or delete the file to go on "
            "without comparing."
        ) from error


def tokenizer_fingerprint(tokenizer: Any) -> str | None:
    """SHA-256 of what a tokenizer does to text, whatever it pads or truncates to at the moment; `None` for none."""
    if not hasattr(tokenizer, "get_vocab"):
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    parts = [rules, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def set_learning_rate(optimizer: Any, scheduler: Any, *, old: float, new: float) -> None:
    """Let a run of learning rate `old` go on with `new`, in every optimizer and in the scheduler.

    Groups of another rate keep their ratio to it. What the schedule has come to is kept: with a `LambdaLR` (all of
    transformers' schedules but one) the rate is exactly that of a run that had `new` from the start.
    """
    if old <= 0:
        raise ResumeError(
            f"learning_rate={old} of the checkpoint is no base to change from. Start with new optimizers."
        )
    for group in _groups(optimizer):
        for name in ("initial_lr", "lr"):
            if name in group:
                group[name] = new if group[name] == old else group[name] * (new / old)
    if scheduler is None or not hasattr(scheduler, "base_lrs"):
        return
    scheduler.base_lrs = [new if base == old else base * (new / old) for base in scheduler.base_lrs]
    if isinstance(scheduler, LambdaLR):
        scaled = zip(scheduler.optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas)
        for group, base, factor in scaled:
            group["lr"] = base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in scheduler.optimizer.param_groups]


def _groups(optimizer: Any) -> Iterator[dict]:
    """The parameter groups of an optimizer, of the one inside a wrapper, or of all in a chain, each once."""
    seen, queue = set(), [optimizer]
    while queue:
        each = queue.pop()
        inner = getattr(each, "chained_optimizers", None) or getattr(each, "optimizers", None)
        if inner:
            queue.extend(inner.values() if isinstance(inner, dict) else inner)
        elif isinstance(getattr(each, "optimizer", None), torch.optim.Optimizer):
            queue.append(each.optimizer)
        else:
            for group in each.param_groups:
                if id(group) not in seen:
                    seen.add(id(group))
                    yield group


def _describe(args: TrainingArguments, state, data_key, model, tokenizer, loader) -> ResumeRecord:
    config = getattr(model, "config", None)
    batches = len(loader) if has_length(loader) else None
    micro_batch = args.train_batch_size * args.world_size
    batch = micro_batch * args.gradient_accumulation_steps
    steps = state.max_steps if batches is None else max(1, -(-batches // args.gradient_accumulation_steps))
    return ResumeRecord(
        step=state.global_step,
        consumed_samples=state.global_step * batch,
        batch_size=batch,
        data_key=data_key,
        data_start_step=0,
        steps_per_epoch=steps,
        samples_per_epoch=None if batches is None else batches * micro_batch,
        world_size=args.world_size,
        seed=args.seed,
        data_seed=args.data_seed,
        tokenizer_sha256=tokenizer_fingerprint(tokenizer),
        config_sha256=config_fingerprint(config) if config is not None else None,
        learning_rate=args.learning_rate,
    )


def _changed(before: Any, now: Any) -> bool:
    return before is not None and now is not None and before != now


def _differences(before: ResumeRecord, now: ResumeRecord) -> Iterator[tuple[str, str]]:
    if before.world_size != now.world_size:
        message = f"world_size={now.world_size}, the checkpoint has {before.world_size} (random states are by rank): "
        yield "world_size", message + f"start {before.world_size} processes."
    for name in ("seed", "data_seed"):
        if (old := getattr(before, name)) != (new := getattr(now, name)):
            yield (
                "seed",
                f"{name}={new}, the checkpoint has {old}: set {name}={old}, or the data comes in another order.",
            )
    if _changed(before.tokenizer_sha256, now.tokenizer_sha256):
        yield "tokenizer", "The tokenizer is another one: load it from the checkpoint folder."
    if _changed(before.config_sha256, now.config_sha256):
        yield "config", "The model's configuration is another one: take config.json of the checkpoint folder."
    same_data = not _changed(before.data_key, now.data_key)
    if same_data and before.batch_size == now.batch_size and not _as_many(before, now):
        message = f"The data has {now.samples_per_epoch} samples, the checkpoint's had {before.samples_per_epoch}: "
        yield "data", message + "take the same, or give new data another data_key to start it at its first sample."


def _as_many(before: ResumeRecord, now: ResumeRecord) -> bool:
    """Whether the data may be as long as it was. Both counts are whole micro-batches, whose size may have changed."""
    if before.samples_per_epoch is None or now.samples_per_epoch is None:
        return before.samples_per_epoch == now.samples_per_epoch
    return abs(before.samples_per_epoch - now.samples_per_epoch) < max(before.batch_size, now.batch_size)


# Where the data goes on


def _position(args: TrainingArguments, now: ResumeRecord) -> tuple[int, int]:
    """The epoch of the data, and the micro-batches of each rank to pass over in it."""
    epoch, steps = divmod(now.step - now.data_start_step, now.steps_per_epoch)
    return epoch, steps * args.gradient_accumulation_steps


class _ShiftedData:
    """In the place of the loader inside Trainer's: the data from batch `offset` of `epoch` on, one epoch's worth of
    batches for each pass.

    Trainer passes over the data once for each of *its* epochs, whose number it takes from the step; the data's epochs
    are shifted against them, and one follows the other within a pass. Trainer has made its loader before it calls any
    callback, so it is inside that object that something must change.
    """

    def __init__(self, loader: Any, epoch: int, offset: int):
        self.inner, self.set_epoch = loader.base_dataloader, loader.set_epoch
        self.epoch, self.offset = epoch, offset

    def __iter__(self) -> Iterator[Any]:
        length = len(self) if has_length(self.inner) else None
        left = length
        while left is None or left > 0:
            if length is not None and self.offset >= length:
                self.epoch, self.offset = self.epoch + 1, 0
            self.set_epoch(self.epoch)
            rest = skip_first_batches(self.inner, self.offset) if self.offset else self.inner
            # A loader draws a random number when it starts. Where in a pass an epoch starts depends on where the run
            # was resumed, and training must not.
            with torch.random.fork_rng(devices=[]):
                batches = iter(rest)
            for batch in batches if left is None else islice(batches, left):
                self.offset += 1
                left = left if left is None else left - 1
                yield batch
            if length is None:  # a stream is passed over once, Trainer sees to the next pass
                self.epoch, self.offset = self.epoch + 1, 0
                return

    def __len__(self) -> int:
        return len(self.inner)

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def _start_at(loader: Any, epoch: int, offset: int, world_size: int) -> None:
    """Let Trainer's `loader` hand out the data from batch `offset` of each rank in `epoch` on."""
    if isinstance(loader, DataLoaderDispatcher) and not loader.split_batches:
        offset *= world_size  # one rank reads for all
    loader.base_dataloader = _ShiftedData(loader, epoch, offset)


def _random_states_file(folder: Path, args: TrainingArguments) -> Path | None:
    name = "rng_state.pth" if args.world_size <= 1 else f"rng_state_{args.process_index}.pth"
    return folder / name if (folder / name).is_file() else None


def _restore_random_states(file: Path, args: TrainingArguments) -> None:
    with safe_globals():
        states = torch.load(file, weights_only=True)
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.random.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        of_all = isinstance(states["cuda"], list)
        (torch.cuda.random.set_rng_state_all if of_all else torch.cuda.random.set_rng_state)(states["cuda"])


__all__ = [
    "BatchRampUp",
    "ResumeError",
    "ResumeGuardCallback",
    "ResumeRecord",
    "batch_ramp_up",
    "read_record",
    "set_learning_rate",
    "tokenizer_fingerprint",
]
