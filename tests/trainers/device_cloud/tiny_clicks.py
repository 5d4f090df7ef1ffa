"""Users, items and a model for tests of fine-tuning on devices: nothing of it is for numbers."""

import copy
from types import SimpleNamespace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from trainers.device_cloud.on_device_training import flat_logits, per_sample_loss


class TinyConfig(PreTrainedConfig):
    """A user table, an item table, a hidden layer."""

    model_type = "tiny_user_clicks"
    users: int = 8
    items: int = 12
    classes: int = 1


class TinyBody(PreTrainedModel):
    """Embeddings and a hidden layer."""

    config_class = TinyConfig

    def __init__(self, config):
        super().__init__(config)
        self.user = nn.Embedding(config.users, 3)
        self.item = nn.Embedding(config.items, 3, padding_idx=0)
        self.hidden = nn.Linear(6, 5)
        self.post_init()

    def forward(self, user, item):
        seen = self.item(item)
        count = (item != 0).sum(-1, keepdim=True).clamp_min(1)
        return torch.tanh(self.hidden(torch.cat([self.user(user), seen.sum(-2) / count], dim=-1)))


class TinyUserClicks(PreTrainedModel):
    """A user and a bag of items to logits, with dropout that must not act."""

    config_class = TinyConfig
    base_model_prefix = "body"

    def __init__(self, config):
        super().__init__(config)
        self.body = TinyBody(config)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(5, config.classes)
        self.post_init()

    def forward(self, user, item, labels=None):
        return SequenceClassifierOutput(logits=self.output(self.dropout(self.body(user, item))))


def tiny_model(*, classes=1, dtype=torch.float64):
    torch.manual_seed(0)
    model = TinyUserClicks(TinyConfig(classes=classes)).to(dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.6)
    return model


def tiny_rows(counts, *, seed=0, classes=1, items=12):
    """`counts[u]` rows of user u, mixed."""
    generator = torch.Generator().manual_seed(seed)
    users = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    users = users[torch.randperm(len(users), generator=generator)]
    item = torch.randint(0, items, (len(users), 3), generator=generator)
    labels = torch.randint(0, max(2, classes), (len(users),), generator=generator)
    labels = labels if classes > 1 else labels.double()
    return SimpleNamespace(tensors={"user": users, "item": item, "labels": labels}, users=users)


def one_by_one(model, names, rows, user, *, rate, steps, targets=None, optimizer=torch.optim.SGD):
    """The same fine-tuning with a model and an optimizer of the user's own; the parameters `names` afterwards."""
    own = copy.deepcopy(model).eval()
    index = (rows.users == user).nonzero()[:, 0]
    inputs = {name: value[index] for name, value in rows.tensors.items() if name != "labels"}
    labels, weights, offsets = rows.tensors["labels"][index], 1.0, 0.0
    if targets is not None:
        labels, weights, offsets = (values[index] for values in targets)
    trained = {name: parameter for name, parameter in own.named_parameters() if name in names}
    optimizer = optimizer(trained.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = flat_logits(own(**inputs).logits)
        loss = (per_sample_loss(logits + offsets, labels) * weights).mean()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in trained.items()}
