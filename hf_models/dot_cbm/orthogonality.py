"""The disentangling losses: patches of the object, and concepts, are to point in different directions."""

import torch


def orthogonality_loss(
    unit: torch.Tensor, weights: torch.Tensor | None = None, *, form: str = "signed"
) -> torch.Tensor:
    r"""Mean over the pairs i != j of w_i w_j f(u_i . u_j), a scalar over all leading dimensions.

    `"signed"`, f(c) = c, as printed (Eq. 5-7), by

        sum_{i != j} w_i w_j u_i . u_j = || sum_i w_i u_i ||^2 - sum_i w_i^2,

    which costs O(N d). Its minimum are antipodes, not orthogonal vectors. `"squared"`, f(c) = c^2, by the smaller of
    the two Gram matrices.

    Args:
        unit: `(..., N, d)`, of length 1.
        weights: `(..., N)`; they get no gradient, or shrinking them would lower the loss. `None`: 1.
    """
    count = unit.shape[-2]
    if count < 2:
        return unit.sum() * 0.0
    if weights is None:
        weights = unit.new_ones(unit.shape[:-1])
    weights = weights.detach().to(unit.dtype)
    weighted = weights.unsqueeze(-1) * unit  # (..., N, d)
    if form == "signed":
        total = weighted.sum(-2).pow(2).sum(-1)
    else:
        root = weights.clamp_min(0.0).sqrt().unsqueeze(-1) * unit
        gram = root @ root.mT if count <= unit.shape[-1] else root.mT @ root
        total = gram.pow(2).sum((-2, -1))
    return ((total - weights.pow(2).sum(-1)) / (count * (count - 1))).mean()


def saliency_weights(theta: torch.Tensor) -> torch.Tensor:
    """Weights in 0..1 with maximum 1 in each image, of the patch marginal `(batch, N)`.

    The saliency itself may be negative, and a negative weight would reward similarity.
    """
    return (theta / theta.amax(-1, keepdim=True)).detach()


__all__ = ["orthogonality_loss", "saliency_weights"]
