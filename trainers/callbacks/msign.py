"""MSign (arXiv 2602.01734) beside any optimizer: weights are restored right after its step."""

import math
from collections.abc import Mapping

import torch.distributed as dist
from transformers import TrainerCallback

from ..optimizers.msign import MSign, is_due, require_schedule
from ..optimizers.ranks import MatrixReport, restore_weights
from ..optimizers.restoration import RestorationOptions
from ..optimizers.targets import Selection, Split, select_targets
from ..reliability.events import EventLog
from .installation import add_to_log


class MSignCallback(TrainerCallback):
    """Restore the targets after every `period`-th optimizer step, whatever the optimizer is, Muon included.

    A function of the trainer's step alone, so that a resumed run does the same as an uninterrupted one. A step that
    mixed precision skipped is counted, as the trainer counts it, but nothing is restored after it.

    Reports: `last_report`, by matrix; one event of component `"msign"` per application in the run's `events.jsonl`;
    in the logs the geometric means `msign/srank_before` and `msign/srank_after` of the last application.

    Args:
        period, rescale, backend, rtol, start_step, stop_step, trigger, srank_threshold, process_group: as those of
            [`trainers.optimizers.MSign`].
        targets, split: of [`trainers.optimizers.select_targets`].
        events: where events go; `None`: the run's output folder, written by the first process.

    Raises, when training begins:
        ValueError: no targets, flattened shards, or DeepSpeed, which keeps weights of its own; after the first step,
            a trainer that tells callbacks of no optimizer's steps, as `FederatedTrainer`.
    """

    def __init__(
        self,
        period: int = 100,
        *,
        targets: Selection = "attention",
        split: Mapping[str, Split] | None = None,
        rescale: str = "frobenius",
        backend: str = "auto",
        rtol: float | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        trigger: str | None = None,
        srank_threshold: float = 0.1,
        process_group: "dist.ProcessGroup | str | None" = "world",
        events: EventLog | None = None,
    ):
        require_schedule(period, start_step, stop_step, trigger)
        RestorationOptions(below=srank_threshold)
        below = srank_threshold if trigger else None
        self.options = RestorationOptions(rescale=rescale, backend=backend, rtol=rtol, below=below)
        self.period, self.start_step, self.stop_step = period, start_step, stop_step
        self.targets, self.split, self.process_group, self.events = targets, split, process_group, events
        self.last_report: dict[str, MatrixReport] = {}
        self._selected = []
        self._unlogged = False
        self._heard = False

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if getattr(args, "deepspeed", None):
            raise ValueError(
                "MSignCallback does not work with DeepSpeed, which overwrites the model's weights with master copies "
                "of its own at every step. Use FSDP2 or DDP."
            )
        if isinstance(getattr(optimizer, "optimizer", optimizer), MSign):
            raise ValueError("The optimizer is MSign already: every application would be done twice. Use one of them.")
        # Here, and not earlier: sharding replaces parameters.
        self._selected = select_targets(model, self.targets, split=self.split)
        self.events = self.events or EventLog(args.output_dir, rank=args.process_index)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self._heard = True
        step = state.global_step + 1  # the trainer counts it later
        if getattr(optimizer, "step_was_skipped", False):
            return
        if not is_due(step, self.period, self.start_step, self.stop_step):
            return
        jobs = [(target, target.parameter) for target in self._selected]
        self.last_report, self._unlogged = restore_weights(jobs, self.options, self.process_group), True
        if state.is_world_process_zero:
            evidence = {name: report._asdict() for name, report in self.last_report.items()}
            restored = any(report.restored for report in self.last_report.values())
            action = "restore" if restored else "none"
            self.events.record("msign", step=step, action=action, evidence={"matrices": evidence})

    def on_step_end(self, args, state, control, **kwargs):
        if not self._heard:
            raise ValueError(
                "MSignCallback was told of no optimizer's step: clients of a FederatedTrainer take their own. Leave "
                "it out."
            )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}) or not self._unlogged:
            return
        reports, self._unlogged = self.last_report.values(), False
        extra = {
            f"msign/srank_{when}": _geometric_mean(getattr(r, when) for r in reports) for when in ("before", "after")
        }
        add_to_log(state, logs, extra | {"msign/restored": sum(r.restored for r in reports)})


def _geometric_mean(values) -> float:
    logarithms = [math.log(value) if value > 0 else -math.inf if value == 0 else math.nan for value in values]
    return math.exp(sum(logarithms) / len(logarithms))


__all__ = ["MSignCallback"]
