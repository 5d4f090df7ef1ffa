"""Which weights MSign restores (arXiv 2602.01734), and which matrices a fused weight consists of.

The paper names `attention` (W_Q, W_K, W_V, W_O) and `all 2-D`, and leaves open whether the latter has the embeddings
and the LM head in it. Ours: matrices of the repeated blocks only, without embeddings, output heads, routers and
adapters, which are no maps between hidden states.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn


EXCLUDED = ("embedding", "head", "router", "adapter")
Selection = str | Callable[[str, torch.Tensor], bool]
# What a split may be: sizes along the output dimension, a number of equal parts, or None for one matrix.
Split = Sequence[int] | int | None

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_HEADS = {"lm_head", "embed_out", "score", "classifier", "qa_outputs"}
# Layers whose rows are [queries, keys, values], in this order and without interleaving.
_QKV = {"qkv_proj", "Wqkv", "qkv", "W_pack", "in_proj_weight"}
_GATE_UP = {"gate_up_proj", "Wi"}
# Interleaved by head or by kind: as one matrix they would be wrong, and where the cuts are is the model's own affair.
_FUSED_OTHERWISE = {"query_key_value", "in_proj", "in_proj_qkvz", "in_proj_ba", "qkvz_proj"}


@dataclass(frozen=True)
class MatrixTarget:
    """One weight `(..., m, n)` to restore; leading dimensions are experts.

    Args:
        name: the parameter's name in the model.
        parts: the matrices that the weight consists of, slices along `dim`; `None`: it is one.
        dim: -2 for weights `(out, in)`, -1 for those stored transposed.
        parameter: the weight when it was selected. Later ones (FSDP2 replaces them) are found by the name or by the
            place in the optimizer.
    """

    name: str
    parts: tuple[slice, ...] | None = None
    dim: int = -2
    parameter: torch.Tensor | None = field(default=None, compare=False, repr=False)

    def matrices(self, weight: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Names and views of the matrices in `weight`, which may be a local part with fewer experts."""
        if self.parts is None:
            return [(self.name, weight)]
        index = [(part, slice(None)) if self.dim == -2 else (part,) for part in self.parts]
        return [(f"{self.name}[{i}]", weight[(..., *at)]) for i, at in enumerate(index)]


def select_targets(
    model: nn.Module,
    targets: Selection = "attention",
    *,
    split: Mapping[str, Split] | None = None,
    exclude: Sequence[str] = EXCLUDED,
) -> list[MatrixTarget]:
    """The weights of `model` that MSign restores, in the model's order.

    Args:
        model: before or after `fully_shard`, DDP, PEFT or the like; frozen weights are never targets.
        targets: `"attention"`: all matrices under an attention module (of MLA, all of its projections: the paper does
            not list them); `"all_2d"`: those and the feed-forward networks, experts included; a regular expression
            searched in the parameters' names; or `(name, parameter) -> bool`.
        split: regular expression of names -> how a fused weight is cut: sizes along the output dimension, a number of
            equal parts, or `None` to sign it whole, which is not the same. Known by themselves: GPT-2's `c_attn`,
            `qkv_proj`, `Wqkv` and the like, `gate_up_proj` of dense layers and of experts (interleaved ones, too).
        exclude: kinds that stay out although they match: `"embedding"`, `"head"`, `"router"`, `"adapter"`.

    Raises:
        ValueError: nothing is selected; a weight is flattened (FSDP1, DeepSpeed ZeRO); it is fused in an order that
            only its model knows; a split does not fit; an unknown kind in `exclude`.
    """
    if unknown := set(exclude) - set(EXCLUDED):
        raise ValueError(f"exclude={sorted(unknown)} is not known. Choose from {EXCLUDED}.")
    chosen = _chosen_by(targets)
    found = []
    for module, path, name, parameter in _weights(model):
        if not parameter.requires_grad or not _is_matrix(module, name, parameter):
            continue
        if _kind(model, module, name, parameter) in exclude or not chosen(name, parameter):
            continue
        parts, dim = _parts(model, module, path, name, parameter, split or {})
        found.append(MatrixTarget(name, parts, dim, parameter))
    if not found:
        raise ValueError(
            f"targets={targets!r} selects no trainable matrix of {type(model).__name__}. 'attention' and 'all_2d' "
            f"look inside repeated blocks (nn.ModuleList), and {tuple(exclude)} and what is frozen are left out: name "
            "the weights by a regular expression, or exclude fewer kinds."
        )
    return found


def _weights(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, torch.Tensor]]:
    """Module, its name, the parameter's name and the parameter; a tied one once."""
    seen = set()
    for path, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield module, path, f"{path}.{leaf}" if path else leaf, parameter


def _chosen_by(targets: Selection) -> Callable[[str, torch.Tensor], bool]:
    if callable(targets):
        return targets
    if targets not in ("attention", "all_2d"):
        pattern = re.compile(targets)
        return lambda name, parameter: pattern.search(name) is not None

    def in_blocks(name: str, parameter: torch.Tensor) -> bool:
        *path, leaf = name.split(".")
        # A number is a place in an nn.ModuleList, which is where models keep their layers.
        inside = any(segment.isdigit() for segment in path)
        # Of a bare parameter only the name tells that it multiplies: state matrices do not.
        known = re.search(r"weight$|_proj$|^w\d$", leaf) is not None
        return inside and known and (targets == "all_2d" or any(map(_ATTENTION.search, path)))

    return in_blocks


def _is_matrix(module: nn.Module, name: str, parameter: torch.Tensor) -> bool:
    """Whether it is one, or a stack of experts; not a bias of experts or a convolution, which look the same."""
    leaf = name.rpartition(".")[-1]
    flat = leaf == "_flat_param" or (_is_linear(module) and leaf == "weight" and parameter.ndim != 2)
    if flat:
        raise ValueError(
            f"{name} has the shape {tuple(parameter.shape)}: the model is flattened into shards (FSDP1 or DeepSpeed "
            "ZeRO), and a sign needs the matrix. Shard it with FSDP2 (`fully_shard`, fsdp_version: 2), which keeps "
            "shapes."
        )
    return parameter.ndim in (2, 3) and "bias" not in leaf and not isinstance(module, nn.modules.conv._ConvNd)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _kind(model: nn.Module, module: nn.Module, name: str, parameter: torch.Tensor) -> str | None:
    segments = name.split(".")
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    adapters = tuple(getattr(module, "adapter_layer_names", ()))  # PEFT keeps some factors in the layer itself
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if (output is not None and parameter is getattr(output, "weight", None)) or _HEADS & set(segments):
        return "head"
    if any(
        segment == "gate" or "router" in segment.lower() or segment.endswith("expert_gate") for segment in segments
    ):
        return "router"
    if any(segment.startswith("lora_") for segment in segments) or set(segments) & set(adapters):
        return "adapter"
    return None


def _parts(
    model: nn.Module, module: nn.Module, path: str, name: str, weight: torch.Tensor, split: Mapping[str, Split]
) -> tuple[tuple[slice, ...] | None, int]:
    """The slices and the dimension that they cut."""
    dim = -1 if type(module).__name__ == "Conv1D" else -2
    leaf = name.rpartition(".")[-1]
    layer = path.rpartition(".")[-1] if leaf == "weight" else leaf
    if weight.ndim == 3 and layer == "gate_up_proj":
        dim = _expert_output_dim(module, weight, name)
    for pattern, how in split.items():
        if re.search(pattern, name):
            return _slices(how, weight.shape[dim], name), dim
    if layer in _FUSED_OTHERWISE:
        raise ValueError(
            f"{name} is several matrices in an order that only its model knows. Give split={{'{layer}': sizes}} if "
            f"they lie one after the other, split={{'{layer}': None}} to sign it as one, or leave it out."
        )
    if layer == "c_attn":  # of GPT-2: three of them, two beside a `q_attn` in cross-attention
        return _slices(weight.shape[-1] // weight.shape[-2], weight.shape[dim], name), dim
    if layer in _QKV:
        return _slices(
            _qkv_sizes(model, path if leaf != "weight" else path.rpartition(".")[0], weight.shape[dim], name),
            weight.shape[dim],
            name,
        ), dim
    if layer in _GATE_UP:
        if not getattr(module, "is_concatenated", True):
            return (slice(0, None, 2), slice(1, None, 2)), dim
        return _slices(2, weight.shape[dim], name), dim
    return None, dim


def _expert_output_dim(module: nn.Module, weight: torch.Tensor, name: str) -> int:
    """-2 for `(E, 2I, H)`, -1 for `(E, H, 2I)`, from the shape of `down_proj` beside it."""
    down = getattr(module, "down_proj", None)
    if down is not None and (weight.shape[-2], weight.shape[-1]) == (2 * down.shape[-1], down.shape[-2]):
        return -2
    if down is not None and (weight.shape[-1], weight.shape[-2]) == (2 * down.shape[-2], down.shape[-1]):
        return -1
    raise ValueError(f"{name} {tuple(weight.shape)} has no down_proj beside it that says where gate and up are.")


def _qkv_sizes(model: nn.Module, path: str, rows: int, name: str) -> Split:
    attention = model.get_submodule(path)
    for holder in (attention, getattr(attention, "config", None), getattr(model, "config", None)):
        heads = next(
            (getattr(holder, key) for key in ("num_heads", "num_attention_heads", "n_heads") if hasattr(holder, key)),
            None,
        )
        if isinstance(heads, int):
            shared = getattr(holder, "num_key_value_heads", None) or heads
            if rows % (heads + 2 * shared):
                raise ValueError(
                    f"{name} has {rows} rows, which {heads} query and {shared} key-value heads do not share evenly. "
                    "Give its split."
                )
            width = rows // (heads + 2 * shared)
            return heads * width, shared * width, shared * width
    return 3


def _slices(how: Split, size: int, name: str) -> tuple[slice, ...] | None:
    if how is None or how == 1:
        return None
    sizes = [size // how] * how if isinstance(how, int) else list(how)
    if sum(sizes) != size or min(sizes) < 1:
        raise ValueError(f"split={how} of {name} does not add up to its output dimension of {size}.")
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return tuple(slice(end - part, end) for end, part in zip(ends, sizes, strict=True))


__all__ = ["EXCLUDED", "MatrixTarget", "select_targets"]
