"""Cost of the recommended reliability set: the same Trainer with it and without, step by step in turns.

Both arms are real Trainers at the demo's shape, on random token ids, each waiting before every optimizer step until it
is its turn, so that both meet the same moods of the machine. A step is all that happens between two beginnings of a
step, callbacks and the data loader included. Garbage collection is the process's: manual for both, charged to the one
with the set. Saving is not in it: what validating a checkpoint costs is per gigabyte,
in the background, and apart in the report. The time that each callback spends is also summed by itself.
"""

import argparse
import contextlib
import dataclasses
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..callbacks import install_callbacks
from ..reliability import reliability
from .alternating_blocks import Timing, TimingVerdict, judge, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


LIMIT = 1.02
RESOLUTION = 0.02  # an interval wider than this resolves nothing
WARMUP_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReliabilityReport(TimingReport):
    """What `reliability-<device>.json` holds. `shares`: time inside each callback over that of all steps, of the arm
    that has them."""

    clock: str
    data: str
    batch_size: int
    sequence_length: int
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing
    callbacks: list[str]
    shares: dict[str, float]
    share_of_all: float


class SteppedTrainer:
    """A Trainer that trains in a thread of its own and waits before each optimizer step for [`step`]."""

    def __init__(self, trainer: Trainer):
        self.trainer, self._go, self._ready = trainer, threading.Semaphore(0), threading.Semaphore(0)
        self._over, self._error, self._threads = False, None, torch.get_num_threads()
        trainer.add_callback(_Turn(self))
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()
        self._await()

    def step(self) -> None:
        """One optimizer step, and all that the Trainer does until the next would begin."""
        self._go.release()
        self._await()

    def finish(self) -> None:
        """End the training; a step that has begun is done."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _await(self) -> None:
        self._ready.acquire()
        if self._error is not None:
            raise self._error

    def _train(self) -> None:
        torch.set_num_threads(self._threads)  # a setting of each thread
        try:
            self.trainer.train()
        except BaseException as error:  # it belongs to the thread that waits
            self._error = error
        self._ready.release()


class _Turn(TrainerCallback):
    def __init__(self, stepped: SteppedTrainer):
        self.stepped = stepped

    def on_step_begin(self, args, state, control, **kwargs):
        self.stepped._ready.release()
        self.stepped._go.acquire()

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or self.stepped._over


class CallbackClock:
    """Sums the wall time inside each callback of a Trainer, hooks on the model not included."""

    def __init__(self, callbacks: list[TrainerCallback]):
        self.seconds: dict[str, float] = defaultdict(float)
        for callback in callbacks:
            for name in dir(callback):
                if name.startswith("on_") and callable(getattr(callback, name)):
                    setattr(callback, name, self._timed(type(callback).__name__, getattr(callback, name)))

    def _timed(self, owner: str, method):
        def timed(*args, **kwargs):
            start = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds[owner] += time.perf_counter() - start

        return timed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=12, steps_per_block=20)


def run(options: argparse.Namespace) -> None:
    """Measure at the demo's shape, write the report, print it."""
    torch.set_num_threads(options.threads)
    config = SigmaMoeConfig.from_preset("demo")
    report = measure(config, blocks=options.blocks, steps_per_block=options.steps_per_block)
    print(f"{markdown_table(report)}\n\nWrote {write_report(report, options.output)}")


def measure(
    config: SigmaMoeConfig, *, blocks: int, steps_per_block: int, batch_size: int = 4, sequence_length: int = 256
) -> ReliabilityReport:
    """Run both arms with as many threads as torch has."""
    clock = clock_of(torch.get_num_threads())
    steps = WARMUP_STEPS + blocks * steps_per_block + 1
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        trainers = [
            _trainer(config, Path(folder) / name, steps, batch_size, sequence_length) for name in ("with", "without")
        ]
        added = reliability(trainers[0])
        timed = CallbackClock(added)
        arms = []
        for trainer in trainers:
            arms.append(SteppedTrainer(trainer))
            stack.callback(arms[-1].finish)
        for arm in arms:
            for _ in range(WARMUP_STEPS):
                arm.step()
        timed.seconds.clear()
        ours, baseline = arms
        timings = time_alternately(ours.step, baseline.step, blocks=blocks, steps_per_block=steps_per_block)
        seconds = dict(timed.seconds)
    total = timings["wall"].ours_seconds * blocks * steps_per_block
    return ReliabilityReport(
        benchmark="reliability",
        clock=clock,
        data="random token ids",
        shape=config.to_diff_dict(),
        batch_size=batch_size,
        sequence_length=sequence_length,
        blocks=blocks,
        steps_per_block=steps_per_block,
        limit=LIMIT,
        resolution=RESOLUTION,
        verdict=judge(timings[clock].ratio, limit=LIMIT, resolution=RESOLUTION),
        callbacks=[type(callback).__name__ for callback in added],
        shares={name: spent / total for name, spent in sorted(seconds.items(), key=lambda item: -item[1])},
        share_of_all=sum(seconds.values()) / total,
        **timings,
    )


def _trainer(config: SigmaMoeConfig, folder: Path, steps: int, batch_size: int, sequence_length: int) -> Trainer:
    torch.manual_seed(0)
    model = SigmaMoeForCausalLM(config)
    ids = torch.randint(config.vocab_size, (256, sequence_length), generator=torch.Generator().manual_seed(0))
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch_size,
        learning_rate=1e-6,  # both arms route alike throughout
        lr_scheduler_type="constant",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, args, train_dataset=rows)
    install_callbacks(trainer)
    return trainer


def markdown_table(report: ReliabilityReport) -> str:
    """The ratio of the report and what each callback spent."""
    ratios = ", ".join(
        f"{name} time {timing.ratio.median:.4f} [{timing.ratio.low:.4f}, {timing.ratio.high:.4f}]"
        for name, timing in (("process", report.process), ("wall", report.wall))
    )
    lines = [
        f"Training step with the recommended set over that without, {report.device}, {report.batch_size} x "
        f"{report.sequence_length} tokens ({report.data}); {report.blocks} alternating blocks of "
        f"{report.steps_per_block} steps: {ratios}; limit {report.limit} by {report.clock} time: {report.verdict}.",
        "",
        "| callback | share of the step |",
        "|---|---:|",
        *(f"| {name} | {share:.3%} |" for name, share in report.shares.items()),
        f"| all | {report.share_of_all:.3%} |",
    ]
    return "\n".join(lines)
