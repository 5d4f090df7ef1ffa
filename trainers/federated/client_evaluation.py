"""How well a model serves each client, and not only all of them together."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import EvalPrediction, Trainer
from transformers.trainer_pt_utils import nested_concat, nested_detach, nested_numpify

from ..reliability.agreement import together
from .partition import ClientRows


ClientMetrics = dict[str, dict[str, float]]


@torch.no_grad()
def evaluate_clients(trainer: Trainer, rows: ClientRows, *, ignore_keys: Sequence[str] | None = None) -> ClientMetrics:
    """`{client: {"loss": ..., "num_examples": ..., and what compute_metrics gives}}`, over all processes, where there
    are rows."""
    names = [client for client in rows.names if rows.count(client)]
    mine = names[trainer.accelerator.process_index :: trainer.accelerator.num_processes]
    trainer.model.eval()
    trainer.callback_handler.eval_dataloader = mine  # whose length a progress bar wants to know

    def measure() -> ClientMetrics:
        found = {}
        for client in mine:
            found[client] = _metrics_of(trainer, rows, client, ignore_keys)
            trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
        return found

    everybody = {client: metrics for part in together(measure) for client, metrics in part.items()}
    return {client: everybody[client] for client in names}


def _metrics_of(
    trainer: Trainer, rows: ClientRows, client: str, ignore_keys: Sequence[str] | None
) -> dict[str, float]:
    data, total, kept = rows.data(client), 0.0, None
    for indices in torch.arange(len(data)).split(trainer.args.eval_batch_size):
        inputs = trainer._prepare_inputs(data.batch(indices))
        labels = nested_detach(tuple(inputs.get(name) for name in trainer.label_names))
        with trainer.compute_loss_context_manager():
            loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
        total += float(loss) * len(indices)
        if trainer.compute_metrics is not None:
            found = (_logits(trainer, outputs, ignore_keys), labels[0] if len(labels) == 1 else labels)
            if trainer.preprocess_logits_for_metrics is not None:
                found = (trainer.preprocess_logits_for_metrics(*found), found[1])
            kept = found if kept is None else nested_concat(kept, found, padding_index=-100)
    metrics = {"loss": total / len(data), "num_examples": len(data)}
    if kept is not None:
        predictions, label_ids = nested_numpify(kept)
        metrics |= trainer.compute_metrics(EvalPrediction(predictions=predictions, label_ids=label_ids))
    return metrics


def _logits(trainer: Trainer, outputs: Any, ignore_keys: Sequence[str] | None) -> Any:
    if not isinstance(outputs, Mapping):
        logits = outputs[1:]
    else:
        config = getattr(trainer.model, "config", None)
        ignored = ignore_keys or getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])
        logits = tuple(value for name, value in outputs.items() if name not in (*ignored, "loss"))
    logits = nested_detach(logits)
    return logits[0] if len(logits) == 1 else logits


def summary(clients: ClientMetrics, prefix: str) -> dict[str, float]:
    """Of each number: the mean over examples, over clients, the smallest and the largest; of the loss, the mean over
    the tenth of the clients that are served worst. What is not finite or missing at a client does not count there."""
    counts = {client: metrics["num_examples"] for client, metrics in clients.items()}
    names = {name for metrics in clients.values() for name in metrics} - {"num_examples"}
    found: dict[str, float] = {f"{prefix}_clients": len(clients), f"{prefix}_samples": sum(counts.values())}
    for name in sorted(names):
        of = {client: m[name] for client, m in clients.items() if _is_number(m.get(name))}
        if not of:
            continue
        weight = sum(counts[client] for client in of)
        found[f"{prefix}_{name}"] = sum(value * counts[client] for client, value in of.items()) / weight
        found[f"{prefix}_{name}_client_mean"] = statistics.fmean(of.values())
        found[f"{prefix}_{name}_client_min"], found[f"{prefix}_{name}_client_max"] = min(of.values()), max(of.values())
        if name == "loss":
            worst = sorted(of.values(), reverse=True)[: math.ceil(len(of) / 10)]
            found[f"{prefix}_loss_worst_decile"] = statistics.fmean(worst)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
