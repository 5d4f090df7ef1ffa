"""What the Sigma-MoE recipe watches while it trains: the loss at the switch, and a figure of the balance as it
develops."""

import dataclasses
import json
import time
from pathlib import Path

from transformers import TrainerCallback

from ..callbacks import ProgressiveSparsificationCallback
from ..callbacks.installation import routed_model
from ..evaluation import held_out_loss
from ..figures import balance_figure
from ..report import write_text_atomically
from .language_model import LanguageData


class SwitchProbe(TrainerCallback):
    """At each change of stage, the held-out loss of the same weights before and after it, in `logs/switch.json`.

    Install it ahead of the schedule, which changes the model at the same event.
    """

    def __init__(self, schedule: ProgressiveSparsificationCallback, data: LanguageData):
        self.schedule, self.data = schedule, data

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        # From the steps alone, not from the model: a run that resumes right at the switch begins with the new stage.
        earlier = dataclasses.replace(state, global_step=max(0, state.global_step - 1))
        numbers = [self.schedule.stage_at(earlier), self.schedule.stage_at(state)]
        if numbers[0] == numbers[1]:
            return
        routed, losses, stages = routed_model(model), [], []
        in_force = routed.config.num_experts_per_tok_per_layer or routed.config.num_experts_per_tok
        for number in numbers:
            routed.set_experts_per_token(self.schedule.stages[number].top_k)
            stages.append(routed.config.top_k_per_layer)
            losses.append(
                held_out_loss(
                    routed, self.data.validation, self.data.tokenizer, batch_size=args.per_device_eval_batch_size
                ).nats_per_token
            )
        routed.set_experts_per_token(in_force)
        if state.is_world_process_zero:
            file = Path(args.output_dir) / "logs" / "switch.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            record = {"step": state.global_step, "before": losses[0], "after": losses[1], "top_k": stages}
            write_text_atomically(file, json.dumps(record))


class LiveBalanceFigure(TrainerCallback):
    """Redraw `figures/balance.png` from the balance log every `seconds`, so that a viewer left open follows the
    run."""

    def __init__(self, seconds: float = 30.0):
        self.seconds, self._drawn = seconds, time.monotonic()

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero and time.monotonic() - self._drawn >= self.seconds:
            history = read_balance(args.output_dir)
            if history:
                balance_figure(history, Path(args.output_dir) / "figures" / "balance.png")
            self._drawn = time.monotonic()


def read_balance(output_dir: str | Path) -> list[dict]:
    """Rows of `logs/balance.jsonl` of a run; empty if it has none."""
    file = Path(output_dir) / "logs" / "balance.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def read_switch(output_dir: str | Path) -> dict | None:
    """What [`SwitchProbe`] measured; `None` if the run had no switch (yet)."""
    file = Path(output_dir) / "logs" / "switch.json"
    return json.loads(file.read_text()) if file.exists() else None
