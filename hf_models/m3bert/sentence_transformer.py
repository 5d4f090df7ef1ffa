# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""m3BERT as a Sentence Transformer whose depth and width are chosen at run time.

A folder written by [`save_for_sentence_transformers`] holds modules of the library only, so that its own class loads
it (`import hf_models` first, or `trust_remote_code=True`):

    model = SentenceTransformer(folder)
    model.encode(texts, exit_layer=4, embed_dim=64)                  # the cell; refused if it was not trained
    SentenceTransformer(folder, model_kwargs={"num_layers": 4})      # reads four layers only
    SentenceTransformer(folder, truncate_dim=64)                     # the library's own cut

`truncate_dim` cuts after the last module, that is after the vectors were brought to length 1: cosines are right, inner
products are not (`encode(..., normalize_embeddings=True)` mends that), and any number is taken. `embed_dim` cuts in
the model, before pooling (a mean of slices is the slice of the mean) and so before the norm.
[`M3BertSentenceTransformer`] does that for `truncate_dim`, too, has `truncate_layers` beside the library's
`truncate_embeddings`, and refuses what was not trained.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What `encode` hands on to the encoder; the library reads this list from modules.json.
ENCODE_KWARGS = ["exit_layer", "embed_dim"]
# Features that the encoder takes; the library's own bookkeeping lies beside them.
_INPUTS = (
    *("input_ids", "attention_mask", "position_ids"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
)


class M3BertTransformer(Transformer):
    """The library's Transformer module, whose layers, where all are asked for, are the trained exits.

    `AdaptiveLayerLoss` and `Matryoshka2dLoss` set `config.output_hidden_states` and take the list that comes back as
    the layers to train. From the plain module that is the embedding layer and the raw state after every block: layers
    at which m3BERT is never cut, and, unless `exit_norm="none"`, states without the norm that an exit ends with. Here
    it is `exit_hidden_states`: what a model cut there gives.
    """

    def forward(self, features: dict[str, Any], **kwargs) -> dict[str, Any]:
        if not getattr(self.config, "output_hidden_states", False):
            return super().forward(features, **kwargs)
        inputs = {name: features[name] for name in _INPUTS if name in features}
        output = self.model(**inputs, output_exit_states=True, **kwargs)
        states = output.last_hidden_state
        features[self.module_output_name] = states
        features["all_layer_embeddings"] = tuple(state[..., : states.shape[-1]] for state in output.exit_hidden_states)
        return features


class M3BertSentenceTransformer(SentenceTransformer):
    """A `SentenceTransformer` of an m3BERT, cut in depth and width when it encodes.

        model = M3BertSentenceTransformer(folder, exit_layer=8, truncate_dim=64)
        with model.truncate_layers(4), model.truncate_embeddings(32):
            model.encode(texts)

    Embeddings are pooled, cut to `truncate_dim`, then brought to length 1 (if the config says so). Training is of the
    whole model, whatever the cut. It saves what the plain class loads, all layers of it; a smaller repository comes
    from `model_kwargs={"num_layers": 4, "embed_dim": 64}` and `save_pretrained`.

    Args:
        exit_layer: encode with this many layers; one of `config.mrl_layers`, `None` for all.
        truncate_dim: encode to this many entries; one of `config.mrl_dims`, `None` for all.
        args, kwargs: those of `SentenceTransformer`.

    Raises:
        ValueError: another architecture, or a layer or dim that was not trained, here, in `encode` and in the two
            contexts.
    """

    def __init__(self, *args, exit_layer: int | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.exit_layer = exit_layer
        if getattr(self.config, "model_type", None) != "m3bert" or not isinstance(self[0], Transformer):
            raise ValueError(
                f"This is no m3BERT but {getattr(self.config, 'model_type', 'no transformer')!r}: load it with "
                "SentenceTransformer."
            )
        self[0].__class__ = M3BertTransformer  # adds no state; the library builds its own class from modules.json
        if not self.module_kwargs:  # no modules.json: the library has put a mean behind the encoder, nothing else
            if self.config.normalize_embeddings and not any(isinstance(module, Normalize) for module in self):
                self.append(Normalize())
            for index, module in enumerate(self):
                if isinstance(module, Pooling):
                    self[index] = Pooling(self.config.width, self.config.pooling, module.include_prompt)
        self.module_kwargs = {**(self.module_kwargs or {}), next(iter(self._modules)): ENCODE_KWARGS}
        for index, module in enumerate(self):
            # The library takes hidden_size, or what modules.json said before `embed_dim` cut the model.
            if isinstance(module, Pooling) and module.embedding_dimension != self.config.width:
                self[index] = Pooling(self.config.width, module.pooling_mode, module.include_prompt)
        self.config.cell(self.exit_layer, self.truncate_dim)

    def encode(
        self,
        inputs,
        *args,
        exit_layer: int | None = None,
        embed_dim: int | None = None,
        truncate_dim: int | None = None,
        **kwargs,
    ):
        """As in `SentenceTransformer`; `embed_dim` is another name for `truncate_dim`."""
        layer = self.exit_layer if exit_layer is None else exit_layer
        dim = next((dim for dim in (embed_dim, truncate_dim, self.truncate_dim) if dim is not None), None)
        self.config.cell(layer, dim)
        return super().encode(inputs, *args, truncate_dim=dim, exit_layer=layer, embed_dim=dim, **kwargs)

    @contextmanager
    def truncate_layers(self, exit_layer: int | None) -> Iterator[None]:
        """In this context `encode` stops after `exit_layer` layers; `None`: after the last."""
        self.config.cell(exit_layer)
        before, self.exit_layer = self.exit_layer, exit_layer
        try:
            yield
        finally:
            self.exit_layer = before

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """In this context `encode` gives `truncate_dim` entries, brought to length 1; `None`: all."""
        self.config.cell(None, truncate_dim)
        with super().truncate_embeddings(truncate_dim):
            yield

    def save(self, path: str, *args, **kwargs) -> None:
        """As in `SentenceTransformer`, and modules.json names its own Transformer module."""
        super().save(path, *args, **kwargs)
        file = Path(path) / "modules.json"
        modules = json.loads(file.read_text(encoding="utf-8"))
        modules[0]["type"] = _reference(Transformer)
        file.write_text(json.dumps(modules, indent=2), encoding="utf-8")


def save_for_sentence_transformers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    prompts: Mapping[str, str] | None = None,
) -> Path:
    """Save an m3BERT of any head with `save_pretrained`, its tokenizer, and what makes the folder a Sentence
    Transformers repository: encoder, pooling as `config.pooling` says, and, with `config.normalize_embeddings`,
    length 1.

    Args:
        prompts: what goes before a text, by name: `{"query": "query: ", "document": "passage: "}` are those of
            `encode_query` and `encode_document`.
    """
    folder, config = Path(folder), model.config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [("", Transformer, ENCODE_KWARGS), ("1_Pooling", Pooling, [])]
    _folder(folder / "1_Pooling", Pooling(config.width, config.pooling))
    if config.normalize_embeddings:
        modules.append(("2_Normalize", Normalize, []))
        _folder(folder / "2_Normalize", Normalize())
    _write(
        folder / "modules.json",
        [
            {"idx": index, "name": str(index), "path": path, "type": _reference(kind)}
            | ({"kwargs": names} if names else {})
            for index, (path, kind, names) in enumerate(modules)
        ],
    )
    _write(
        folder / Transformer.config_file_name,
        {
            "transformer_task": "feature-extraction",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "module_output_name": "token_embeddings",
        },
    )
    versions = {"sentence_transformers": sentence_transformers, "transformers": transformers, "pytorch": torch}
    _write(
        folder / "config_sentence_transformers.json",
        {
            "model_type": SentenceTransformer.model_type,
            "__version__": {name: str(module.__version__) for name, module in versions.items()},
            "prompts": {"query": "", "document": ""} | dict(prompts or {}),
            "default_prompt_name": None,
            "similarity_fn_name": "cosine",
        },
    )
    return folder


def _reference(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _folder(path: Path, module: Pooling | Normalize) -> None:
    path.mkdir(parents=True, exist_ok=True)
    module.save(str(path))


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


__all__ = ["M3BertSentenceTransformer", "M3BertTransformer", "save_for_sentence_transformers"]
