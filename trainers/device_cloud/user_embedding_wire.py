"""What a device of anonymous personalisation sends: the text, one draw, perhaps a label, and no name."""

from collections.abc import Sequence
from typing import Any

import torch

from ..federated.core.wire import WireMeter


def send_requests(
    meter: WireMeter,
    batch: dict[str, Any],
    *,
    users: Sequence[int | str | None] | None = None,
    round: int = 0,
    what: str = "request",
) -> list[bytes]:
    """
    The payloads of a batch of `AnonymousUserCollator`, one a text, without its padding.

    A batch of the static baseline has a number for its user, and that is sent too.

    Args:
        users: whose bytes the meter counts; it keeps that to itself, and no payload holds it.
        what: purpose, as the meter groups it: "training" with labels, "request" at inference.
    """
    payloads = []
    for index in range(len(batch["input_ids"])):
        real = batch["attention_mask"][index].bool()
        tensors: dict[str, torch.Tensor] = {"input_ids": batch["input_ids"][index][real].int()}
        if "user_embeds" in batch:
            tensors["user_embeds"] = batch["user_embeds"][index]
        if "user" in batch:  # of a static embedding, which is looked up by the cloud
            tensors["user"] = batch["user"][index].int()
        if "labels" in batch:
            label = batch["labels"][index]
            tensors["labels"] = (label[real] if label.ndim else label).int()
        user = None if users is None else users[index]
        payloads.append(meter.send(tensors, direction="up", round=round, user=user, what=what))
    return payloads


__all__ = ["send_requests"]
