"""From a transport plan, or from cosines, to one score a concept."""

import torch


def concept_scores(
    readout: str,
    cosine: torch.Tensor,
    plan: torch.Tensor | None = None,
    *,
    topk: int = 8,
    patch_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Scores `(batch, M)` of `cosine (batch, N, M)` and a `plan` of the same shape, with cost d = 1 - cosine.

    `"conditional"`, 1 - sum_i (q_ij / sum_i q_ij) d_ij; `"topk"`, the same over the k patches with most mass in the
    column; `"peak"`, max_i (q_ij / max_i q_ij) (1 - d_ij); `"literal"`, 1 - min_i q_ij d_ij (Eq. 11-12), which is 1
    for whatever it is given: q sums to 1 over all entries, and q d is least at the patch that matches worst. `"dot"`
    and `"mean"` need no plan: the largest and the mean cosine over the patches inside `patch_mask (batch, N)`, bool.
    """
    if readout == "dot":
        return masked(cosine, patch_mask, float("-inf")).amax(1)
    if readout == "mean":
        if patch_mask is None:
            return cosine.mean(1)
        count = patch_mask.sum(1, keepdim=True).to(cosine.dtype)
        return masked(cosine, patch_mask, 0.0).sum(1) / count
    tiny = torch.finfo(plan.dtype).tiny
    if readout == "literal":
        return 1.0 - masked(plan * (1.0 - cosine), patch_mask, float("inf")).amin(1)
    if readout == "peak":
        share = plan / plan.amax(1, keepdim=True).clamp_min(tiny)
        return masked(share * cosine, patch_mask, float("-inf")).amax(1)
    if readout == "topk":
        plan, patches = plan.topk(min(topk, plan.shape[1]), dim=1)
        cosine = cosine.gather(1, patches)
    elif readout != "conditional":
        raise ValueError(f"{readout!r} is no readout of patches.")
    return (plan / plan.sum(1, keepdim=True).clamp_min(tiny) * cosine).sum(1)


def patch_shares(cosine: torch.Tensor, *, eps: float = 0.1, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
    """`softmax_i(cosine / eps)`, `(batch, N, M)`: what the columns of a plan would be, up to their mass, if patches
    had no marginal for concepts to compete for. The map of read-outs without transport, as sharp as a plan's."""
    return masked(cosine / eps, patch_mask, float("-inf")).softmax(1)


def masked(values: torch.Tensor, patch_mask: torch.Tensor | None, fill: float) -> torch.Tensor:
    """`values (batch, N, M)` with `fill` at the patches outside of the mask."""
    return values if patch_mask is None else values.masked_fill(~patch_mask.unsqueeze(-1), fill)


__all__ = ["concept_scores", "patch_shares"]
