"""Follow the load of the experts, sound the alarm where a low balance loss hides imbalance, and apply the loss-free
bias."""

import json
from pathlib import Path

from transformers import TrainerCallback

from ..reliability.events import EventLog
from ..report import write_text_atomically
from .installation import add_to_log, routed_model


RECORDED = (
    "max_deviation",
    "min_deviation",
    "max_violation",
    "starved_experts",
    "entropy",
    "logit_std",
    "load_balancing_loss",
)


class ExpertBalanceCallback(TrainerCallback):
    """Measure the routing of whole optimizer steps, over all ranks and micro-batches.

    Every `every` steps (default: `logging_steps`) one JSON line per layer goes to `path` (default
    `<output_dir>/logs/balance.jsonl`), and a few numbers to the log:
    `moe/max_violation` (largest over layers), `moe/starved_experts` (sum), `moe/load_balancing_loss` (mean over
    layers, 1 at balance), `moe/router_entropy`. A record has `step`, `layer`, `top_k` (experts per token; their mean,
    if they varied), `bias_spread` and the fields of [`~hf_models.moe.balance.RoutingWindow.summary`]; with
    `record_vectors=True` also `f` and `p`.

    It owns the model's routing window: it is reset at each optimizer step, which is what makes the global-batch loss
    use running counts across gradient accumulation, and what the loss-free bias is updated from (after the optimizer
    step).

    The *shortcut alarm* (our proposal, not the paper's): a balance loss below `alarm_loss` while MaxVio is
    above `alarm_violation` means that the loss is minimised by a flat router, not by balanced experts.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every: int | None = None,
        record_vectors: bool = False,
        alarm_loss: float = 1.02,
        alarm_violation: float = 1.0,
        alarm_bias_spread: float = 0.5,
    ):
        self.path, self.every, self.record_vectors = path, every, record_vectors
        self.alarm_loss, self.alarm_violation, self.alarm_bias_spread = alarm_loss, alarm_violation, alarm_bias_spread
        self._latest: dict[str, float] = {}
        self._warned: set[tuple[str, int]] = set()

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not hasattr(routed_model(model), "routing_window"):
            raise TypeError(
                f"{type(routed_model(model)).__name__} does not record its routing; use a SigmaMoeForCausalLM."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"n_gpu={args.n_gpu}: one process drives several devices (DataParallel), whose threads would count "
                "into one window. Start one process per device: accelerate launch."
            )
        routed_model(model).routing_window.managed = True
        self._file = Path(self.path) if self.path is not None else Path(args.output_dir) / "logs" / "balance.jsonl"
        self._events = EventLog(args.output_dir) if state.is_world_process_zero else None
        if state.is_world_process_zero:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # A killed run has written steps that the checkpoint it resumes from does not have.
            kept = [line for line in _lines(self._file) if json.loads(line)["step"] <= state.global_step]
            write_text_atomically(self._file, "".join(kept))

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        routed_model(model).routing_window.reset()

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if routed_model(model).config.expert_bias_update_rate:
            routed_model(model).update_expert_bias()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        every = self.every or state.logging_steps
        if not every or state.global_step % every:
            return
        routed = routed_model(model)
        summary = routed.routing_window.summary()
        if summary is None:
            return
        self._latest = {
            "moe/max_violation": summary["max_violation"].max().item(),
            "moe/starved_experts": summary["starved_experts"].sum().item(),
            "moe/load_balancing_loss": summary["load_balancing_loss"].mean().item(),
            "moe/router_entropy": summary["entropy"].mean().item(),
        }
        records = []
        for layer, router in enumerate(routed.routers):
            bias = getattr(router, "e_score_correction_bias", None)  # a host of MoNE may have none
            # What was routed, not what the router holds: M-MoE changes k from micro-batch to micro-batch.
            top_k = (summary["counts"][layer].sum() / summary["tokens"][layer].clamp_min(1.0)).item()
            record = {"step": state.global_step, "layer": layer, "top_k": int(top_k) if top_k % 1 == 0 else top_k}
            record |= {field: round(summary[field][layer].item(), 6) for field in RECORDED}
            record["bias_spread"] = 0.0 if bias is None else round((bias.max() - bias.min()).item(), 6)
            if self.record_vectors:
                record |= {field: summary[field][layer].tolist() for field in ("f", "p")}
            records.append(record)
            self._sound_alarms(record)
        if state.is_world_process_zero:
            with self._file.open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in records)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and self._latest:
            add_to_log(state, logs, self._latest)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        routed_model(model).routing_window.managed = False

    def _sound_alarms(self, record: dict) -> None:
        loss, violation = record["load_balancing_loss"], record["max_violation"]
        if loss < self.alarm_loss and violation > self.alarm_violation:
            self._warn_once(
                "shortcut",
                record,
                f"load-balancing loss {loss:.3f} looks balanced, but the busiest expert has {violation + 1:.1f} "
                "times the mean "
                "load: the router is flat, not balanced. Consider progressive sparsification or the top1 loss.",
            )
        if record["bias_spread"] > self.alarm_bias_spread:
            self._warn_once(
                "bias",
                record,
                f"the loss-free bias spreads over {record['bias_spread']:.2f} and begins to outweigh the scores. Set "
                "expert_bias_cap, or lower expert_bias_update_rate.",
            )

    def _warn_once(self, alarm: str, record: dict, message: str) -> None:
        if (alarm, record["layer"]) not in self._warned:
            self._warned.add((alarm, record["layer"]))
            if self._events is not None:
                self._events.record(
                    "expert_balance",
                    "warning",
                    step=record["step"],
                    message=f"layer {record['layer']}: {message}",
                    evidence={"alarm": alarm, **{field: record[field] for field in ("layer", "top_k", *RECORDED)}},
                )


def _lines(path: Path) -> list[str]:
    """Complete lines of a file that a killed process may have left with half a last line."""
    if not path.exists():
        return []
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
