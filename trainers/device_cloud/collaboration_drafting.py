"""Assisted generation over a wire: the device drafts tokens, the cloud's model checks them, what crosses is counted.

The drafter may be any causal LM with the target's tokenizer. Two are made from the target itself: with fewer experts
per token, as an M-MoE is trained for, or with only its first layers. Greedy tokens are the target's own, whoever
drafts: a bad drafter costs calls, never words.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_models.moe.elastic import ActiveExperts, set_active_experts

from ..federated.core import WireMeter
from .collaboration_task import DEVICE, SERVING


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """What one request came to.

    Args:
        sequences: prompt and continuation, `(1, length)`.
        cloud_calls: forwards of the target; without a drafter as many as there are new tokens.
        cloud_tokens: positions that these forwards computed, the prompt's included.
        drafted, accepted: tokens that the device proposed, and those of them that are in the continuation.
        new_tokens: length of the continuation.
    """

    sequences: torch.Tensor
    cloud_calls: int
    cloud_tokens: int
    drafted: int
    accepted: int
    new_tokens: int


def drafter_of_fewer_experts(model: PreTrainedModel, k: ActiveExperts) -> PreTrainedModel:
    """The same mixture of experts with `k` active, sharing all weights with `model`, which keeps its own number.

    It saves computing on the device and no memory: every expert must be there. `TypeError` and `ValueError` as
    [`hf_models.moe.set_active_experts`].
    """
    drafter = _sharing_weights(model)
    set_active_experts(drafter, k)
    return drafter


def drafter_of_fewer_layers(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The first `layers` layers of a decoder under its own norm and head, sharing their weights with `model`.

    Raises:
        ValueError: not between 1 and the number of layers.
        TypeError: the decoder has no single list of its layers.
    """
    drafter = _sharing_weights(model)
    config = drafter.config.get_text_config()
    before = config.num_hidden_layers
    if not 1 <= layers <= before:
        raise ValueError(f"layers={layers} must be between 1 and {before}.")
    stacks = [
        (parent, name, child)
        for parent in drafter.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == before and name == "layers"
    ]
    if len(stacks) != 1:
        raise TypeError(f"{type(model).__name__} has {len(stacks)} lists of {before} `layers`, one is expected.")
    parent, name, stack = stacks[0]
    setattr(parent, name, stack[:layers])
    for field, value in list(vars(config).items()):
        if "layer" in field and isinstance(value, list) and len(value) == before:
            setattr(config, field, value[:layers])
    config.num_hidden_layers = layers
    return drafter


def _sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose parameters are those of `model`, and whose configuration is its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()}).eval()


@torch.no_grad()
def draft_and_verify(
    target: PreTrainedModel,
    drafter: PreTrainedModel,
    input_ids: torch.Tensor,
    meter: WireMeter,
    *,
    max_new_tokens: int,
    num_assistant_tokens: int = 5,
    round: int = 0,
    **options: Any,
) -> Drafted:
    """Generate greedily by `target.generate(assistant_model=drafter)`, and count what a wire between them carries.

    Up goes the prompt once and what is drafted for each call; down come how many of it were right and the token after.
    Tokens are int32. A cache stays on either side.

    Args:
        input_ids: the prompt `(1, length)`.
        num_assistant_tokens: drafted for a call, at most.
        round: of the request, for the meter.
        **options: of `generate`, greedy ones.

    Raises:
        ValueError: more than one prompt; generate's own errors, such as vocabularies that differ.
    """
    if len(input_ids) != 1:
        raise ValueError(f"{len(input_ids)} prompts: transformers drafts for one at a time.")
    prompt = input_ids.shape[1]
    seen: list[torch.Tensor] = []

    def record(_module: nn.Module, _args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs["input_ids"][0].clone())

    settings = {
        "num_assistant_tokens": num_assistant_tokens,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    before = {name: getattr(drafter.generation_config, name, None) for name in settings}
    drafter.generation_config.update(**settings)
    handle = target.register_forward_pre_hook(record, with_kwargs=True)
    try:
        sequences = target.generate(
            input_ids, assistant_model=drafter, max_new_tokens=max_new_tokens, do_sample=False, **options
        )
    finally:
        handle.remove()
        drafter.generation_config.update(**before)
    # the first call has the prompt before its drafts, each later one the token that the cloud itself chose last
    drafts = [ids[prompt if call == 0 else 1 :] for call, ids in enumerate(seen)]
    meter.send({"tokens": input_ids[0].int()}, direction="up", round=round, user=DEVICE, what=SERVING)
    accepted = _send_calls(meter, drafts, sequences[0, prompt:], round)
    return Drafted(
        sequences=sequences,
        cloud_calls=len(seen),
        cloud_tokens=sum(map(len, seen)),
        drafted=sum(map(len, drafts)),
        accepted=accepted,
        new_tokens=sequences.shape[1] - prompt,
    )


def _send_calls(meter: WireMeter, drafts: list[torch.Tensor], continuation: torch.Tensor, round: int) -> int:
    """Each call's drafts up and its verdict down; how many drafts were right in all."""
    position = total = 0
    for draft in drafts:
        meter.send({"tokens": draft.int()}, direction="up", round=round, user=DEVICE, what=SERVING)
        beside = continuation[position : position + len(draft)]
        right = int((draft[: len(beside)] == beside).long().cumprod(0).sum())
        after = continuation[position + right : position + right + 1]
        answer = {"right": torch.tensor([right], dtype=torch.int32), "next": after.int()}
        meter.send(answer, direction="down", round=round, user=DEVICE, what=SERVING)
        position += right + 1
        total += right
    return total


__all__ = ["Drafted", "draft_and_verify", "drafter_of_fewer_experts", "drafter_of_fewer_layers"]
