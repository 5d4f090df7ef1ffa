# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Cutting a model to a cell of its grid: in memory, and while it is loaded, reading only what is needed."""

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.modeling_utils import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .prefixes import prefix_slices


# Arguments of `from_pretrained` that say where files are.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class TruncationMixin:
    """`truncate` and `from_pretrained(..., num_layers=, embed_dim=)` for a model with an `M3BertConfig`."""

    def truncate(self, layers: int | None = None, dim: int | None = None):
        """A model of the same class that ends after `layers` layers and puts out `dim` entries, whose outputs are bit
        for bit those of `model(..., exit_layer=layers, embed_dim=dim)`. It has its own copy of what is left, and
        nothing else. `ValueError` for a depth or width that was not trained."""
        config = copy.deepcopy(self.config.truncated(layers, dim))
        widths = (self.config.width, config.width)
        return self.rebuilt(config, lambda tensor, shape: tensor[prefix_slices(tensor.shape, shape, *widths)])

    @torch.no_grad()
    def rebuilt(self, config: PreTrainedConfig, part_of: Callable[[torch.Tensor, torch.Size], torch.Tensor]):
        """A model of the same class by `config`, each tensor a copy of `part_of(ours, its shape)`."""
        with torch.device("meta"):
            other = type(self)(config)
        ours = self.state_dict()
        if missing := other.state_dict().keys() - ours.keys():
            raise ValueError(
                f"{min(missing)} is not here by its name: merge adapters first (`model.merge_and_unload()`)."
            )
        tensors = {name: part_of(ours[name], wanted.shape).clone() for name, wanted in other.state_dict().items()}
        other.load_state_dict(tensors, assign=True)
        for name, buffer in list(other.named_buffers()):
            if buffer.is_meta:  # in no checkpoint: the frequencies of RoPE
                module, _, leaf = name.rpartition(".")
                setattr(other.get_submodule(module), leaf, self.get_buffer(name).clone())
        other.tie_weights()
        frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        for name, parameter in other.named_parameters():
            parameter.requires_grad_(name not in frozen)
        return other.train(self.training)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *model_args,
        config: PreTrainedConfig | str | os.PathLike | None = None,
        num_layers: int | None = None,
        embed_dim: int | None = None,
        **kwargs,
    ):
        """As in transformers. With `num_layers` or `embed_dim` (or the `config` of a smaller model), what `truncate`
        makes of the model; of its files only the tensors that are left are read, and of a repository on the Hub only
        the shards that hold them are downloaded.

        `ValueError` for a depth or width that was not trained, and where there are no safetensors files.
        """
        path = pretrained_model_name_or_path
        given = isinstance(config, PreTrainedConfig)
        if path is None or not (given or num_layers is not None or embed_dim is not None):
            return super().from_pretrained(path, *model_args, config=config, **kwargs)
        where = {name: kwargs.pop(name) for name in _WHERE if name in kwargs}
        source = path if given or config is None else config
        stored = cls.config_class.from_pretrained(source, **where)
        if given:
            config = config.truncated(num_layers, embed_dim)
        else:
            types = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}
            cell = {"num_layers": num_layers, "embed_dim": embed_dim}
            config, kwargs = cls.config_class.from_pretrained(
                source, return_unused_kwargs=True, **cell, **where, **kwargs
            )
            kwargs |= types
        if not _is_cut(stored, config):
            return super().from_pretrained(path, *model_args, config=config, **where, **kwargs)
        where["revision"] = getattr(stored, "_commit_hash", None) or where.get("revision")
        tensors = _read_tensors(cls, path, stored, config, kwargs.pop("variant", None), where)
        loaded = super().from_pretrained(None, *model_args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(path)
        return loaded


def _is_cut(stored: PreTrainedConfig, config: PreTrainedConfig) -> bool:
    """Whether `config` asks for a cell of the stored model that is not the whole."""
    depth, width = config.num_hidden_layers, config.width
    whole = (depth, width) == (stored.num_hidden_layers, stored.width)
    return not whole and depth in stored.mrl_layers and width in stored.mrl_dims


def _read_tensors(
    cls: type, path: str | os.PathLike, stored: PreTrainedConfig, config: PreTrainedConfig, variant: str | None, where
) -> dict[str, torch.Tensor]:
    """What the files hold of the model that `config` describes, cut to its width."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in cls(config).state_dict().items()}
    prefix, tensors = f"{cls.base_model_prefix}.", {}

    def needed(key: str) -> str | None:
        # A file of a head has the body's names with a prefix, a file of the body without.
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in shapes), None)

    for file in _files_with(needed, path, variant, where):
        with safe_open(file, framework="pt") as stream:
            for key in stream.keys():  # noqa: SIM118 (no mapping)
                if (name := needed(key)) is not None:
                    tensor = stream.get_slice(key)
                    cut = prefix_slices(tensor.get_shape(), shapes[name], stored.width, config.width)
                    tensors[name] = tensor[cut]
    return tensors


def _files_with(needed, path: str | os.PathLike, variant: str | None, where: dict[str, Any]) -> list[str]:
    """Files that hold a tensor for which `needed` has a name; from a Hub, only these are downloaded."""

    def fetch(name: str, **options) -> str | None:
        return cached_file(path, name, **where, **options)

    def named(name: str) -> str:
        return name if variant is None else name.replace(".safetensors", f".{variant}.safetensors", 1)

    optional = {"_raise_exceptions_for_missing_entries": False}
    if (single := fetch(named(SAFE_WEIGHTS_NAME), **optional)) is not None:
        return [single]
    index_name = SAFE_WEIGHTS_INDEX_NAME if variant is None else f"model.safetensors.index.{variant}.json"
    if (index := fetch(index_name, **optional)) is None:
        raise ValueError(
            f"{path} holds no safetensors files, and num_layers and embed_dim need them. Load the whole model, then "
            "`model.truncate(layers=..., dim=...)`."
        )
    weight_map = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    shards = sorted({shard for key, shard in weight_map.items() if needed(key) is not None})
    for shard in shards:
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index} names a file {shard!r} that is not a plain file name: it is damaged or hostile."
            )
    return [fetch(shard) for shard in shards]


__all__ = ["TruncationMixin"]
