# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
r"""Mixture of neuron experts (MoNE, arXiv 2510.05781): inside each active expert, a token uses only the neurons whose
gate is large.

    a = act(W_gate x),  S(x) = the K_N neurons of largest |a|  (of d = intermediate size; ties: the lowest index)
    E(x) = sum_{j in S(x)} a_j (W_up[j] . x) W_down[:, j]

There is nothing to learn besides the weights that every SwiGLU network has, and K_N = d is the plain expert. A hard
choice: a neuron that is left out gets no gradient from this token.

Neuron-level balance (NG-LBL). Its existence and purpose are the paper's; the formula was not seen. For the T tokens of
one expert, m[t,j] in {0,1} whether t uses neuron j:

    f_j = d / (K_N T) * sum_t m[t,j],   P_j = (1/T) sum_t q[t,j],   L = sum_j f_j P_j

`"normalized"` (ours, the default): q = |a_j| / sum_j' |a_j'|, so that L = 1 at uniform use whatever the scale of a.
`"literal"` (as reviews describe the paper's): q = |a_j| m[t,j], which shrinking every gate lowers too. A layer's loss
is the mean over its experts weighted by their tokens, over all ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from .balance import sum_over_ranks


# Backends that pass the gate through `_apply_gate`. The others have one of their own inside a kernel, and would
# silently use every neuron.
BACKENDS = ("eager", "batched_mm", "grouped_mm", "deepgemm", "sigma_neurons")
# Those of them that tell which row belongs to which expert.
RECORDING_BACKENDS = ("eager", "batched_mm", "grouped_mm", "sigma_neurons")
MIN_TOKENS = 8  # below, the use of an expert's neurons says nothing about their balance


def neuron_scores(gate: torch.Tensor, up: torch.Tensor, activated: torch.Tensor, select_on: str) -> torch.Tensor:
    """What ranks the neurons, `(..., d)`, of `gate`, `up` and `activated = act(gate)` of the same shape."""
    if select_on == "abs_act":
        return activated.abs()
    if select_on == "abs_gate":
        return gate.abs()
    if select_on == "act":
        return activated
    if select_on == "abs_product":
        return (activated * up).abs()
    raise ValueError(f"select_on={select_on!r} is not known. Use 'abs_act', 'abs_gate', 'act' or 'abs_product'.")


def top_neurons(scores: torch.Tensor, top_k: int) -> torch.Tensor:
    """Mask `(..., d)` of exactly `top_k` largest `scores`; among equal ones the lowest indices. NaN is kept, however
    many there are: a run that diverges must show it."""
    smallest = scores.topk(top_k, dim=-1).values[..., -1:]
    above = (scores > smallest) | scores.isnan()
    tied = scores == smallest
    vacant = top_k - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= vacant))


class NeuronSums(NamedTuple):
    """Sums over the tokens of each expert of one layer; leading dimensions may be batched over."""

    counts: torch.Tensor  # (experts, d) tokens that use the neuron, no gradient
    mass: torch.Tensor  # (experts, d) sum of q
    tokens: torch.Tensor  # (experts, 1)

    def over_ranks(self) -> "NeuronSums":
        """The sums over all ranks, in one all-reduce; the gradient is this rank's share."""
        widths = [field.shape[-1] for field in self]
        return NeuronSums(*sum_over_ranks(torch.cat(self, dim=-1)).split(widths, dim=-1))


def neuron_sums(
    activated: torch.Tensor,
    keep: torch.Tensor,
    expert_ids: torch.Tensor,
    num_experts: int,
    weight: torch.Tensor | None = None,
    *,
    mode: str = "normalized",
) -> NeuronSums:
    """Sums of rows `activated (rows, d)` with the mask `keep (rows, d)`, each of one expert `expert_ids (rows,)`.

    `weight (rows,)` is 0 on padding. Ids of `num_experts` and more belong to other ranks of expert parallelism.
    """
    magnitude = activated.float().abs()
    if mode == "normalized":
        q = magnitude / (magnitude.sum(dim=-1, keepdim=True) + 1e-20)
    elif mode == "literal":
        q = magnitude * keep
    else:
        raise ValueError(f"mode={mode!r} is not known. Use 'normalized' or 'literal'.")
    here = (expert_ids < num_experts).to(q)
    weight = (here if weight is None else here * weight.to(q)).unsqueeze(-1)
    ids = expert_ids.clamp(max=num_experts - 1)
    empty = q.new_zeros(num_experts, q.shape[-1])
    return NeuronSums(
        counts=empty.index_add(0, ids, keep * weight),
        mass=empty.index_add(0, ids, q * weight),
        tokens=q.new_zeros(num_experts, 1).index_add(0, ids, weight),
    )


def neuron_load_balancing_loss(sums: NeuronSums) -> torch.Tensor:
    """L `()` of one layer; see the module's docstring. Experts with fewer than [`MIN_TOKENS`] tokens are left out; 0
    if all are."""
    f = sums.counts.shape[-1] * sums.counts / sums.counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    losses = (f * sums.mass / sums.tokens.clamp_min(1.0)).sum(dim=-1)
    tokens = sums.tokens.squeeze(-1)
    tokens = tokens * (tokens >= MIN_TOKENS)
    return (losses * tokens).sum() / tokens.sum().clamp_min(1.0)


def mean_neuron_loss(followed: "list[NeuronStatistics]") -> torch.Tensor | None:
    """Mean over the layers that were followed, exact over all ranks; None if none was."""
    sums = [statistics.total() for statistics in followed if statistics.kept]
    if not sums:
        return None
    losses = [neuron_load_balancing_loss(layer.over_ranks()) for layer in sums]
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class NeuronStatistics(nn.Module):
    """Forms the sums of every training forward, and keeps them while someone collects ([`collected_neuron_sums`]).

    It forms them whether or not they are kept, because a layer that is computed anew in the backward pass must do the
    same as the first time.
    """

    def __init__(self, mode: str):
        super().__init__()
        self.mode = mode
        self.padding: torch.Tensor | None = None  # (tokens,) 0 on padding
        self.kept: list[NeuronSums] | None = None

    def forward(
        self, activated: torch.Tensor, keep: torch.Tensor, expert_ids: torch.Tensor, tokens: torch.Tensor, number: int
    ) -> None:
        weight = None if self.padding is None else self.padding[tokens]
        sums = neuron_sums(activated, keep, expert_ids, number, weight, mode=self.mode)
        if self.kept is not None:
            self.kept.append(sums)

    def total(self) -> NeuronSums:
        """What was kept (the eager backend brings each expert by itself)."""
        return NeuronSums(*(sum(field) for field in zip(*self.kept, strict=True)))


class _NeuronSparse:
    """State that experts and dense feed-forward networks share; `neuron_top_k=None` is the plain network."""

    neuron_top_k: int | None = None
    neuron_select_on: str = "abs_act"
    neuron_layer: int = 0
    neuron_statistics: NeuronStatistics | None  # no default: a submodule would stand behind a class attribute

    def choose_neurons(self, config, layer: int) -> None:
        """Keep as many neurons as `config` says for `layer`, and count them if it has a balance loss."""
        self.neuron_layer, self.neuron_select_on = layer, config.neuron_select_on
        top_k = config.neurons_of(layer, self.neuron_width)
        self.neuron_top_k = None if top_k >= self.neuron_width else top_k
        self.neuron_statistics = NeuronStatistics(config.neuron_aux_mode) if config.neuron_aux_loss_coef else None

    @property
    def selects_neurons(self) -> bool:
        """Whether anything is left out."""
        return self.neuron_top_k is not None

    def _sparse_gate(self, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        activated = self.act_fn(gate)
        with torch.no_grad():
            keep = top_neurons(neuron_scores(gate, up, activated, self.neuron_select_on), self.neuron_top_k)
        return torch.where(keep, activated * up, 0.0), activated, keep


class NeuronSparseExperts(_NeuronSparse):
    """Mixin in front of a class of SwiGLU experts of transformers: `class X(NeuronSparseExperts, Qwen3MoeExperts)`."""

    @property
    def neuron_width(self) -> int:
        """Neurons of one expert."""
        return self.intermediate_dim

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        if not self.selects_neurons:
            return super().forward(hidden_states, top_k_index, top_k_weights)
        backend = self.config._experts_implementation
        records = self.training and self.neuron_statistics is not None
        allowed = RECORDING_BACKENDS if records else BACKENDS
        if backend not in allowed:
            raise ValueError(
                f"experts_implementation={backend!r} does not keep the top neurons of an expert"
                f"{' and count them' if records else ''}: it would compute with all of them. Choose one of {allowed}, "
                "or neuron_ratio=1."
            )
        if records and getattr(self, "_is_expert_parallel", False):
            raise ValueError(
                "neuron_aux_loss_coef > 0: under expert parallelism the tokens of an expert come from several ranks, "
                "without their padding, so that its neurons cannot be counted; nor are they behind a router that "
                "leaves experts out. Set it to 0, or train with FSDP."
            )
        if backend == "eager":
            return self._eager_forward(hidden_states, top_k_index, top_k_weights)
        self._rows = self._row_order(top_k_index, backend) if records else None
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)  # (pairs, d)
        if not self.selects_neurons:
            return self.act_fn(gate) * up
        if gate.shape[-1] != self.neuron_width:
            raise ValueError(
                f"{gate.shape[-1]} of an expert's {self.neuron_width} neurons are on this rank: the top ones cannot "
                "be chosen. Tensor parallelism must leave the experts whole: use expert parallelism."
            )
        hidden, activated, keep = self._sparse_gate(gate, up)
        if self._rows is not None:
            self.neuron_statistics(activated, keep, *self._rows, self.num_experts)
        return hidden

    # The experts and the tokens of the rows that `_apply_gate` is about to see.
    _rows: tuple[torch.Tensor, torch.Tensor] | None = None

    @staticmethod
    def _row_order(top_k_index: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        ids, top_k = top_k_index.reshape(-1), top_k_index.shape[-1]
        if backend in ("grouped_mm", "sigma_neurons"):
            ids, order = torch.sort(ids)  # as the backend does while training
            return ids, order // top_k
        return ids, torch.arange(ids.shape[0], device=ids.device) // top_k

    def _eager_forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        # transformers' eager loops form act(gate) * up themselves.
        out = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:  # on another rank
                continue
            tokens, slots = torch.where(top_k_index == expert)
            if self.training and self.neuron_statistics is not None:
                self._rows = (torch.full_like(tokens, expert), tokens)
            else:
                self._rows = None
            neurons = self._apply_gate(F.linear(hidden_states[tokens], self.gate_up_proj[expert]))
            rows = F.linear(neurons, self.down_proj[expert]) * top_k_weights[tokens, slots, None]
            out = out.index_add(0, tokens, rows.to(out.dtype))
        return out


class NeuronSparseMlp(_NeuronSparse):
    """Mixin in front of a dense SwiGLU network of transformers (`gate_proj`, `up_proj`, `down_proj`, `act_fn`), whose
    forward it computes: `(..., hidden)` -> the same."""

    @property
    def neuron_width(self) -> int:
        """Neurons of the network."""
        return self.gate_proj.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.selects_neurons:
            return super().forward(x)
        hidden, activated, keep = self._sparse_gate(self.gate_proj(x), self.up_proj(x))
        if self.training and self.neuron_statistics is not None:
            rows = activated.flatten(0, -2)
            tokens = torch.arange(rows.shape[0], device=rows.device)
            self.neuron_statistics(rows, keep.flatten(0, -2), torch.zeros_like(tokens), tokens, 1)
        return self.down_proj(hidden)


@cache
def neuron_sparse(network: type[nn.Module]) -> type[nn.Module]:
    """The class of experts or of a dense network with the choice of neurons in front, under the same name."""
    mixin = NeuronSparseMlp if not hasattr(network, "_apply_gate") else NeuronSparseExperts
    return type(network.__name__, (mixin, network), {"__module__": network.__module__})


def neuron_networks(model: nn.Module) -> list[nn.Module]:
    """The networks of `model` that choose neurons, or can, in order."""
    return [module for module in model.modules() if isinstance(module, _NeuronSparse)]


@contextmanager
def collected_neuron_sums(model: nn.Module, attention_mask: torch.Tensor | None) -> Iterator[list[NeuronStatistics]]:
    """Keep the neuron sums of the forwards inside. `attention_mask (batch, tokens)` is 0 on padding; one of another
    form does not say which rows are padding."""
    followed = [net.neuron_statistics for net in neuron_networks(model) if net.neuron_statistics is not None]
    padding = attention_mask.reshape(-1) if attention_mask is not None and attention_mask.dim() == 2 else None
    for statistics in followed:
        statistics.kept, statistics.padding = [], padding
    try:
        yield followed
    finally:
        for statistics in followed:
            statistics.kept = None


class ElasticNeurons:
    """Mixin of models: how many neurons their networks use, changed in place."""

    def set_active_neurons(
        self, *, ratio: float | list[float] | None = None, top_k: int | list[int] | None = None
    ) -> None:
        """Keep a share or a number of the neurons of each expert, one for all layers or one per layer; neither: all.

        Takes effect with the next forward; `save_pretrained` writes what is in force. Raises `ValueError` for what the
        config would not take; nothing has changed then.
        """
        # None would be read as MoNE's default when it is loaded.
        self._put_neurons(1.0 if ratio is None and top_k is None else ratio, top_k)

    def _put_neurons(self, ratio: float | list[float] | None, top_k: int | list[int] | None) -> None:
        before = (self.config.neuron_ratio, self.config.neuron_top_k)
        try:
            self.config.neuron_ratio, self.config.neuron_top_k = None, None
            self.config.neuron_ratio, self.config.neuron_top_k = ratio, top_k
            self.config.validate_neurons()
        except Exception as error:
            self.config.neuron_ratio, self.config.neuron_top_k = before
            raise ValueError(f"ratio={ratio} or top_k={top_k} is not possible: {error}") from error
        for network in neuron_networks(self):
            network.choose_neurons(self.config, network.neuron_layer)

    @contextmanager
    def active_neurons(
        self, *, ratio: float | list[float] | None = None, top_k: int | list[int] | None = None
    ) -> Iterator[None]:
        """[`set_active_neurons`] for the forwards inside."""
        before = (self.config.neuron_ratio, self.config.neuron_top_k)
        self.set_active_neurons(ratio=ratio, top_k=top_k)
        try:
            yield
        finally:
            self._put_neurons(*before)


def idle_neuron_parameters(model: nn.Module) -> int:
    """Parameters of the experts and networks in force that a token leaves out: rows of the up and columns of the down
    projection of each neuron. The gate projection is always used whole."""
    idle = 0
    routers = iter(getattr(model, "routers", []))
    for network in neuron_networks(model):
        is_experts = isinstance(network, NeuronSparseExperts)
        uses = next(routers).top_k if is_experts else 1
        if network.selects_neurons:
            hidden = network.hidden_dim if is_experts else network.down_proj.out_features
            idle += uses * 2 * hidden * (network.neuron_width - network.neuron_top_k)
    return idle


def active_expert_share(neuron_top_k: int, intermediate_size: int) -> float:
    """Share of an expert's parameters that a token uses: (1 + 2 r) / 3 with r = K_N / d, because the gate projection
    is always computed whole. The share of neurons, r, is smaller."""
    return (1 + 2 * min(neuron_top_k, intermediate_size) / intermediate_size) / 3


__all__ = [
    "ElasticNeurons",
    "NeuronSparseExperts",
    "NeuronSparseMlp",
    "NeuronSums",
    "active_expert_share",
    "collected_neuron_sums",
    "idle_neuron_parameters",
    "mean_neuron_loss",
    "neuron_load_balancing_loss",
    "neuron_networks",
    "neuron_scores",
    "neuron_sparse",
    "neuron_sums",
    "top_neurons",
]
