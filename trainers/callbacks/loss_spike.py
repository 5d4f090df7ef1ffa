r"""Loss spikes, step by step: Megatron's rule and a robust z, whether the run recovers, and going back if not.

Megatron:  x_t > 10 max(x_1 .. x_100)                                          (SIGMA stack, arXiv 2512.13488)
robust z:  (x_t - median) / (1.4826 MAD) > 8   over the 200 steps before       (our proposal)
irrecoverable: the median of the n steps after a spike > the median before it + delta       (our proposal)
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from ..reliability.events import EventLog
from ..reliability.rerun import loss_of
from ..reliability.rollback import RollbackRequested


COMPONENT = "loss_spike"
Policy = Literal["report", "rollback"]
MAD_OF_A_GAUSSIAN = 1.4826
# Below, a median and its deviation say nothing.
MIN_HISTORY = 20


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the detector says of a step: `kind` is `"spike"` when one begins, later `"recovered"` or `"irrecoverable"`,
    with `spike_step` the step of its beginning and `before` the median of the loss before it."""

    kind: Literal["spike", "recovered", "irrecoverable"]
    step: int
    spike_step: int
    loss: float
    before: float | None
    after: float | None = None
    rules: tuple[str, ...] = ()
    z: float | None = None


class SpikeDetector:
    """The rules as a function of a series of losses; knows nothing of training.

    Args: as of [`LossSpikeCallback`].
    """

    def __init__(
        self,
        *,
        calibration: int = 100,
        factor: float = 10.0,
        window: int = 200,
        threshold: float = 8.0,
        follow: int = 50,
        delta: float = 0.1,
        floor: float = 1e-3,
    ):
        for name, value, least in (
            ("calibration", calibration, 1),
            ("window", window, MIN_HISTORY),
            ("follow", follow, 1),
        ):
            if value < least:
                raise ValueError(f"{name}={value} is too small: give {least} or more steps.")
        for name, value in (("factor", factor), ("threshold", threshold), ("delta", delta), ("floor", floor)):
            if not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")
        self.calibration, self.factor, self.window, self.threshold = calibration, factor, window, threshold
        self.follow, self.delta, self.floor = follow, delta, floor
        self.first: list[tuple[int, float]] = []
        self.recent: deque[tuple[int, float]] = deque(maxlen=window)
        self._spike: Verdict | None = None
        self._after: list[tuple[int, float]] = []
        self._armed = True  # Megatron's rule, until a lost run has come down again

    def forget_after(self, step: int) -> None:
        """The run went back to `step`: later losses, and a spike that began later, never were."""
        self.first = [pair for pair in self.first if pair[0] <= step]
        self.recent = deque((pair for pair in self.recent if pair[0] <= step), maxlen=self.window)
        self._after = [pair for pair in self._after if pair[0] <= step]
        if self._spike is not None and self._spike.spike_step > step:
            self._spike, self._after = None, []
        self._armed = True

    def update(self, step: int, loss: float) -> Verdict | None:
        """Take the loss of `step`; a verdict, if there is one. Steps increase."""
        if self._spike is not None:
            return self._followed(step, loss)
        rules, z = self._broken_rules(loss)
        if rules:
            median = statistics.median([value for _, value in self.recent]) if self.recent else None
            self._spike = Verdict(kind="spike", step=step, spike_step=step, loss=loss, before=median, rules=rules, z=z)
            return self._spike
        if len(self.first) < self.calibration:
            self.first.append((step, loss))
        self.recent.append((step, loss))
        return None

    def _broken_rules(self, loss: float) -> tuple[tuple[str, ...], float | None]:
        if not math.isfinite(loss):
            return ("not_finite",), None
        rules, z = [], None
        if len(self.first) >= self.calibration and loss > self.factor * max(value for _, value in self.first):
            rules += ["megatron"] * self._armed
        else:
            self._armed = True
        if len(self.recent) >= MIN_HISTORY:
            z = self.robust_z(loss)
            if z > self.threshold:
                rules.append("robust_z")
        return tuple(rules), z

    def robust_z(self, loss: float) -> float:
        """(loss - median) / (1.4826 MAD) of the window. The divisor is at least `floor` times the median, or a loss
        that has become constant would have infinite z."""
        values = [value for _, value in self.recent]
        median = statistics.median(values)
        deviation = MAD_OF_A_GAUSSIAN * statistics.median([abs(value - median) for value in values])
        return (loss - median) / max(deviation, self.floor * abs(median), 1e-12)

    def _followed(self, step: int, loss: float) -> Verdict | None:
        self._after.append((step, loss))
        if len(self._after) < self.follow:
            return None
        spike, after = self._spike, [value if math.isfinite(value) else math.inf for _, value in self._after]
        median = statistics.median(after)
        # Where nothing was known before (NaN in the first steps) only the loss being finite again can be asked for.
        lost = median == math.inf if spike.before is None else median > spike.before + self.delta
        if lost:
            self.recent.clear()  # a new level: do not ring again and again on it
            self._armed = False
        self.recent.extend(pair for pair in self._after if math.isfinite(pair[1]))
        self._spike, self._after = None, []
        return Verdict(
            kind="irrecoverable" if lost else "recovered",
            step=step,
            spike_step=spike.spike_step,
            loss=loss,
            before=spike.before,
            after=median,
            rules=spike.rules,
            z=spike.z,
        )


class LossSpikeCallback(TrainerCallback):
    """Watch the loss of every optimizer step, averaged over micro-batches and ranks as the training loss is.

    The loss comes from a forward hook, since logs are means over many steps and hide NaN. One all-reduce of one number
    and one read of the device per step; all ranks see the same number and so take the same decision in the same step.

    Events: a warning when a spike begins, `info` when the run has recovered, an error when it has not. NaN and
    infinities count as a spike. While the `follow` steps after a spike are collected there is no second one. A process
    that is started again calibrates anew.

    Args:
        policy: `"report"` writes events; `"rollback"` also raises [`RollbackRequested`] on all ranks when a spike is
            irrecoverable, for [`~trainers.reliability.rollback.train_with_rollback`]: back to a checkpoint from before
            the spike, past the data seen since.
        calibration: first steps, whose largest loss is Megatron's measure (100 there, of micro-batches).
        factor: times that (10).
        window: steps behind the robust z (200).
        threshold: of the robust z (8).
        follow: n, steps after a spike that decide whether it passed.
        delta: what their median may lie above the median before, in units of the loss.
        floor: least divisor of the robust z, as a share of the median.
        margin: a checkpoint to go back to is at least so many steps older than the spike.

    Raises:
        ValueError: options out of range; when training begins, several devices in one process.
        RuntimeError: a model that returns no loss.
    """

    def __init__(self, policy: Policy = "report", *, margin: int = 0, **detector: Any):
        if policy not in get_args(Policy):
            raise ValueError(f"policy={policy!r} is not known. Choose one of {get_args(Policy)}.")
        if margin < 0:
            raise ValueError(
                f"margin={margin} is negative: it is how many steps before the spike to go back at least."
            )
        self.policy, self.margin = policy, margin
        self.detector = SpikeDetector(**detector)
        self._hook = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu}: one process drives several devices (DataParallel), whose replicas return losses "
                "of their own. Start one process per device: accelerate launch."
            )
        self._log = EventLog(args.output_dir, rank=args.process_index)
        self.detector.forget_after(state.global_step)
        if self._hook is not None:  # of a run that ended in an exception
            self._hook.remove()
        self._hook = model.register_forward_hook(self._after, with_kwargs=True)
        self._sum, self._forwards, self._normalised, self._silent = None, 0, False, False

    def on_step_begin(self, args, state, control, **kwargs):
        self._sum, self._forwards = None, 0

    def on_step_end(self, args, state, control, **kwargs):
        if self._sum is None:
            if not self._silent:
                self._silent = True
                self._log.record(
                    COMPONENT,
                    "warning",
                    step=state.global_step,
                    message="the model returns no loss (compute_loss_func, label smoothing): spikes are not watched.",
                )
            return
        verdict = self.detector.update(state.global_step, self._global_loss(args))
        if verdict is None:
            return
        rolls_back = verdict.kind == "irrecoverable" and self.policy == "rollback"
        message = _sentence(verdict)
        if state.is_world_process_zero:
            self._log.record(
                COMPONENT,
                {"spike": "warning", "recovered": "info", "irrecoverable": "error"}[verdict.kind],
                step=state.global_step,
                action="rollback" if rolls_back else "none",
                message=message,
                evidence={name: value for name, value in vars(verdict).items() if name != "step"},
            )
        if rolls_back:
            newest = max(verdict.spike_step - 1 - self.margin, 0)
            raise RollbackRequested(state.global_step, message, newest=newest)

    def on_train_end(self, args, state, control, **kwargs):
        self._hook.remove()

    @torch.compiler.disable
    def _after(self, module, args, kwargs, output) -> None:
        loss = loss_of(output) if module.training else None
        if loss is None:
            return
        loss = loss.detach().float()
        self._sum = loss.clone() if self._sum is None else self._sum + loss  # Trainer multiplies the loss in place
        self._forwards += 1
        self._normalised = kwargs.get("num_items_in_batch") is not None

    def _global_loss(self, args) -> float:
        """As Trainer forms it: sums over the number of targets of the step where the model was given it, else means of
        means."""
        total = self._sum if self._normalised else self._sum / self._forwards
        if dist.is_initialized() and dist.get_world_size() > 1:
            total = total.to(args.device)
            dist.all_reduce(total)
            # The number of targets is that of all ranks, so that their losses add up to the mean.
            if not (self._normalised and args.average_tokens_across_devices):
                total = total / dist.get_world_size()
        return total.item()


def _sentence(verdict: Verdict) -> str:
    before = "unknown" if verdict.before is None else f"{verdict.before:.4g}"
    if verdict.kind == "spike":
        z = "" if verdict.z is None else f", robust z {verdict.z:.1f}"
        return f"The loss jumps to {verdict.loss:.4g} (median before: {before}{z}; {', '.join(verdict.rules)})."
    change = f"median {verdict.after:.4g} after it, {before} before"
    if verdict.kind == "recovered":
        return f"The spike of step {verdict.spike_step} has passed: {change}."
    return f"The spike of step {verdict.spike_step} has not passed: {change}."


__all__ = ["LossSpikeCallback", "SpikeDetector", "Verdict"]
