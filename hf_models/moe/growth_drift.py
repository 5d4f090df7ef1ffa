# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""How far a grown checkpoint's function is from its source's, measured on fixed random token ids in fp32."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel


# One sequence: heads for classification need a padding token for several.
_TOKENS = 64


def available_memory() -> int:
    """Bytes of free main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


@torch.no_grad()
def _outputs(model_class: type[PreTrainedModel], folder: Path, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits, or for a model without a head the last hidden states, `(rows, width)` in float64."""
    model = model_class.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
    outputs = model(input_ids)
    values = outputs.logits if "logits" in outputs else outputs.last_hidden_state
    return values.flatten(end_dim=-2).double()


def logit_drift(
    model_class: type[PreTrainedModel], source: Path, grown: Path, *, vocab_size: int, seed: int = 0
) -> dict[str, float | int]:
    """Load one checkpoint after the other with `model_class` and compare what they give for the same tokens.

    Returns `max_abs`, the largest difference of an output; `relative_l2`, ||grown - source|| / ||source||; `kl`, the
    mean KL divergence of the grown model's distribution from the source's, in nats; `top1_agreement`, the share of
    rows with the same largest output; `tokens` and `seed`. For a model without a head the outputs are hidden states.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(vocab_size, (1, _TOKENS), generator=generator)
    before = _outputs(model_class, source, input_ids)
    after = _outputs(model_class, grown, input_ids)
    log_before, log_after = before.log_softmax(-1), after.log_softmax(-1)
    return {
        "max_abs": (after - before).abs().max().item(),
        "relative_l2": ((after - before).norm() / before.norm()).item(),
        "kl": (log_before.exp() * (log_before - log_after)).sum(-1).mean().item(),
        "top1_agreement": (before.argmax(-1) == after.argmax(-1)).double().mean().item(),
        "tokens": _TOKENS,
        "seed": seed,
    }


__all__ = ["available_memory", "logit_drift"]
