# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""The number of active experts as a dial, on every mixture-of-experts model of transformers.

    set_active_experts(model, 2)                                    # all layers; or [4, 2, ...], or {0: 4}
    set_active_experts(model, {"schedule": "front", "mean": 3})     # early layers spend more
    with active_experts(model, 2): ...                              # restored on exit

A router of transformers is a module with a plain int `top_k` and a `weight (experts, hidden)`, whose forward returns
`(logits, weights, indices)`. That is all these functions rely on. Layers are counted among those that have a router: a
leading dense layer has no number. k lives on the modules, so two threads that share a model share it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel


ActiveExperts = int | list[int] | tuple[int, ...] | dict[int, int] | dict[str, Any]
SCHEDULES = ("uniform", "front", "back")
PER_LAYER = "num_experts_per_tok_per_layer"


def routers_of(model: nn.Module) -> list[nn.Module]:
    """The router of each layer that has one, in order.

    Raises:
        TypeError: no router, or two for one layer (PEFT's `modules_to_save`).
    """
    routers = []
    for name, module in model.named_modules():
        is_router = _is_count(getattr(module, "top_k", None)) and _is_count(getattr(module, "num_experts", None))
        if not is_router or "weight" not in module._parameters:
            continue
        if "original_module" in name.split("."):
            raise TypeError(
                f"{name} is kept twice by PEFT's modules_to_save, so that a layer has two routers. Merge the adapter "
                "first (merge_and_unload), or adapt the routers with LoRA instead."
            )
        routers.append(module)
    if not routers:
        raise TypeError(
            f"{type(model).__name__} has no routers with a number of active experts (`top_k`): it is not a "
            "mixture-of-experts model of transformers, or not one of the usual kind."
        )
    return routers


def experts_in_force(model: nn.Module) -> list[int]:
    """Active experts per token of each router, now."""
    return [router.top_k for router in routers_of(model)]


def experts_of_config(model: nn.Module) -> list[int]:
    """Active experts per token of each router as the config has them: what inference uses and a checkpoint says."""
    number = len(routers_of(model))
    config = model.config.get_text_config()
    per_layer = getattr(config, PER_LAYER, None)
    return list(per_layer) if per_layer else [config.num_experts_per_tok] * number


def apply_experts_of_config(model: nn.Module) -> None:
    """Give the routers what the config says, after loading a host's list or after draws. Raises `ValueError` for a
    list that does not fit."""
    values = experts_of_config(model)
    routers = routers_of(model)
    require_active_experts(routers, values)
    put_active_experts(routers, values)


def set_active_experts(model: nn.Module, k: ActiveExperts) -> None:
    """Set the active experts per token in routers and config; effective with the next forward.

    Args:
        model: a mixture-of-experts model of transformers or of this package; PEFT may wrap it.
        k: one number for all layers; a list, one per layer with experts; `{layer: k}`, where other layers keep theirs;
            or `{"schedule": "front" | "back" | "uniform", "mean": m}`: see [`expert_schedule`].

    `save_pretrained` writes what is in force: `num_experts_per_tok` is the largest, which is what other engines read,
    and `num_experts_per_tok_per_layer` the list. Models of this package load with the list, others get it back by
    `wrap_moe` after loading.

    Raises:
        TypeError: no routers, or a config without `num_experts_per_tok`.
        ValueError: a wrong number of layers; a value outside `1..num_experts`, or, where tokens are limited to a few
            groups of experts, above what these groups hold. Nothing has changed then.
    """
    routers = routers_of(model)
    values = resolve_active_experts(routers, k)
    configs = _configs_with_experts(model)
    put_active_experts(routers, values)
    per_layer = list(values) if isinstance(k, (list, tuple, dict)) else None
    for config, its_list in zip(configs, (per_layer, None)):
        _write(config, max(values), its_list)
    _follow_largest(model, max(values))


@contextmanager
def active_experts(model: nn.Module, k: ActiveExperts) -> Iterator[None]:
    """[`set_active_experts`] for the forwards inside; routers and config come back on exit, also after an exception.
    Nests."""
    routers, configs = routers_of(model), _configs_with_experts(model)
    before = [router.top_k for router in routers]
    fields = [(config.num_experts_per_tok, getattr(config, PER_LAYER, None)) for config in configs]
    set_active_experts(model, k)
    try:
        yield
    finally:
        put_active_experts(routers, before)
        for config, (largest, per_layer) in zip(configs, fields, strict=True):
            _write(config, largest, per_layer)
        _follow_largest(model, configs[0].num_experts_per_tok)


def put_active_experts(routers: list[nn.Module], values: list[int]) -> None:
    """Give each router its number, unchecked; the config does not learn of it: for draws of a moment."""
    for router, k in zip(routers, values, strict=True):
        router.top_k = k


def resolve_active_experts(routers: list[nn.Module], k: ActiveExperts) -> list[int]:
    """One valid number per router from any form that [`set_active_experts`] takes."""
    if isinstance(k, dict) and "schedule" in k:
        options = {name: value for name, value in k.items() if name != "schedule"}
        largest = min(map(most_experts, routers))
        values = expert_schedule(k["schedule"], len(routers), **{"largest": largest} | options)
    elif isinstance(k, dict):
        unknown = [layer for layer in k if layer not in range(len(routers))]
        if unknown:
            raise ValueError(f"layers {unknown} are not among the {len(routers)} layers with experts, counted from 0.")
        values = [k.get(layer, router.top_k) for layer, router in enumerate(routers)]
    else:
        values = list(k) if isinstance(k, (list, tuple)) else [k] * len(routers)
    require_active_experts(routers, values)
    return values


def require_active_experts(routers: list[nn.Module], values: list[int]) -> None:
    """Raise `ValueError` unless there is one number per router that it can activate."""
    if len(values) != len(routers):
        raise ValueError(
            f"top_k has {len(values)} entries for {len(routers)} layers with experts. Give one per layer."
        )
    for layer, (router, k) in enumerate(zip(routers, values)):
        if not _is_count(k) or not 1 <= k <= router.num_experts:
            raise ValueError(f"top_k={k!r} of layer {layer} is not an integer in 1..num_experts={router.num_experts}.")
        if k > most_experts(router):
            raise ValueError(
                f"top_k={k} of layer {layer} is more than the {most_experts(router)} experts of the "
                f"topk_group={router.topk_group} groups that a token may use."
            )


def most_experts(router: nn.Module) -> int:
    """The most experts that a token can use: all, or those of the groups it is limited to (DeepSeek)."""
    groups, allowed = getattr(router, "num_group", None), getattr(router, "topk_group", None)
    if not groups or not allowed or getattr(router, "topk_method", None) == "greedy":
        return router.num_experts
    return allowed * (router.num_experts // groups)


def expert_schedule(schedule: str, num_layers: int, *, mean: float, smallest: int = 1, largest: int) -> list[int]:
    """Active experts of each layer, their mean exactly `mean`.

    `"front"` falls linearly from the first layer to the last, as steeply as `smallest` and `largest` allow around the
    mean; `"back"` is its mirror image; `"uniform"` is as even as integers can be, the remainder in the first layers.
    That early layers deserve more is the M-MoE paper's finding; the shape is ours.

    Raises:
        ValueError: an unknown schedule, a mean out of range, or one that no integers have (`mean * num_layers` is not
            whole); the message names the nearest.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule={schedule!r} is not known. Choose one of {SCHEDULES}.")
    if not smallest <= mean <= largest:
        raise ValueError(f"mean={mean} lies outside {smallest}..{largest}.")
    total = round(mean * num_layers)
    if abs(mean * num_layers - total) > 1e-6:
        near = [number / num_layers for number in (int(mean * num_layers), int(mean * num_layers) + 1)]
        raise ValueError(
            f"mean={mean} over {num_layers} layers makes {mean * num_layers:g} experts, not a whole number. The "
            f"nearest means are {near[0]:g} and {near[1]:g}."
        )
    swing = 0.0 if schedule == "uniform" else min(mean - smallest, largest - mean)
    centre = (num_layers - 1) / 2
    wanted = [mean + (swing * (centre - i) / centre if centre else 0.0) for i in range(num_layers)]
    # Largest remainder; rounding against float noise first, so that equal layers stay equal.
    floors = [int(round(value, 9)) for value in wanted]
    order = sorted(range(num_layers), key=lambda i: (floors[i] - round(wanted[i], 9), i))
    for i in order[: total - sum(floors)]:
        floors[i] += 1
    return sorted(floors, reverse=schedule != "back")


class RouterCall(NamedTuple):
    """What one router returned in one forward."""

    router_logits: torch.Tensor  # (tokens, experts), with its gradient
    weights: torch.Tensor  # (tokens, k)
    indices: torch.Tensor  # (tokens, k)


@contextmanager
def captured_routing(model: nn.Module, *, top_k: int | None = None) -> Iterator[list[list[RouterCall]]]:
    """What the routers return in the forwards inside: `calls[layer][forward]`.

    Logits and weights carry their gradients, also under non-reentrant gradient checkpointing; the recomputation of a
    layer during the backward is not a forward and is not recorded. With `top_k`, `indices` are what the routers would
    choose at that number instead.

    Raises:
        TypeError: no routers, or, in the forward, a router that returns something else.
    """
    routers = routers_of(model)
    calls: list[list[RouterCall]] = [[] for _ in routers]
    handles = [
        router.register_forward_hook(partial(_record, into=into, top_k=top_k))
        for router, into in zip(routers, calls, strict=True)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(router: nn.Module, args: tuple, output: Any, *, into: list[RouterCall], top_k: int | None) -> None:
    if torch._C._current_graph_task_id() != -1:  # inside a backward: checkpointing runs the layer again
        return
    if not isinstance(output, tuple) or len(output) < 3 or not _holds_indices(output[2]):
        raise TypeError(f"{type(router).__name__} does not return (logits, weights, indices).")
    logits, weights, indices = output[:3]
    if top_k is not None and top_k != router.top_k:
        before, router.top_k = router.top_k, top_k
        try:
            with torch.no_grad():
                indices = router.forward(*args)[2]
        finally:
            router.top_k = before
    into.append(RouterCall(logits, weights, indices))


def _holds_indices(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_floating_point()


def parameters_per_expert(model: nn.Module) -> list[int]:
    """Parameters of one routed expert of each layer: what one more active expert costs there. `TypeError` where no
    `experts` lie beside the router."""
    parents = {id(child): module for module in model.modules() for child in module.children()}
    sizes = []
    for router in routers_of(model):
        block = parents[id(router)]
        while not isinstance(getattr(block, "experts", None), nn.Module):  # an adapter may lie between
            if id(block) not in parents:
                raise TypeError(f"{type(router).__name__} of {type(model).__name__} has no `experts` beside it.")
            block = parents[id(block)]
        sizes.append(sum(p.numel() for p in block.experts.parameters()) // router.num_experts)
    return sizes


def num_active_parameters(model: PreTrainedModel, *, include_embeddings: bool = False) -> int:
    """Parameters that one token uses, with the experts in force; embeddings and head only on request."""
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = {id(p) for module in tables if module is not None for p in module.parameters()}
    total = sum(p.numel() for p in model.parameters() if include_embeddings or id(p) not in embeddings)
    per_expert = zip(routers_of(model), parameters_per_expert(model), strict=True)
    return total - sum(size * (router.num_experts - router.top_k) for router, size in per_expert)


class ElasticExperts:
    """Mixin of models: how many experts their tokens use, changed in place."""

    def set_active_experts(self, k: ActiveExperts) -> None:
        """See [`set_active_experts`]."""
        set_active_experts(self, k)

    def active_experts(self, k: ActiveExperts):
        """`with model.active_experts(2): ...`; see [`active_experts`]."""
        return active_experts(self, k)


class ElasticGeneration:
    """Mixin of models that generate: `generate(..., num_active_experts=2)`."""

    def generate(self, *args, num_active_experts: ActiveExperts | None = None, **kwargs):
        """transformers' `generate`, for this call with the active experts given, in any form that
        [`set_active_experts`] takes."""
        if num_active_experts is None:
            return super().generate(*args, **kwargs)
        with active_experts(self, num_active_experts):
            return super().generate(*args, **kwargs)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _configs_with_experts(model: nn.Module) -> list[PreTrainedConfig]:
    """The config that the language model was built from, which keeps the list, and the model's own if that is
    another."""
    config = model.config
    found = [c for c in (config.get_text_config(), config) if hasattr(c, "num_experts_per_tok")]
    if not found:
        raise TypeError(f"{type(config).__name__} has no num_experts_per_tok to keep the active experts in.")
    return found if found[0] is not found[-1] else found[:1]


def _write(config: PreTrainedConfig, largest: int, per_layer: list[int] | None) -> None:
    config.num_experts_per_tok = largest
    if per_layer is not None or hasattr(type(config), PER_LAYER):  # a field of ours
        setattr(config, PER_LAYER, per_layer)
    else:  # a host's config stays as its authors know it
        config.__dict__.pop(PER_LAYER, None)


def _follow_largest(model: nn.Module, largest: int) -> None:
    # Heads of transformers keep a copy, by which their own balance loss counts.
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and _is_count(getattr(module, "num_experts_per_tok", None)):
            module.num_experts_per_tok = largest


__all__ = [
    "ElasticExperts",
    "ElasticGeneration",
    "RouterCall",
    "active_experts",
    "apply_experts_of_config",
    "captured_routing",
    "expert_schedule",
    "experts_in_force",
    "experts_of_config",
    "most_experts",
    "num_active_parameters",
    "parameters_per_expert",
    "put_active_experts",
    "require_active_experts",
    "routers_of",
    "set_active_experts",
]
