"""Name the rank that makes the others wait.

With synchronous training every rank's step takes as long as the slowest one's: the others wait inside collectives.
What tells ranks apart is the time that each spends *outside* of them, and that is all that is compared here:

* **data**: from the end of the last step (or of its log, evaluation or save) to `on_step_begin`;
* **compute**: forward, and backward up to the last gradient. DistributedDataParallel reduces beside the backward and
  waits only after the last gradient is there, so the hook of the last parameter is the last moment that is the rank's
  own. What DDP does before the forward (it sends buffers from rank 0) is left out for the same reason;
* **optimizer**: `on_pre_optimizer_step` to `on_optimizer_step`; clipping is left out.

From each, the time inside functions of `torch.distributed` that wait at once is taken away (Trainer gathers the number
of targets before a step; a balance loss over the global batch reduces inside the forward). To see them, the functions
are wrapped during the step that is measured, and only then.
"""

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from ..reliability.agreement import from_all_ranks
from ..reliability.events import EventLog


COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "barrier", "all_gather", "all_gather_into_tensor", "gather", "scatter"),
    *("reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single", "all_gather_object"),
    *("broadcast_object_list", "gather_object", "scatter_object_list", "send", "recv"),
)
PHASES = ("data", "compute", "optimizer")


class StragglerCallback(TrainerCallback):
    r"""Measure every `every`-th step on all ranks, gather the times, and accuse a rank that is slow by two standards.

    With \\(t_r\\) the seconds of rank r outside of collectives, \\(m\\) and \\(\mathrm{MAD}\\) the median and median
    absolute deviation of the *other* ranks' times, r is an outlier in space if

    $$ (t_r - m) / \max(1.4826 \, \mathrm{MAD}, \; \mathrm{tolerance} \cdot m) > \mathrm{threshold} $$

    and in time if the same holds against the moving average of its own times and of their absolute deviations, into
    which outliers in space do not go. A rank is accused when both hold in `patience` samples in a row: an event of
    severity `"warning"` with `accused_rank`, `accused_host` and the phase, once until it recovers. If all become
    slower nobody is accused. A rank that was slower than the others from the start has no better past of its own; that
    is noted once as an `"info"` event. Both standards are the SIGMA stack's (arXiv 2512.13488); its thresholds are not
    published, and these, leaving the rank itself out, and the floor `tolerance` (with few ranks or steady times the
    MAD is near 0) are our proposal.

    Needs two ranks; with one it does nothing. The device is synchronised only in the step that is measured. Where
    parameters are sharded (FSDP, tensor parallelism) collectives are everywhere in the forward, and where a collective
    is compiled into the graph it cannot be seen: there, only `data` and `optimizer` (sharded), or with them what
    `compute` includes of waiting (compiled), are compared, and a slow device may go unnoticed, though nobody is
    accused in its place.

    Args:
        every: steps between two samples.
        threshold: deviations beyond which a time is an outlier.
        tolerance: smallest deviation, as a fraction of the median: threshold * tolerance is the slowdown that counts.
        warmup: samples from which the rank's own past is made before anyone is accused.
        patience: samples in a row.
        decay: share of the past in its moving average.

    Raises:
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        every: int = 50,
        *,
        threshold: float = 4.0,
        tolerance: float = 0.05,
        warmup: int = 3,
        patience: int = 2,
        decay: float = 0.9,
    ):
        for name, value in (("every", every), ("warmup", warmup), ("patience", patience)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if threshold <= 0 or tolerance <= 0 or not 0 <= decay < 1:
            raise ValueError(
                f"threshold={threshold} and tolerance={tolerance} must be positive, decay={decay} in [0, 1)."
            )
        self.every = every
        self._judge_options = {"threshold": threshold, "tolerance": tolerance, "warmup": warmup}
        self._judge_options |= {"patience": patience, "decay": decay}
        self._timer: _StepTimer | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._drop()
        self._events = EventLog(args.output_dir, rank=args.process_index)
        self._judge = StragglerJudge(**self._judge_options)
        self._active = dist.is_initialized() and dist.get_world_size() > 1
        if self._active:
            sharded = bool(args.fsdp) or any(isinstance(p, DTensor) for p in model.parameters())
            self._make_timer = partial(
                _StepTimer, model, args.device, sharded=sharded, compiled=bool(args.torch_compile)
            )
            self._maybe_start(state)

    def on_step_begin(self, args, state, control, **kwargs):
        if self._timer is not None:
            self._timer.end_data()

    def on_substep_end(self, args, state, control, **kwargs):
        if self._timer is not None:
            self._timer.begin_compute()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self._timer is not None:
            self._timer.begin_optimizer()

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self._timer is not None:
            self._timer.end_optimizer()

    def on_step_end(self, args, state, control, **kwargs):
        if not self._active:
            return
        if self._timer is not None:
            seconds = self._timer.finish()
            self._timer = None
            everyone = from_all_ranks((socket.gethostname(), seconds))
            if state.is_world_process_zero:
                self._report(everyone, state.global_step)
        self._maybe_start(state)

    def _again(self, args, state, control, **kwargs):
        if self._timer is not None:  # what lies between two steps is not the loader's time
            self._timer.begin_data()

    on_log = on_evaluate = on_save = on_epoch_begin = _again

    def on_train_end(self, args, state, control, **kwargs):
        self._drop()

    def _maybe_start(self, state) -> None:
        if (state.global_step + 1) % self.every == 0:
            self._timer = self._make_timer()

    def _drop(self) -> None:
        if self._timer is not None:
            self._timer.close()
            self._timer = None

    def _report(self, everyone: list[tuple[str, dict[str, float]]], step: int) -> None:
        times = [seconds for _, seconds in everyone]
        for verdict in self._judge(times):
            host = everyone[verdict.rank][0]
            evidence = {
                "accused_rank": verdict.rank,
                "accused_host": host,
                "phase": verdict.phase,
                "seconds": {phase: [round(t.get(phase, 0.0), 6) for t in times] for phase in PHASES},
                "z_space": round(verdict.z_space, 2),
                "z_time": round(verdict.z_time, 2),
            }
            if verdict.accused:
                message = (
                    f"rank {verdict.rank} on {host} makes the others wait, mostly in {verdict.phase}: "
                    f"{verdict.seconds:.3g} s outside of collectives, the others {verdict.others:.3g} s, itself "
                    f"before {verdict.before:.3g} s."
                )
                confidence = min(0.99, 1 - 1 / (1 + min(verdict.z_space, verdict.z_time)))
                self._events.record(
                    "straggler", "warning", step=step, message=message, evidence=evidence, confidence=confidence
                )
            else:
                message = (
                    f"rank {verdict.rank} on {host} has been slower than the others since the run began: "
                    f"{verdict.seconds:.3g} s against {verdict.others:.3g} s. Without a better past it is not accused."
                )
                self._events.record("straggler", step=step, message=message, evidence=evidence, confidence=0.5)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """About one rank in one sample; seconds are those outside of collectives."""

    rank: int
    accused: bool
    phase: str
    seconds: float
    others: float
    before: float
    z_space: float
    z_time: float


@dataclass
class _Past:
    samples: list[float] = field(default_factory=list)
    mean: float = 0.0
    deviation: float = 0.0
    slow_in_space: int = 0
    slow_in_both: int = 0


class StragglerJudge:
    """The rule of [`StragglerCallback`] without the clock: a sample goes in, verdicts come out."""

    def __init__(self, *, threshold: float, tolerance: float, warmup: int, patience: int, decay: float):
        self.threshold, self.tolerance, self.decay = threshold, tolerance, decay
        self.warmup, self.patience = warmup, patience
        self._past: list[_Past] = []

    def __call__(self, sample: list[dict[str, float]]) -> list[Verdict]:
        """`sample[rank][phase]` in seconds, of two ranks or more -> the ranks that there is something new about."""
        if len(self._past) != len(sample):
            self._past = [_Past() for _ in sample]
        totals = [sum(phases.values()) for phases in sample]
        verdicts = []
        for rank, (seconds, past) in enumerate(zip(totals, self._past)):
            others = totals[:rank] + totals[rank + 1 :]
            middle = statistics.median(others)
            z_space = self._z(seconds, middle, statistics.median(abs(t - middle) for t in others))
            warm = len(past.samples) < self.warmup
            z_time = 0.0 if warm else self._z(seconds, past.mean, past.deviation)
            slow = z_space > self.threshold
            past.slow_in_space = past.slow_in_space + 1 if slow else 0
            past.slow_in_both = past.slow_in_both + 1 if slow and z_time > self.threshold else 0
            accused = past.slow_in_both == self.patience
            since_the_start = past.slow_in_space == self.warmup + self.patience and not past.slow_in_both
            if accused or since_the_start:
                excess = {p: t - statistics.median(o.get(p, 0.0) for o in sample) for p, t in sample[rank].items()}
                verdicts.append(
                    Verdict(
                        rank=rank,
                        accused=accused,
                        phase=max(excess, key=excess.get),
                        seconds=seconds,
                        others=middle,
                        before=past.mean,
                        z_space=z_space,
                        z_time=z_time,
                    )
                )
            self._remember(past, seconds, warm=warm, outlier=slow)
        return verdicts

    def _z(self, seconds: float, middle: float, deviation: float) -> float:
        return (seconds - middle) / max(1.4826 * deviation, self.tolerance * middle, 1e-9)

    def _remember(self, past: _Past, seconds: float, *, warm: bool, outlier: bool) -> None:
        if warm:
            past.samples.append(seconds)
            past.mean = statistics.median(past.samples)
            past.deviation = statistics.median(abs(s - past.mean) for s in past.samples)
        elif not outlier:
            past.deviation = self.decay * past.deviation + (1 - self.decay) * abs(seconds - past.mean)
            past.mean = self.decay * past.mean + (1 - self.decay) * seconds


class _StepTimer:
    """Times one optimizer step of this rank. Compute is timed on the device (events of its stream), the rest on the
    host with the device synchronised."""

    def __init__(self, model: torch.nn.Module, device: torch.device, *, sharded: bool, compiled: bool):
        self._cuda, self._device = device.type == "cuda", device
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._waited = 0.0
        self._segments: list[list] = []  # of compute: [begin, end], one a micro-batch
        self._waits: list[tuple] = []  # inside of compute: (begin, end)
        self._phase: str | None = None
        self._handles: list = []
        self._originals: dict[str, Callable] = {}
        self._sharded = sharded
        if not sharded:
            self._hook(model, compiled)
        if not compiled:  # a compiled graph that holds a collective would be compiled again
            self._wrap_collectives()
        self.begin_data()

    def begin_data(self) -> None:
        self._enter("data")

    def end_data(self) -> None:
        self._leave("data")
        self.begin_compute()

    def begin_compute(self) -> None:
        if not self._sharded:
            self._phase = "compute"
            self._segments.append([self._mark(), None])

    def begin_optimizer(self) -> None:
        self._enter("optimizer")

    def end_optimizer(self) -> None:
        self._leave("optimizer")

    def finish(self) -> dict[str, float]:
        """Seconds by phase; takes away every hook."""
        self.close()
        self._synchronize()
        for begin, end in self._segments:
            if end is None:  # a micro-batch without a gradient
                continue
            inside = [w for w in self._waits if _elapsed(begin, w[0]) >= 0 and _elapsed(w[1], end) >= 0]
            self._seconds["compute"] += _elapsed(begin, end) - sum(_elapsed(*wait) for wait in inside)
        return self._seconds

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        for name, function in self._originals.items():
            setattr(dist, name, function)
        self._handles, self._originals = [], {}

    def _hook(self, model: torch.nn.Module, compiled: bool) -> None:
        def begin(module, _):
            if module.training and self._segments:
                self._segments[-1][0] = self._mark()

        def gradient(_):
            if self._segments:
                self._segments[-1][1] = self._mark()

        if not compiled:
            self._handles.append(model.register_forward_pre_hook(begin))
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(gradient))

    def _wrap_collectives(self) -> None:
        for name in COLLECTIVES:
            function = getattr(dist, name, None)
            if function is not None:
                self._originals[name] = function
                setattr(dist, name, self._timed(function))

    def _timed(self, function: Callable) -> Callable:
        @wraps(function)
        def timed(*args, **kwargs):
            if self._phase == "compute":
                begin = self._mark()
                result = function(*args, **kwargs)
                self._waits.append((begin, self._mark()))
                return result
            self._synchronize()
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self._synchronize()
            self._waited += time.perf_counter() - begin
            return result

        return timed

    def _enter(self, phase: str) -> None:
        self._synchronize()
        self._phase, self._waited, self._begin = phase, 0.0, time.perf_counter()

    def _leave(self, phase: str) -> None:
        self._synchronize()
        self._seconds[phase] += time.perf_counter() - self._begin - self._waited
        self._phase = None

    def _mark(self):
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _elapsed(begin, end) -> float:
    return end - begin if isinstance(begin, float) else begin.elapsed_time(end) / 1000


__all__ = ["StragglerCallback", "StragglerJudge", "Verdict"]
