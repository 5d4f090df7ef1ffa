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


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, blocks: Dataset, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 16
) -> HeldOutLoss:
    """Cross-entropy of `model` on packed `blocks` (`input_ids` of equal length), without auxiliary losses.

    The first token of each block is read but not predicted, and not counted. End-of-document tokens cost bits and
    spell no character. Bits per character do not depend on the tokenizer, so models with different ones can be
    compared.
    """
    was_training, device = model.training, model.device
    model.eval()
    nats, tokens, characters = 0.0, 0, 0
    for start in range(0, len(blocks), batch_size):
        ids = torch.tensor(blocks[start : start + batch_size]["input_ids"], device=device)  # (batch, sequence)
        targets = ids[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        tokens += targets.numel()
        characters += sum(map(len, tokenizer.batch_decode(targets, skip_special_tokens=True)))
    model.train(was_training)
    return HeldOutLoss(nats / tokens, nats / math.log(2) / max(characters, 1), tokens, characters)
