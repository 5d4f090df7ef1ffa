"""Loss of a language model on held-out text, per token and per character."""

import math
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class HeldOutLoss:
    """`nats_per_token` and `bits_per_character` over `tokens` predicted tokens that spell `characters` characters."""

    nats_per_token: float
    bits_per_character: float
    tokens: int
    characters: int


def held_out_loss(
    model: PreTrainedModel, blocks: Dataset, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
) -> HeldOutLoss:
    """Cross-entropy of `model` on packed `blocks` (`input_ids` of equal length), without auxiliary losses.

    The first token of each block is read but not predicted, and not counted. End-of-document tokens cost bits and
    spell no character. Bits per character do not depend on the tokenizer, so models with different ones can be
    compared.
    """
    nats_per_token, tokens = held_out_nats(model, blocks, batch_size)
    characters = 0
    for start in range(0, len(blocks), batch_size):
        predicted = [ids[1:] for ids in blocks[start : start + batch_size]["input_ids"]]
        characters += sum(map(len, tokenizer.batch_decode(predicted, skip_special_tokens=True)))
    bits = nats_per_token * tokens / math.log(2)
    return HeldOutLoss(nats_per_token, bits / max(characters, 1), tokens, characters)


@torch.no_grad()
def held_out_nats(model: PreTrainedModel, blocks: Dataset, batch_size: int) -> tuple[float, int]:
    """Mean cross-entropy in nats per token, and the number of predicted tokens. The model comes back as it was."""
    was_training, nats, tokens = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor(blocks[start : start + batch_size]["input_ids"], device=model.device)  # (batch, sequence)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    model.train(was_training)
    return nats / tokens, tokens
