# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""A model with fewer tokens: two thirds of m3BERT's parameters are its table of 250,002, of which a few languages use
a part.

    model, tokenizer = trim_vocabulary(model, tokenizer, texts)

Texts that consist of kept tokens are cut into the same tokens as before, under new numbers, and the model computes the
same from them. Why: a segmentation that was the best (Unigram), the longest match (WordPiece) or the result of merges
(BPE, of which every merge towards a kept token stays) is so, too, among fewer tokens that still include all of it.
"""

import json
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .truncation import TruncationMixin


KINDS = ("Unigram", "BPE", "WordPiece", "WordLevel")
TEXTS_AT_ONCE = 1000
_SETTINGS = (
    "model_max_length",
    "padding_side",
    "truncation_side",
    "model_input_names",
    "clean_up_tokenization_spaces",
)


def trim_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts_or_token_ids: Iterable[str | int],
    *,
    keep_characters: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A model and a tokenizer with the tokens of [`kept_token_ids`] only; both are copies, the arguments stay.

    Kept tokens keep their order, so that new numbers are at most the old ones. `ValueError` for a model that is not an
    m3BERT, and for a tokenizer that is not one of `tokenizers` with a model among `KINDS`.
    """
    if not isinstance(model, TruncationMixin):
        raise ValueError(f"{type(model).__name__} is not an m3BERT: its tables are not known here.")
    kept = kept_token_ids(tokenizer, texts_or_token_ids, keep_characters=keep_characters)
    rows = model.config.vocab_size
    if kept[-1] >= rows:
        raise ValueError(
            f"The tokenizer has the token {kept[-1]}, the model only {rows} rows: they do not fit together."
        )
    new_id = {old: new for new, old in enumerate(kept)}
    fields = model.config.to_dict() | {"vocab_size": len(kept)}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        old = getattr(model.config, name)
        fields[name] = [new_id.get(each) for each in old] if isinstance(old, list) else new_id.get(old)
    config = type(model.config)(**fields)
    config._attn_implementation = model.config._attn_implementation
    index = torch.tensor(kept, device=model.device)

    def part_of(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        return tensor if tensor.shape == shape else tensor[index]

    return model.rebuilt(config, part_of), _trimmed_tokenizer(tokenizer, new_id)


def kept_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    texts_or_token_ids: Iterable[str | int],
    *,
    keep_characters: bool = True,
) -> list[int]:
    """Ascending ids of the tokens that stay: those given or found in the texts, those that they are merged from (BPE),
    special and added ones, and bytes; with `keep_characters` also all of one character, so that other texts become
    longer but not unreadable."""
    spec = _specification(tokenizer)
    texts_or_token_ids = iter(texts_or_token_ids)
    ids = set(tokenizer.all_special_ids) | {token["id"] for token in spec["added_tokens"]}
    while chunk := list(islice(texts_or_token_ids, TEXTS_AT_ONCE)):
        texts = [each for each in chunk if isinstance(each, str)]
        ids.update(int(each) for each in chunk if not isinstance(each, str))
        for found in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ():
            ids.update(found)
    vocabulary = tokenizer.get_vocab()
    known = set(vocabulary.values())
    if unknown := sorted(ids - known):
        raise ValueError(f"The tokenizer has no tokens {unknown[:10]}: give ids of its own, or texts.")
    ids.update(number for token, number in vocabulary.items() if _stays(token, spec["model"], keep_characters))
    if spec["model"]["type"] == "Unigram":  # the price of an unknown character hangs on the lowest score
        scores = [score for _, score in spec["model"]["vocab"]]
        ids.add(scores.index(min(scores)))
    return sorted(ids | _ancestors(ids, vocabulary, spec["model"]))


def _stays(token: str, model: dict[str, Any], keep_characters: bool) -> bool:
    if token == model.get("unk_token") or (token.startswith("<0x") and len(token) == 6):
        return True
    piece = token.removeprefix(model.get("continuing_subword_prefix") or "").removeprefix("▁")
    byte_level = model["type"] == "BPE" and len(token) == 1
    return byte_level or (keep_characters and len(piece) <= 1)


def _ancestors(ids: set[int], vocabulary: dict[str, int], model: dict[str, Any]) -> set[int]:
    """What the merges of BPE put these tokens together from, down to single characters."""
    if model["type"] != "BPE":
        return set()
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in _merges(model):
        parts.setdefault(left + right, []).append((left, right))
    tokens = {number: token for token, number in vocabulary.items()}
    found, queue = set(), [tokens[number] for number in ids]
    while queue:
        for pair in parts.get(queue.pop(), ()):
            new = {part for part in pair if vocabulary[part] not in found}
            found.update(vocabulary[part] for part in new)
            queue.extend(new)
    return found


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]


def _specification(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as `tokenizers` writes it to a file."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(tokenizer).__name__} is no tokenizer of the `tokenizers` library, whose vocabulary can be edited. "
            "Load the fast one."
        )
    spec = json.loads(backend.to_str())
    kind = spec["model"].get("type")
    if kind not in KINDS:
        raise ValueError(f"A tokenizer with a {kind!r} model cannot be trimmed; these can: {KINDS}.")
    if kind == "BPE" and (spec["model"].get("continuing_subword_prefix") or spec["model"].get("end_of_word_suffix")):
        raise ValueError("A BPE tokenizer that marks the inside or the end of words cannot be trimmed.")
    return spec


def _trimmed_tokenizer(tokenizer: PreTrainedTokenizerBase, new_id: dict[int, int]) -> PreTrainedTokenizerFast:
    spec = _specification(tokenizer)
    model = spec["model"]
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = new_id[model["unk_id"]]
        model["vocab"] = [piece for number, piece in enumerate(model["vocab"]) if number in new_id]
    else:
        model["vocab"] = {token: new_id[number] for token, number in model["vocab"].items() if number in new_id}
    if model["type"] == "BPE":
        merges = [
            (left, right) for left, right in _merges(model) if {left, right, left + right} <= model["vocab"].keys()
        ]
        model["merges"] = [list(pair) for pair in merges]
    for token in spec["added_tokens"]:
        token["id"] = new_id[token["id"]]
    if spec.get("padding"):
        spec["padding"]["pad_id"] = new_id[spec["padding"]["pad_id"]]
    _renumber(spec.get("post_processor"), new_id)
    settings = {name: getattr(tokenizer, name) for name in _SETTINGS if hasattr(tokenizer, name)}
    backend = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **settings, **tokenizer.special_tokens_map)


def _renumber(processor: dict[str, Any] | None, new_id: dict[int, int]) -> None:
    """New ids of the tokens that a post-processor adds around a text, in place."""
    kind = processor["type"] if processor else None
    if kind == "Sequence":
        for each in processor["processors"]:
            _renumber(each, new_id)
    elif kind == "TemplateProcessing":
        for token in processor["special_tokens"].values():
            token["ids"] = [new_id[old] for old in token["ids"]]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        for name in ("sep", "cls"):
            token, old = processor[name]
            processor[name] = [token, new_id[old]]
    elif kind not in (None, "ByteLevel"):
        raise ValueError(f"The post-processor {kind!r} of this tokenizer is not known: its token ids may not fit.")


__all__ = ["kept_token_ids", "trim_vocabulary"]
