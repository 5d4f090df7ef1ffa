"""Handwritten digits over some clients: multinomial regression by FedLaAvg, whose clients remember.

The 1,797 digits of scikit-learn are there wherever it is. Their file has one writer after the other, without names: a
client has a contiguous part, so that clients differ as writers do. Every fifth digit is held out, on the server.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from flwr.app import Context
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from transformers import TrainingArguments

from trainers.federated import FederatedTrainer, FedLaAvg
from trainers.federated.engines.flower import flower_client_app, flower_server_app


HELD_OUT = 5  # every fifth digit


class DigitRegression(nn.Module):
    """64 pixels to 10 logits."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(64, 10)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, pixels: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """`pixels` (batch, 64) in 0..1, `labels` (batch,): `loss` if there are labels, and `logits` (batch, 10)."""
        logits = self.output(pixels)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def client_name(partition: int) -> str:
    """Of the client with this part of the file."""
    return f"writer-{partition:04d}"


def examples(clients: int, only: int | None = None) -> Dataset:
    """All training examples, or those of one client, with the `client` of each."""
    digits = load_digits()
    kept = [row for row in range(len(digits.target)) if row % HELD_OUT]
    owner = {row: index * clients // len(kept) for index, row in enumerate(kept)}
    return _dataset(digits, [row for row in kept if only in (None, owner[row])], owner)


def held_out() -> Dataset:
    """What nobody trains on."""
    digits = load_digits()
    rows = list(range(0, len(digits.target), HELD_OUT))
    return _dataset(digits, rows, dict.fromkeys(rows, 0))


def _dataset(digits: Any, rows: list[int], owner: dict[int, int]) -> Dataset:
    return Dataset.from_dict(
        {
            "pixels": (digits.data[rows] / 16.0).tolist(),
            "labels": digits.target[rows].tolist(),
            "client": [client_name(owner[row]) for row in rows],
        }
    )


def federation(config: dict[str, Any], **whose: Any) -> FederatedTrainer:
    """The trainer that the run configuration tells; `whose`: dataset and clients."""
    args = TrainingArguments(
        str(config["output"]),
        optim="sgd",
        learning_rate=float(config["learning-rate"]),
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
        max_grad_norm=0.0,
        seed=int(config["seed"]),
        save_strategy="steps",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    strategy = FedLaAvg(
        learning_rate=float(config["learning-rate"]),
        clients_per_round=int(config["clients-per-round"]),
        divisor="seen",
        seed=int(config["seed"]),
    )
    return FederatedTrainer(
        DigitRegression(),
        args,
        strategy=strategy,
        rounds=int(config["rounds"]),
        local_steps=int(config["local-steps"]),
        **whose,
    )


def of_a_node(context: Context) -> FederatedTrainer:
    """On a node, with its own examples."""
    own = examples(int(context.run_config["num-clients"]), only=int(context.node_config["partition-id"]))
    return federation(context.run_config, train_dataset=own, partition_by="client")


def finish(trainer: FederatedTrainer, context: Context) -> None:
    """Save what is served, and how it does on what was held out."""
    output = Path(str(context.run_config["output"]))
    trainer.model.eval()
    test = held_out().with_format("torch")[:]
    with torch.no_grad():
        guesses = trainer.model(test["pixels"])["logits"].argmax(-1)
    save_file(trainer.strategy.parameters, output / "model.safetensors")
    results = {
        "accuracy": float((guesses == test["labels"]).double().mean()),
        "clients": trainer.clients.names,
        "rounds": trainer.state.global_step,
        "history": trainer.history,
    }
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


server_app = flower_server_app(lambda context, **whose: federation(context.run_config, **whose), done=finish)
client_app = flower_client_app(of_a_node)
