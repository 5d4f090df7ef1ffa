"""Pooled embeddings of every exit in one pass, for m3BERT and for any other encoder: what `evaluate_grid` is fed."""

import inspect
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def encode_with(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    layers: Sequence[int],
    batch_size: int = 64,
    max_length: int = 512,
    prompt: str = "",
    show_progress: bool = False,
) -> dict[int, Tensor]:
    """Embeddings `(texts, H)` by layer, fp32 on the CPU: pooled over what is not padding, full width, not normalised.

    Of m3BERT the exits, pooled and normed as its config says; of any other encoder the mean of `hidden_states[layer]`,
    where 0 is the embedding layer and the last is what the model returns. Texts are batched by length and come back in
    their own order. The device follows the model, which comes back in the mode it was in.

    Args:
        model: an m3BERT of any head, or an encoder that returns `hidden_states`.
        max_length: in tokens, with the special ones; longer texts are cut.
        prompt: goes before every text and counts into `max_length` and the mean.

    Raises:
        ValueError: a layer that the model does not have, or, for m3BERT, was not trained for; no layer.
    """
    deepest = _check_layers(model, layers)
    token_ids = _token_ids(tokenizer, texts, prompt, max_length)
    order = sorted(range(len(token_ids)), key=lambda index: -len(token_ids[index]))
    starts = range(0, len(order), batch_size)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    was_training = model.training
    model.eval()
    try:
        for start in tqdm(starts, desc="encoding", disable=not show_progress):
            batch = _padded([token_ids[index] for index in order[start : start + batch_size]], tokenizer, model)
            exits = _pooled_exits(model, batch, deepest)
            for layer in layers:
                found[layer].append(exits[layer].float().cpu())
    finally:
        model.train(was_training)
    back = torch.tensor(order, dtype=torch.long).argsort()
    nothing = torch.empty(0, model.config.hidden_size)
    return {layer: torch.cat(parts)[back] if parts else nothing for layer, parts in found.items()}


@torch.no_grad()
def encoding_ms(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    layers: Sequence[int],
    batch_size: int = 1,
    max_length: int = 512,
    prompt: str = "",
    repeats: int = 3,
) -> dict[int, float]:
    """Milliseconds that an m3BERT takes for one text up to each exit: the median over batches and `repeats`.

    Tokenised texts in, pooled embeddings on the CPU out. The layers take turns batch by batch, so that whatever else
    the machine does hits all of them.

    Raises:
        ValueError: no text; a model that cannot stop at a layer; a layer that it was not trained for.
    """
    _check_layers(model, layers)
    if not len(texts):
        raise ValueError("`texts` is empty: nothing to time.")
    if "exit_layer" not in inspect.signature(model.forward).parameters:
        raise ValueError(f"{type(model).__name__} cannot stop at a layer: build the shallower model and time that.")
    token_ids = _token_ids(tokenizer, texts, prompt, max_length)
    batches = [
        _padded(token_ids[start : start + batch_size], tokenizer, model)
        for start in range(0, len(token_ids), batch_size)
    ]
    times: dict[int, list[float]] = {layer: [] for layer in layers}
    was_training = model.training
    model.eval()
    try:
        for layer in layers:  # the first pass allocates
            _pooled_exits(model, batches[0], layer)
        for _ in range(repeats):
            for batch in batches:
                for layer in layers:
                    start = time.perf_counter()
                    _pooled_exits(model, batch, layer)[layer].cpu()
                    times[layer].append(1e3 * (time.perf_counter() - start) / len(batch["input_ids"]))
    finally:
        model.train(was_training)
    return {layer: statistics.median(values) for layer, values in times.items()}


def _check_layers(model: PreTrainedModel, layers: Sequence[int]) -> int:
    """The deepest of `layers`; `ValueError` for one that the model does not give."""
    trained = getattr(model.config, "mrl_layers", None)
    allowed = list(range(model.config.num_hidden_layers + 1)) if trained is None else list(trained)
    unknown = [layer for layer in layers if layer not in allowed]
    if unknown or not len(layers):
        raise ValueError(f"layers={list(layers)}: {type(model).__name__} gives {allowed}.")
    return max(layers)


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt: str, max_length: int
) -> list[list[int]]:
    if not len(texts):
        return []
    prompted = [prompt + text for text in texts]
    return tokenizer(prompted, truncation=True, max_length=max_length, return_attention_mask=False).input_ids


def _padded(
    token_ids: list[list[int]], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel
) -> dict[str, Tensor]:
    """Right-padded ids and mask `(batch, longest)` on the model's device; at least one column, for empty texts."""
    longest = max(1, *map(len, token_ids))
    ids = torch.full((len(token_ids), longest), tokenizer.pad_token_id or 0)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(token_ids):
        ids[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
        mask[row, : len(tokens)] = 1
    return {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}


def _pooled_exits(model: PreTrainedModel, batch: dict[str, Tensor], deepest: int) -> dict[int, Tensor]:
    accepted = inspect.signature(model.forward).parameters
    if "output_exit_embeddings" in accepted:
        output = model(**batch, exit_layer=deepest, output_exit_embeddings=True)
        return dict(zip(model.config.mrl_layers, output.exit_embeddings))
    encoder = model.base_model  # of a head's inputs and outputs nothing is wanted here
    if "output_exit_states" in inspect.signature(encoder.forward).parameters:
        output = encoder(**batch, exit_layer=deepest, output_exit_states=True)
        states = dict(zip(model.config.mrl_layers, output.exit_hidden_states))
        if model.config.pooling == "cls":
            return {layer: state[:, 0] for layer, state in states.items()}
    else:
        states = dict(enumerate(encoder(**batch, output_hidden_states=True).hidden_states))
    weights = batch["attention_mask"][:, :, None]  # (batch, sequence, 1)
    lengths = weights.sum(dim=1).clamp_min(1)
    return {
        layer: torch.where(weights > 0, state.float(), 0.0).sum(dim=1) / lengths
        for layer, state in states.items()
        if layer <= deepest
    }
