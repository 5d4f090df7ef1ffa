"""The two baselines that anonymous personalisation stands between: a static embedding, which is an identifier, and
fine-tuning on the device, which shares nothing."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_models.personal_lm import PrivateNoise

from .user_embeddings import Collator, Rows, sample_losses, without


class StaticUserModel(nn.Module):
    """
    A personal model with a table of embeddings, one for each user, trained together on the cloud.

    The upper reference of anonymous personalisation, and what prompt tuning for each user would be: whoever sees the
    number, or the embedding, knows the user. Rows bring their user in `user (batch,)`; `-1` reads an embedding of
    zeros.
    """

    def __init__(self, model: PreTrainedModel, num_users: int):
        super().__init__()
        self.model = model
        self.accepts_loss_kwargs = getattr(model, "accepts_loss_kwargs", True)
        width = (model.config.num_user_tokens, model.config.hidden_size)
        self.table = nn.Parameter(torch.zeros(num_users, *width))

    def forward(self, user: torch.Tensor, **batch: Any) -> Any:
        """As the personal model, for users by number."""
        known = user >= 0
        embeds = self.table[user.clamp_min(0)] * known[:, None, None]
        return self.model(**batch, user_embeds=embeds)


class NumberedUserCollator:
    """Batches for [`StaticUserModel`]: the user's number goes along, which is what the others must not do."""

    def __init__(self, collator: Collator, user_column: str = "user"):
        self.collator, self.user_column = collator, user_column

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch with `user (batch,)`."""
        batch = dict(self.collator([without(row, self.user_column) for row in features]))
        batch["user"] = torch.tensor([int(row[self.user_column]) for row in features])
        return batch


def fine_tune_alone(
    model: PreTrainedModel,
    rows: Rows,
    collator: Collator,
    *,
    learning_rate: float,
    steps: int,
    batch_size: int = 8,
    max_grad_norm: float = 5.0,
    noise: PrivateNoise,
) -> PreTrainedModel:
    """A copy of the cloud's model after `steps` of AdamW on one user's rows; no user token. The authors' on-device
    baseline."""
    device = copy.deepcopy(model).train()
    optimizer = torch.optim.AdamW(device.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(steps):
        chosen = (noise.uniform((batch_size,)) * len(rows)).long().tolist()
        loss = sample_losses(device, collator([dict(rows[index]) for index in chosen])).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(device.parameters(), max_grad_norm)
        optimizer.step()
    return device.eval()


__all__ = ["NumberedUserCollator", "StaticUserModel", "fine_tune_alone"]
