"""Concept texts to embeddings, once, by any text encoder of transformers."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def embed_concepts(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str = "{}",
    batch_size: int = 64,
    pooling: str | None = None,
) -> torch.Tensor:
    """Embeddings `(M, width)` of length 1, fp32, on the CPU, for `set_concepts`.

    Args:
        model: a text encoder. What gives text features or embeddings (CLIP, SigLIP, with their projection where they
            have it) is read there; every other encoder is pooled.
        prompt: what a text is put into, such as `"a photo of a bird with {}"`.
        pooling: `"pooler"`, the model's own pooled output; `"mean"` over the tokens that are not padding, as Sentence
            Transformers do; `"cls"`, the first token. `None`: the text features where there are such, the pooled
            output of CLIP and SigLIP, the mean elsewhere.

    Raises:
        ValueError: no texts, or a pooling that the model does not have.
    """
    if not texts:
        raise ValueError("there are no concept texts to embed.")
    # SigLIP was trained on texts padded to their whole length, and its pooled state is that of the last position.
    options = {"padding": "max_length" if "siglip" in model.config.model_type else True, "truncation": True}
    was_training = model.training
    model.eval()
    found = []
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(
            [prompt.format(text) for text in texts[start : start + batch_size]], return_tensors="pt", **options
        ).to(model.device)
        found.append(_features(model, batch, pooling).float().cpu())
    model.train(was_training)
    return torch.nn.functional.normalize(torch.cat(found), dim=-1)


def _features(model: PreTrainedModel, batch, pooling: str | None) -> torch.Tensor:
    """`(texts, width)` by whatever the model offers."""
    if pooling is None and hasattr(model, "get_text_features"):
        output = model.get_text_features(**batch)
        return output if torch.is_tensor(output) else output.pooler_output
    output = model(**batch)
    if pooling is None and getattr(output, "text_embeds", None) is not None:
        return output.text_embeds
    pooled = getattr(output, "pooler_output", None)
    if pooling == "pooler" or (pooling is None and model.config.model_type in _POOLED):
        if pooled is None:
            raise ValueError(f"{type(model).__name__} has no pooled output. Choose pooling='mean' or 'cls'.")
        return pooled
    states = output.last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    if pooling not in (None, "mean"):
        raise ValueError(f"pooling={pooling!r} is not known. Choose 'pooler', 'mean' or 'cls'.")
    seen = batch["attention_mask"].unsqueeze(-1).to(states.dtype)
    return (states * seen).sum(1) / seen.sum(1).clamp_min(1)


_POOLED = ("clip_text_model", "siglip_text_model", "siglip2_text_model")

__all__ = ["embed_concepts"]
