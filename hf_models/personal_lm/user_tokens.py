"""Where a user's tokens go among those of a text, whatever side it is padded on."""

from typing import NamedTuple

import torch


class Placed(NamedTuple):
    """A batch with the user's tokens in it.

    `embeds (batch, length + tokens, width)`, `mask (batch, length + tokens)`, `order (batch, length + tokens)`: which
    entry of [text, user tokens] stands at each place, and `places (batch, length + tokens)`: where each entry stands.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    order: torch.Tensor
    places: torch.Tensor

    def of_text(self, states: torch.Tensor, length: int) -> torch.Tensor:
        """`states (batch, length + tokens, width)` of the text alone, in the text's own order."""
        return states.gather(1, self.places[:, :length, None].expand(-1, -1, states.shape[2]))

    def extend(self, values: torch.Tensor, fill: int | torch.Tensor) -> torch.Tensor:
        """`values (batch, length)` of the text in the places of their tokens, `fill` at the user's."""
        batch, count = self.order.shape[0], self.order.shape[1] - values.shape[1]
        values = values.expand(batch, -1)
        own = torch.as_tensor(fill, dtype=values.dtype, device=values.device).expand(batch, count)
        return torch.cat([values, own], dim=1).gather(1, self.order)

    def labels(self, labels: torch.Tensor) -> torch.Tensor:
        """`labels (batch, length)` in the places of their tokens; -100 at the user's."""
        return self.extend(labels, -100)

    def positions(self, position_ids: torch.Tensor, *, position: str) -> torch.Tensor:
        """Positions `(batch, length)` of the text, and the user's before or behind them, in their places."""
        tokens = torch.arange(self.order.shape[1] - position_ids.shape[1], device=position_ids.device)
        if position == "prefix":
            return self.extend(position_ids + len(tokens), tokens)
        length = position_ids.shape[1]
        real = self.of_text(self.mask[..., None], length)[..., 0] > 0  # (batch, length)
        last = position_ids.masked_fill(~real, -1).amax(dim=1, keepdim=True)
        return self.extend(position_ids, last + 1 + tokens)

    def counted(self) -> torch.Tensor:
        """Positions `(batch, length + tokens)` that count what is no padding; padding has those of its places."""
        places = torch.arange(self.mask.shape[1], device=self.mask.device)
        return torch.where(self.mask > 0, self.mask.long().cumsum(dim=1) - 1, places)


def place_user_tokens(
    text_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    user_embeds: torch.Tensor | None,
    *,
    position: str,
    padding: str = "right",
) -> Placed:
    """
    Put the user's tokens right before or right behind the tokens of each text, and all padding on one side.

    With the padding on the right, token i stands at place i in every model, whichever way that counts its positions:
    texts that were padded on the left give what they give when padded on the right.

    Args:
        text_embeds: `(batch, length, width)`.
        attention_mask: `(batch, length)`, 0 where there is padding.
        user_embeds: `(batch, tokens, width)`; `None`: nothing is added.
        position: `"prefix"` or `"suffix"`.
        padding: `"right"`, or `"left"` for `generate`, which appends at the end; `"kept"`: where it is, the user's
            tokens before everything, as a cache must have it whose mask is the user's ones and the text's mask.
    """
    batch, length, width = text_embeds.shape
    tokens = 0 if user_embeds is None else user_embeds.shape[1]
    padding_key = {"left": -1, "kept": 1, "right": 3}[padding]
    key = torch.where(attention_mask > 0, 1, padding_key)  # (batch, length)
    if user_embeds is not None:
        text_embeds = torch.cat([text_embeds, user_embeds.to(text_embeds)], dim=1)
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(batch, tokens)], dim=1)
        user_key = 0 if position == "prefix" else 2
        key = torch.cat([key, key.new_full((batch, tokens), user_key)], dim=1)
    places = _stable_ranks(key)
    order = torch.zeros_like(places).scatter(1, places, torch.arange(key.shape[1], device=key.device).expand_as(key))
    embeds = text_embeds.gather(1, order[..., None].expand(-1, -1, width))
    return Placed(embeds, attention_mask.gather(1, order), order, places)


def _stable_ranks(key: torch.Tensor) -> torch.Tensor:
    """Where a stable sort of each row of `key (batch, length)` puts its entries, by counting: a graph with a sort in
    it is exported for one size only, or, to ONNX, not at all."""
    same = (key[..., None] == torch.arange(-1, 4, device=key.device)).long()  # (batch, length, keys)
    smaller = same.sum(dim=1, keepdim=True)
    smaller = smaller.cumsum(dim=-1) - smaller
    return (same * (same.cumsum(dim=1) - 1 + smaller)).sum(dim=-1)


def check_user_embeds(user_embeds: torch.Tensor, batch: int, tokens: int, width: int) -> None:
    """Raises `ValueError` if a batch of draws has not the shape `(batch, tokens, width)` that the model reads."""
    if tuple(user_embeds.shape) != (batch, tokens, width):
        raise ValueError(
            f"user_embeds have shape {tuple(user_embeds.shape)}, the model reads {(batch, tokens, width)}: (batch, "
            "num_user_tokens, hidden_size), one draw for each text."
        )


__all__ = ["Placed", "check_user_embeds", "place_user_tokens"]
