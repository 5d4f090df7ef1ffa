# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""`wrap_moe(model)`: the dial of `elastic.py`, and a balance loss that is right for any k, on other people's models.

transformers' own balance loss pools the router logits of all layers and takes one k: with k per layer it counts
experts that were not chosen, and at balance its value is k, so that its weight moves with every draw. Here, per layer
l with its own k_l (`balance.py`):

    loss = cross-entropy + c K / L  sum_l L_l,     L_l = 1 at balance for every k_l

with c the host's `router_aux_loss_coef`, L its layers with experts and K its number of active experts when it was
wrapped: at balance and k = K exactly the weight that the host gives (`convert.py` translates in the same way), and the
same weight at every other k.

With one active expert a host that renormalises weighs it by p / p = 1: the language-model loss then gives its router
no gradient, only the balance loss does. That is the host's own convention and stays the default;
`renorm_k1="softmax_weight"` weighs by p, as Switch does, at the price of another function at k = 1.
"""

from dataclasses import dataclass, fields
from functools import cache, wraps
from inspect import signature
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .balance import load_balancing_loss_of
from .elastic import (
    ElasticExperts,
    ElasticGeneration,
    apply_experts_of_config,
    captured_routing,
    experts_of_config,
    routers_of,
)
from .routing_losses import (
    padding_mask,
    scaled_like_cross_entropy,
    sums_of_layers,
    warn_if_gradients_are_lost,
    warn_if_labels_are_withheld,
)


logger = logging.get_logger(__name__)

KNOWN = {
    "aux_loss_type": ("switch", "global_batch", "sequence"),
    "aux_scoring_func": ("softmax", "sigmoid"),
    "aux_k": ("sampled", "max"),
}
RENORM_K1 = ("host", "softmax_weight")


@dataclass(frozen=True)
class HostRouting:
    """What [`wrap_moe`] was told. `layer_coef` weighs the balance loss of each layer; 0: none."""

    layer_coef: float = 0.0
    aux_loss_type: str = "switch"
    aux_scoring_func: str = "softmax"
    aux_k: str = "sampled"

    def __post_init__(self):
        for field, known in KNOWN.items():
            if getattr(self, field) not in known:
                raise ValueError(f"{field}={getattr(self, field)!r} is not known. Choose one of {known}.")
        if not self.layer_coef >= 0:
            raise ValueError(f"aux_loss_coef makes {self.layer_coef} for each layer, but must not be negative.")


class WrappedMoe(ElasticExperts):
    """Mixin of the class that [`wrap_moe`] gives to an instance; the host's class comes after it."""

    host_class: type[PreTrainedModel]
    host_routing = HostRouting()

    def __reduce_ex__(self, protocol: int):
        # The class is made on the fly, so that pickle and copy have to make it again.
        return _blank, (self.host_class,), self.__dict__

    def _forward_with_routing(self, *args, **kwargs) -> Any:
        """The host's forward, with the balance loss of `host_routing` in place of the host's own."""
        kwargs |= dict(zip(signature(self.host_class.forward).parameters, (self, *args)))
        kwargs.pop("self", None)
        labels, routing = kwargs.get("labels"), self.host_routing
        reported = kwargs.get("output_router_logits")
        if reported is None:
            reported = getattr(self.config, "output_router_logits", False)
        learning = self.training and labels is not None
        if routing.layer_coef:
            warn_if_labels_are_withheld(self.training, labels, kwargs)
        if not reported and not (learning and routing.layer_coef):
            return self.host_class.forward(self, **kwargs)

        return_dict = kwargs.pop("return_dict", None)  # PEFT says None
        as_tuple = not (self.config.return_dict if return_dict is None else return_dict)
        kwargs["output_router_logits"] = False  # the host's loss would be added; ours takes the logits by hooks
        at_most = None
        if learning and routing.aux_k == "max":
            at_most = getattr(self.config, "k_max", None)
            if at_most is None:
                raise ValueError(
                    "aux_k='max' balances the choice at config.k_max, which is not set: MatryoshkaExpertsCallback "
                    "notes it, or set it yourself."
                )
        with captured_routing(self, top_k=at_most) as calls:
            output = self.host_class.forward(self, return_dict=True, **kwargs)
        last = [layer[-1] for layer in calls]
        logits = [call.router_logits for call in last]
        if learning:
            warn_if_gradients_are_lost(routers_of(self), logits)
        table = kwargs.get("input_ids") if kwargs.get("input_ids") is not None else kwargs["inputs_embeds"]
        selected = [call.indices for call in last]
        balance = self._balance(logits, selected, kwargs.get("attention_mask"), table.shape[0], learning)
        if output.loss is not None:
            aux = scaled_like_cross_entropy(routing.layer_coef * balance.sum(), labels, learning, **_trainer_s(kwargs))
            output["loss"] = output.loss + aux.to(output.loss)
        known = {field.name for field in fields(output)}
        if "aux_loss" in known:
            output["aux_loss"] = balance.mean()
        if "router_logits" in known and reported:
            output["router_logits"] = tuple(logits)
        return output.to_tuple() if as_tuple else output

    def _balance(
        self,
        router_logits: list[torch.Tensor],
        selected: list[torch.Tensor],
        attention_mask: torch.Tensor | None,
        batch_size: int,
        learning: bool,
    ) -> torch.Tensor:
        """Balance loss of each layer `(layers,)`, 1 at balance."""
        routing, device = self.host_routing, router_logits[0].device
        logits = [z.to(device) for z in router_logits]  # with device_map, layers live apart
        sums = sums_of_layers(
            logits,
            [s.to(device) for s in selected],
            padding_mask(attention_mask, logits[0]),
            batch_size=batch_size if routing.aux_loss_type == "sequence" else None,
            score_func=routing.aux_scoring_func,
        )
        return load_balancing_loss_of(sums, routing.aux_loss_type, across_ranks=learning)


def wrap_moe(
    model: PreTrainedModel,
    *,
    aux_loss_coef: float | None = None,
    aux_loss_type: str = "switch",
    aux_scoring_func: str = "softmax",
    aux_k: str = "sampled",
    renorm_k1: str | None = None,
) -> PreTrainedModel:
    """Make a mixture-of-experts model of transformers elastic, in place, and return it.

    This instance gets a subclass of its class under the same name: no other model changes, checkpoints stay the
    host's, and `isinstance` holds. It gains `set_active_experts`, `active_experts`, `generate(...,
    num_active_experts=)` and, in training, the balance loss of the module docstring; `outputs.aux_loss` is then the
    mean over layers, 1 at balance. Without a coefficient and with the numbers unchanged, outputs are the host's, bit
    for bit. Numbers per layer that an earlier [`set_active_experts`] left in the config take effect.

    Models of this package are elastic already and come back as they are. A PEFT model is wrapped inside; the folder of
    its adapters has no config, so that the number of experts in force is not saved with them. Pickle and deepcopy
    work, where this package is installed. In training with the balance loss, `torch.compile` breaks the graph at the
    hooks that read the routers.

    Args:
        aux_loss_coef: c; `None`: the host's `router_aux_loss_coef`, if its config says `output_router_logits` (without
            it, the host itself adds no loss), else 0.
        aux_loss_type: `"switch"`, of each rank as the host's own; `"global_batch"` over ranks; or `"sequence"`.
        aux_scoring_func: `"softmax"`, or `"sigmoid"` for routers that score so (DeepSeek-V3).
        aux_k: `"sampled"`, or `"max"`: balance the choice at `config.k_max` instead, which the callback notes there.
        renorm_k1: `"host"` or `"softmax_weight"`; `None`: what the config says, else `"host"`.

    Raises:
        TypeError: no routers.
        ValueError: unknown options, a negative coefficient, numbers in the config that do not fit, `"softmax_weight"`
            for a router that does not score by softmax.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    routers = routers_of(base)
    # By what it can do, not by its class: the same class loaded from a Hub repository is another object.
    if hasattr(base, "set_active_experts") and not isinstance(base, WrappedMoe):
        return model
    if renorm_k1 is None:
        renorm_k1 = getattr(base.config, "renorm_k1", "host")
    if aux_loss_coef is None:
        wanted = getattr(base.config, "output_router_logits", False)
        aux_loss_coef = (getattr(base.config, "router_aux_loss_coef", None) or 0.0) if wanted else 0.0
    per_layer = aux_loss_coef * max(experts_of_config(base)) / len(routers)
    routing = HostRouting(per_layer, aux_loss_type, aux_scoring_func, aux_k)
    _require_renormalisation(routers, renorm_k1)
    apply_experts_of_config(base)
    _set_renormalisation(base, routers, renorm_k1)
    if not isinstance(base, WrappedMoe):
        base.__class__ = _wrapped(type(base))
        if "_old_forward" in vars(base):  # accelerate's dispatch keeps the forward that it replaced
            base._old_forward = MethodType(type(base).forward, base)
    base.host_routing = routing
    return model


@cache
def _wrapped(host: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The elastic subclass of a host's class, under its name."""
    names = {
        "__module__": host.__module__,
        "__qualname__": host.__qualname__,
        "__doc__": host.__doc__,
        "host_class": host,
    }
    if "labels" in signature(host.forward).parameters:

        @wraps(host.forward)  # Trainer reads the names of the arguments
        def forward(self, *args, **kwargs):
            return self._forward_with_routing(*args, **kwargs)

        names["forward"] = forward
    mixins = (WrappedMoe, ElasticGeneration) if host.can_generate() else (WrappedMoe,)
    return type(host.__name__, (*mixins, host), names)


def _blank(host: type[PreTrainedModel]) -> PreTrainedModel:
    wrapped = _wrapped(host)
    return wrapped.__new__(wrapped)


def _trainer_s(kwargs: dict) -> dict:
    return {name: kwargs[name] for name in ("num_items_in_batch", "shift_labels") if name in kwargs}


def _require_renormalisation(routers: list[nn.Module], renorm_k1: str) -> None:
    if renorm_k1 not in RENORM_K1:
        raise ValueError(f"renorm_k1={renorm_k1!r} is not known. Choose one of {RENORM_K1}.")
    for router in routers if renorm_k1 == "softmax_weight" else ():
        if hasattr(router, "e_score_correction_bias") or hasattr(router, "routed_scaling_factor"):
            raise ValueError(
                f"renorm_k1='softmax_weight' is for routers that renormalise a softmax; {type(router).__name__} "
                "scores or scales in another way. Use 'host'."
            )


def _set_renormalisation(base: PreTrainedModel, routers: list[nn.Module], renorm_k1: str) -> None:
    for router in routers:
        for handle, hook in list(router._forward_hooks.items()):
            if hook is _softmax_weight_of_one:
                del router._forward_hooks[handle]
    if renorm_k1 == "host":
        base.config.__dict__.pop("renorm_k1", None)
        return
    for router in routers:
        router.register_forward_hook(_softmax_weight_of_one)
    base.config.renorm_k1 = renorm_k1


def _softmax_weight_of_one(router: nn.Module, args: tuple, output: tuple) -> tuple | None:
    if router.top_k != 1:
        return None
    logits, weights, indices = output[:3]
    return logits, logits.float().softmax(-1).gather(-1, indices).to(weights), indices, *output[3:]


__all__ = ["HostRouting", "WrappedMoe", "wrap_moe"]
