# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Load balance of expert routing: losses, the loss-free bias, and the numbers that say whether balance is real.

Everything here is a pure function of router logits `(..., tokens, num_experts)` and selected experts
`(..., tokens, top_k)` of **one layer**, with an optional mask `(..., tokens)` that is 1 on real tokens and 0 on
padding. Leading dimensions are batched over. Sums come first ([`RoutingSums`]), losses are functions of the sums: that
is what makes "exact across ranks" a single all-reduce of a few numbers per layer.

With N experts, T real tokens, m[t,e] in {0,1} the routing map and P[t,e] the normalised score:

    f_e = sum_t m[t,e] / sum_{t,e} m[t,e]          fraction of assignments, a constant for autograd
    p_e = (1/T) sum_t P[t,e]                       mean router probability
    L   = N * sum_e f_e * p_e                      1 at balance, for every k

Note that L = 1 whenever *either* f or p is uniform, so a low loss is not evidence of balance: look at
[`max_violation`]. Sources: Switch Transformer (arXiv 2101.03961), DeepSeek-V2 (sequence level, arXiv 2405.04434),
global-batch (arXiv 2501.11873), loss-free bias (arXiv 2408.15664), Top-1 loss (Sigma-MoE-Tiny, arXiv 2512.16248).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist


class RoutingSums(NamedTuple):
    """Sums over the real tokens of one layer; every field may carry leading dimensions (layers, sequences)."""

    counts: torch.Tensor  # (..., num_experts) assignments, no gradient
    probs: torch.Tensor  # (..., num_experts) sum of P[t, e]
    selected: torch.Tensor  # (..., 1) sum of P[t, e] over the selected e
    tokens: torch.Tensor  # (..., 1) real tokens

    def over_ranks(self, group: dist.ProcessGroup | None = None) -> "RoutingSums":
        """The sums over all ranks, in one all-reduce; see [`sum_over_ranks`] for the gradient."""
        widths = [field.shape[-1] for field in self]
        return RoutingSums(*sum_over_ranks(torch.cat(self, dim=-1), group).split(widths, dim=-1))


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup | None = None) -> torch.Tensor:
    """The sum over all ranks as value; as gradient only this rank's own part.

    Each rank's gradient is then its share of the gradient of the global value: ranks *add up* to it. A differentiable
    all-reduce would hand every rank the whole gradient, `world_size` times too much. Without a process group:
    `tensor`.
    """
    if not dist.is_available() or not dist.is_initialized():
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total, group=group)
    return tensor + (total - tensor.detach())


def normalized_scores(
    router_logits: torch.Tensor, score_func: str = "softmax", temperature: float = 1.0
) -> torch.Tensor:
    """P `(..., num_experts)`, in fp32 or better, summing to 1: softmax, or sigmoid divided by its sum
    (DeepSeek-V3)."""
    logits = _at_least_fp32(router_logits) / temperature
    if score_func == "softmax":
        return logits.softmax(dim=-1)
    if score_func == "sigmoid":
        scores = logits.sigmoid()
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    raise ValueError(f"score_func={score_func!r} is not known. Use 'softmax' or 'sigmoid'.")


def _at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def expert_counts(selected_experts: torch.Tensor, num_experts: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Assignments per expert `(..., num_experts)` in fp32 of `selected_experts (..., tokens, top_k)`; padding counts
    0, and so do ids from `num_experts` on, of tokens that have fewer than `top_k`."""
    weight = (selected_experts < num_experts).float()
    if mask is not None:
        weight = weight * mask.unsqueeze(-1).to(weight)
    counts = weight.new_zeros(*selected_experts.shape[:-2], num_experts)
    known = selected_experts.clamp(max=num_experts - 1)
    return counts.scatter_add(-1, known.flatten(-2), weight.flatten(-2))


def routing_sums(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    score_func: str = "softmax",
    temperature: float = 1.0,
) -> RoutingSums:
    """Sum what the losses need over real tokens. Shapes as in the module docstring; gradients flow through the
    scores."""
    probs = normalized_scores(router_logits, score_func, temperature)
    if mask is None:
        tokens = probs.new_full((*probs.shape[:-2], 1), probs.shape[-2])
    else:
        probs = probs * mask.unsqueeze(-1).to(probs)
        tokens = mask.to(probs).sum(dim=-1, keepdim=True)
    counts = expert_counts(selected_experts, router_logits.shape[-1], mask).to(probs)
    last = router_logits.shape[-1] - 1
    selected = probs.gather(-1, selected_experts.clamp(max=last)).masked_fill(selected_experts > last, 0.0)
    selected = selected.sum(dim=(-2, -1)).unsqueeze(-1)
    return RoutingSums(counts, probs.sum(dim=-2), selected, tokens)


def _switch(sums: RoutingSums, previous_counts: torch.Tensor | int = 0) -> torch.Tensor:
    counts = (sums.counts + previous_counts).detach()
    f = counts / counts.sum(dim=-1, keepdim=True).clamp_min(1.0)
    p = sums.probs / sums.tokens.clamp_min(1.0)
    return counts.shape[-1] * (f * p).sum(dim=-1)


def _top1(sums: RoutingSums) -> torch.Tensor:
    tokens = sums.tokens.clamp_min(1.0)
    fhat, qbar = sums.probs / tokens, sums.selected / tokens
    return sums.counts.shape[-1] * (fhat.square() / qbar.clamp_min(1e-20)).sum(dim=-1)


def load_balancing_loss_of(
    sums: RoutingSums,
    kind: str,
    *,
    previous_counts: torch.Tensor | int = 0,
    across_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Load-balancing loss `(...)` of sums with leading dimensions `(...)`, or `(..., sequences)` for
    `kind="sequence"`.

    Its value is that of all ranks together, weighted by tokens (by sequences for `"sequence"`); its gradient is this
    rank's share. `"switch"` forms f and p on each rank by itself, as it was defined. `"none"` gives zeros.
    """
    group_sum = (lambda t: sum_over_ranks(t, group)) if across_ranks else (lambda t: t)
    if kind == "none":
        return torch.zeros_like(sums.tokens.squeeze(-1))
    if kind == "switch":
        share = (sums.tokens / group_sum(sums.tokens).clamp_min(1.0)).squeeze(-1)
        return group_sum(_switch(sums) * share)
    if kind == "sequence":
        present = (sums.tokens > 0).to(sums.probs).squeeze(-1)  # (..., sequences)
        number = group_sum(present.sum(dim=-1)).clamp_min(1.0)
        return group_sum((_switch(sums) * present).sum(dim=-1)) / number
    if across_ranks:
        sums = sums.over_ranks(group)
    if kind == "global_batch":
        return _switch(sums, previous_counts)
    if kind == "top1":
        return _top1(sums)
    raise ValueError(f"kind={kind!r} is not known. Use 'none', 'switch', 'sequence', 'global_batch' or 'top1'.")


def switch_load_balancing_loss(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    score_func: str = "softmax",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Conventional load-balancing loss of one layer per micro-batch and rank (Switch Transformer eq. 4-6); 1 at
    balance."""
    sums = routing_sums(router_logits, selected_experts, mask, score_func=score_func)
    return load_balancing_loss_of(sums, "switch", group=group)


def sequence_load_balancing_loss(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    score_func: str = "softmax",
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """The same per sequence, then the mean over the non-empty sequences of all ranks (DeepSeek-V2 eq. 12-14).

    `router_logits (batch, tokens, num_experts)`, `selected_experts (batch, tokens, top_k)`, `mask (batch, tokens)`.
    """
    sums = routing_sums(router_logits, selected_experts, mask, score_func=score_func)
    return load_balancing_loss_of(sums, "sequence", group=group)


def global_batch_load_balancing_loss(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    score_func: str = "softmax",
    previous_counts: torch.Tensor | int = 0,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """N * sum f_e p_e with f and p over the tokens of all ranks (arXiv 2501.11873), token-weighted under padding.

    `previous_counts (num_experts)` are the all-rank counts of earlier micro-batches of the same optimizer step: f then
    covers the step so far. That running f is not the f of one big batch, because the first micro-batches cannot know
    the last.
    """
    sums = routing_sums(router_logits, selected_experts, mask, score_func=score_func)
    return load_balancing_loss_of(sums, "global_batch", previous_counts=previous_counts, group=group)


def top1_load_balancing_loss(
    router_logits: torch.Tensor,
    selected_experts: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    temperature: float = 0.1,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Top-1 load-balancing loss (Sigma-MoE-Tiny): a soft count in place of the constant f, over the tokens of all
    ranks.

        q = softmax(z / tau);  fhat_e = mean_t q[t,e];  qbar = mean_t q[t, e*(t)];  L = N * sum_e fhat_e^2 / qbar

    1 for balanced one-hot routing, N if all tokens sit on one expert *or* the router is undecided: no shortcut through
    a flat router. Meant for k = 1; with more, qbar sums the selected probabilities as in the authors' code.
    """
    sums = routing_sums(router_logits, selected_experts, mask, temperature=temperature)
    return load_balancing_loss_of(sums, "top1", group=group)


def router_z_loss(
    router_logits: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    across_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Mean over the real tokens of all ranks of logsumexp(z)^2 (ST-MoE eq. 5): keeps logits small; it also flattens
    P."""
    squared = _at_least_fp32(router_logits).logsumexp(dim=-1).square()
    return mean_over_tokens(squared, mask, across_ranks=across_ranks, group=group)


def mean_over_tokens(
    values: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    across_ranks: bool = True,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Mean of `values (tokens,)` over the real tokens, 1 in `mask (tokens,)`, of all ranks or of this one; 0 of none.
    Its gradient is that of the sum over ranks, as for every auxiliary loss here."""
    weight = torch.ones_like(values) if mask is None else mask.to(values)
    total = torch.stack(((values * weight).sum(), weight.sum()))
    total = sum_over_ranks(total, group) if across_ranks else total
    return total[0] / total[1].clamp_min(1.0)


def updated_expert_bias(
    bias: torch.Tensor, counts: torch.Tensor, *, rate: float = 1e-3, cap: float | None = None
) -> torch.Tensor:
    """b_e + rate * sign(mean count - count_e) (DeepSeek-V3's loss-free balancing); `bias`, `counts`: `(...,
    num_experts)`.

    `counts` are those of the whole optimizer step, summed over ranks. `cap` bounds |b_e|: with sigmoid scores in (0,
    1) a bias spread above 1 makes routing independent of the token. No counts, no change.
    """
    step = rate * torch.sign(counts.mean(dim=-1, keepdim=True) - counts)
    bias = bias + step.to(bias)
    return bias if cap is None else bias.clamp(-cap, cap)


def relative_deviation(counts: torch.Tensor) -> torch.Tensor:
    """d_e = count_e / mean - 1 `(..., num_experts)`, from -1 (never used) to N - 1 (takes all); 0 is balance."""
    mean = counts.mean(dim=-1, keepdim=True)
    return torch.where(
        mean > 0, counts / mean.clamp_min(torch.finfo(torch.float32).tiny) - 1, torch.zeros_like(counts)
    )


def max_violation(counts: torch.Tensor) -> torch.Tensor:
    """MaxVio `(...)`: the largest relative deviation, as a fraction (arXiv 2408.15664)."""
    return relative_deviation(counts).amax(dim=-1)


def starved_experts(counts: torch.Tensor, *, threshold: float = 0.1) -> torch.Tensor:
    """Number of experts `(...)` with fewer than `threshold` times the mean count."""
    return (relative_deviation(counts) < threshold - 1).sum(dim=-1)


class RoutingWindow:
    """What the routers of a model did since the last reset: sums per layer, kept by the model, read by callbacks.

    Not a module and holds no buffers: DDP would overwrite every rank's counts with those of rank 0. `managed` is set
    by whoever takes over resetting it once per optimizer step (`trainers.callbacks.ExpertBalanceCallback`); until then
    each training forward starts afresh, so that counts of old steps never leak into a loss.
    """

    FIELDS = ("tokens", "entropy", "logit", "logit_squared")

    def __init__(self) -> None:
        self.managed = False
        self.reset()

    def reset(self) -> None:
        """Forget everything; call it at the beginning of an optimizer step."""
        self.counts_of_all_ranks: torch.Tensor | int = 0  # (layers, num_experts), feeds the running f
        self._local: torch.Tensor | None = None  # (layers, 2 * num_experts + 4), float64

    @torch.no_grad()
    def add(self, router_logits: list[torch.Tensor], selected: list[torch.Tensor], mask: torch.Tensor | None) -> None:
        """Add one micro-batch: per layer logits `(tokens, num_experts)` and selection `(tokens, top_k)`; mask
        `(tokens,)`."""
        rows = []
        for logits, chosen in zip(router_logits, selected, strict=True):
            logits = logits.float()
            weight = logits.new_ones(logits.shape[0]) if mask is None else mask.to(logits)
            log_probs = logits.log_softmax(dim=-1)
            probs = log_probs.exp()
            per_token = torch.stack(
                (torch.ones_like(weight), -(probs * log_probs).sum(-1), logits.mean(-1), logits.square().mean(-1)),
                dim=-1,
            )
            counts = expert_counts(chosen, logits.shape[-1], mask)
            # Not a matrix product: autocast would form it, and round 1001 tokens to 1000, in bf16.
            weight = weight.unsqueeze(-1)
            rows.append(torch.cat((counts, (weight * probs).sum(0), (weight * per_token).sum(0))))
        total = torch.stack(rows)
        if total.device.type != "mps":  # the one device without float64; elsewhere counts stay exact in any window
            total = total.double()
        self._local = total if self._local is None else self._local + total

    def summary(self, group: dist.ProcessGroup | None = None) -> dict[str, torch.Tensor] | None:
        """Global numbers per layer on the CPU, or None if nothing was routed. Collective: call it on every rank.

        Keys: `counts`, `f`, `p` `(layers, num_experts)`; `tokens`, `entropy` (nats), `logit_std`, `max_deviation`,
        `min_deviation`, `max_violation`, `starved_experts`, `load_balancing_loss` (conventional, softmax) `(layers,)`.
        """
        if self._local is None:
            return None
        total = sum_over_ranks(self._local, group).cpu()
        num_experts = (total.shape[-1] - len(self.FIELDS)) // 2
        counts, probs, scalars = total.split((num_experts, num_experts, len(self.FIELDS)), dim=-1)
        tokens, entropy, logit, logit_squared = scalars.unbind(-1)
        mean = tokens.clamp_min(1.0)
        f = counts / counts.sum(-1, keepdim=True).clamp_min(1.0)
        p = probs / mean.unsqueeze(-1)
        deviation = relative_deviation(counts)
        return {
            "counts": counts,
            "f": f,
            "p": p,
            "tokens": tokens,
            "entropy": entropy / mean,
            "logit_std": (logit_squared / mean - (logit / mean).square()).clamp_min(0).sqrt(),
            "max_deviation": deviation.amax(-1),
            "min_deviation": deviation.amin(-1),
            "max_violation": max_violation(counts),
            "starved_experts": starved_experts(counts),
            "load_balancing_loss": num_experts * (f * p).sum(-1),
        }
