"""Models, data and trainers small enough that a whole run takes a second."""

import torch
from datasets import Dataset
from torch import nn
from transformers import TrainingArguments
from transformers.trainer_callback import PrinterCallback

from trainers.federated import FederatedTrainer


class Quadratic(nn.Module):
    """Loss (x - target)^2, of mean over the batch: with one target a client, local steps are a closed form."""

    def __init__(self, start=0.0, dtype=torch.float64):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(start, dtype=dtype))

    def forward(self, target, labels=None):
        return {"loss": (self.x - target.to(self.x.dtype)).square().mean()}


class TinyRecommender(nn.Module):
    """Items to a click: an embedding with a row of padding, a hidden layer, dropout on demand."""

    main_input_name = "items"

    def __init__(self, rows=40, width=4, dropout=0.0):
        super().__init__()
        self.table = nn.Embedding(rows, width, padding_idx=0)
        self.hidden = nn.Linear(width, 8)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(8, 1)

    def get_input_embeddings(self):
        return self.table

    def forward(self, items, labels=None):
        hidden = torch.relu(self.hidden(self.table(items).sum(1)))
        logits = self.output(self.dropout(hidden))[:, 0]
        if labels is None:
            return {"logits": logits}
        loss = nn.functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return {"loss": loss, "logits": logits}


def quadratic_clients(targets):
    """One row a client."""
    return Dataset.from_dict({"user": list(targets), "target": [float(value) for value in targets.values()]})


def clicks(clients=9, *, rows=40, seed=0, examples=(3, 9)):
    """Each client has some items of its own, and one (row 1) that all have."""
    generator = torch.Generator().manual_seed(seed)
    columns = {"user": [], "items": [], "labels": []}
    for client in range(clients):
        count = int(torch.randint(*examples, (), generator=generator))
        own = torch.randint(2, rows, (4,), generator=generator)
        for _ in range(count):
            first = int(own[torch.randint(4, (), generator=generator)])
            columns["user"].append(f"u{client}")
            columns["items"].append([first, 1, 0])
            columns["labels"].append(float(first % 2))
    return Dataset.from_dict(columns)


def arguments(folder, **options):
    settings = {
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **(settings | options))


def federation(folder, model, dataset, strategy, *, rounds, args=None, **options):
    """A trainer that prints nothing."""
    options.setdefault("partition_by", "user")
    options.setdefault("local_steps", 2)
    trainer = FederatedTrainer(
        model, arguments(folder, **(args or {})), train_dataset=dataset, strategy=strategy, rounds=rounds, **options
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def recommender(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TinyRecommender(**options)


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]), name


same = assert_same  # the name that the tests of the Flower engine know
