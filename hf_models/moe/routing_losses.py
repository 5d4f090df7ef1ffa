# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""What a language-model head adds to its loss for the sake of its routers, scaled as trainers expect it."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from transformers.utils import logging
from transformers.utils.output_capturing import maybe_install_capturing_hooks

from .balance import (
    RoutingSums,
    load_balancing_loss_of,
    router_z_loss,
    routing_sums,
    sum_over_ranks,
    updated_expert_bias,
)


logger = logging.get_logger(__name__)


def padding_mask(attention_mask: torch.Tensor | None, router_logits: torch.Tensor) -> torch.Tensor | None:
    """The mask `(tokens,)` over the rows of `router_logits (tokens, experts)`, if `attention_mask` says which are
    padding: a 4-D mask, or one that also covers cached tokens, does not."""
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.numel() != router_logits.shape[0]:
        return None
    return attention_mask.reshape(-1).to(router_logits.device)


def sums_of_layers(
    router_logits: list[torch.Tensor],
    selected_experts: list[torch.Tensor],
    mask: torch.Tensor | None,
    *,
    batch_size: int | None = None,
    score_func: str = "softmax",
    temperature: float = 1.0,
) -> RoutingSums:
    """Sums `(layers, ...)`, or `(layers, batch, ...)` with `batch_size`, of per-layer logits `(tokens, experts)` and
    choices `(tokens, k of the layer)`."""
    shape = (-1,) if batch_size is None else (batch_size, -1)
    sums = [
        routing_sums(
            z.view(*shape, z.shape[-1]),
            s.view(*shape, s.shape[-1]),
            mask.view(shape) if mask is not None else None,
            score_func=score_func,
            temperature=temperature,
        )
        for z, s in zip(router_logits, selected_experts, strict=True)
    ]
    return RoutingSums(*(torch.stack(field) for field in zip(*sums, strict=True)))


def scaled_like_cross_entropy(
    aux: torch.Tensor,
    labels: torch.Tensor,
    learning: bool,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    **_,
) -> torch.Tensor:
    """Give an auxiliary loss the weight that the cross-entropy of this micro-batch gets, whatever the trainer does to
    it.

    DDP averages gradients that ought to be added: hence `world`. A Trainer that hands over `num_items_in_batch`, the
    labels of all micro-batches and ranks of the step, multiplies by `world` itself and expects each micro-batch to
    bring its share.
    """
    world = dist.get_world_size() if learning and dist.is_available() and dist.is_initialized() else 1
    aux = aux.detach() + world * (aux - aux.detach())
    if num_items_in_batch is None:
        return aux
    targets = labels[..., 1:] if shift_labels is None else shift_labels
    items = targets.ne(-100).sum().to(aux)
    items = sum_over_ranks(items) if learning else items
    return aux * (items / world / num_items_in_batch)


def warn_if_gradients_are_lost(routers: Iterable[nn.Module], router_logits: Iterable[torch.Tensor]) -> None:
    """Say once that reentrant checkpointing keeps the balance losses from the routers."""
    lost = any(r.weight.requires_grad and not z.requires_grad for r, z in zip(routers, router_logits))
    if lost and torch.is_grad_enabled():
        logger.warning_once(
            "The router logits carry no gradient, so the balance losses do not train the routers: reentrant "
            "gradient checkpointing runs the layers without a graph. Use "
            "gradient_checkpointing_kwargs={'use_reentrant': False}, the default."
        )


def warn_if_labels_are_withheld(training: bool, labels: torch.Tensor | None, kwargs: dict) -> None:
    """Say once that a trainer which computes the loss itself leaves out the balance losses."""
    if training and labels is None and "num_items_in_batch" in kwargs:
        logger.warning_once(
            "Training without labels in the forward (label_smoothing_factor, compute_loss_func): the balance "
            "losses are not in the loss and the routing statistics stay empty. Add them yourself, or let the "
            "model see the labels."
        )


class RoutingLossMixin:
    """Balance and z-loss of a causal language model with `routers`, `config` and a `routing_window`."""

    def train(self, mode: bool = True):
        # Training records the router logits. transformers would install what records them in the first forward, under
        # a lock, which breaks the graph of a model that is compiled before it has run.
        if mode:
            maybe_install_capturing_hooks(self.base_model)
        return super().train(mode)

    def _routing_losses(
        self,
        router_logits: tuple[torch.Tensor, ...],
        selected: tuple[torch.Tensor, ...] | None,
        attention_mask: torch.Tensor | None,
        batch_size: int,
        learning: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Load-balancing loss of each layer `(layers,)`, the z-loss summed over layers `()` and the routers' own loss
        `()`, from the logits and the chosen experts (None: ask the routers) of each layer.

        While learning all are exact over all ranks; an evaluation on one rank must not wait for the others.
        """
        config, kind = self.config, self.config.router_aux_loss_type
        device = router_logits[0].device
        if learning:
            warn_if_gradients_are_lost(self.routers, router_logits)
        if selected is None:
            selected = self._select(router_logits)
        selected = [s.to(device) for s in selected]  # with device_map, layers live apart
        logits = [z.to(device) for z in router_logits]
        mask = padding_mask(attention_mask, logits[0])
        balanced = selected
        if learning and config.aux_k == "max":  # also the ranks that a small draw leaves out
            balanced = [s.to(device) for s in self._select(router_logits, config.k_range[1])]
        sums = sums_of_layers(
            logits,
            balanced,
            mask,
            batch_size=batch_size if kind == "sequence" else None,
            score_func="softmax" if kind == "top1" else config.aux_scoring_func,
            temperature=config.top1_lbl_temperature if kind == "top1" else 1.0,
        )
        if learning:
            self._follow_routing(logits, selected, mask)
        previous = self.routing_window.counts_of_all_ranks if learning else 0
        balance = load_balancing_loss_of(sums, kind, previous_counts=previous, across_ranks=learning)
        if learning and kind == "global_batch":
            self.routing_window.counts_of_all_ranks = previous + sum_over_ranks(sums.counts.detach())
        z_loss = torch.zeros((), device=device)
        if config.router_z_loss_coef:
            z_loss = torch.stack([router_z_loss(z, mask, across_ranks=learning) for z in logits]).sum()
        return balance, z_loss, self.own_router_loss(logits, mask, learning)

    def own_router_loss(
        self, router_logits: list[torch.Tensor], mask: torch.Tensor | None, learning: bool
    ) -> torch.Tensor:
        """What a sister family adds to the loss for its routers, weighed already; a scalar, here 0.

        `router_logits`: `(tokens, experts)` of each layer; `mask (tokens,)`: 0 for padding; `learning`: whether all
        ranks take part, as [`mean_over_tokens`] wants to know in `across_ranks`."""
        return torch.zeros((), device=router_logits[0].device)

    def _select(self, router_logits: tuple[torch.Tensor, ...], top_k: int | None = None) -> list[torch.Tensor]:
        return [r.select(r.scores(z.detach()), top_k) for r, z in zip(self.routers, router_logits, strict=True)]

    def _follow_routing(
        self, logits: list[torch.Tensor], selected: list[torch.Tensor], mask: torch.Tensor | None
    ) -> None:
        if not self.routing_window.managed:
            self.routing_window.reset()
            if self.config.expert_bias_update_rate:
                logger.warning_once(
                    "expert_bias_update_rate > 0, but nothing applies it: add "
                    "trainers.callbacks.ExpertBalanceCallback, or call "
                    "model.update_expert_bias() after each optimizer step."
                )
        self.routing_window.add(logits, selected, mask)

    def _scaled_like_cross_entropy(self, aux: torch.Tensor, labels: torch.Tensor, learning: bool, **kwargs):
        return scaled_like_cross_entropy(aux, labels, learning, **kwargs)

    @torch.no_grad()
    def update_expert_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """Apply the loss-free bias update from the routing since the last reset; once per optimizer step, on every
        rank."""
        summary = self.routing_window.summary(group)
        if summary is None or not self.config.expert_bias_update_rate:
            return
        rate, cap = self.config.expert_bias_update_rate, self.config.expert_bias_cap
        for router, counts in zip(self.routers, summary["counts"], strict=True):
            bias = router.e_score_correction_bias
            bias.copy_(updated_expert_bias(bias, counts.to(bias.device), rate=rate, cap=cap))

    def _warn_if_labels_are_withheld(self, labels: torch.Tensor | None, kwargs: dict) -> None:
        warn_if_labels_are_withheld(self.training, labels, kwargs)
