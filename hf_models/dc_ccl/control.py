"""Distillation of the control model, and how far it is from what it stands for. Pure functions."""

import torch
from torch.nn import functional as F


def control_loss(control_logits: torch.Tensor, cloud_logits: torch.Tensor, kind: str = "mse") -> torch.Tensor:
    r"""What the control model G is distilled by, of logits `(batch, classes)`: a mean over examples, and over classes
    for the MSEs.

    `"mse"`: \\(\overline{(G - F)^2}\\) on raw logits: they are added later, so their values count and not only their
    softmax. `"centered_mse"`: the same of logits without their mean over classes. `"kl"`: KL(softmax F || softmax G).

    Raises:
        ValueError: an unknown `kind`.
    """
    control, cloud = control_logits.float(), cloud_logits.detach().float()
    if kind == "mse":
        return F.mse_loss(control, cloud)
    if kind == "centered_mse":
        return F.mse_loss(control - control.mean(-1, keepdim=True), cloud - cloud.mean(-1, keepdim=True))
    if kind == "kl":
        own, other = control.log_softmax(-1).flatten(0, -2), cloud.log_softmax(-1).flatten(0, -2)
        return F.kl_div(own, other, reduction="batchmean", log_target=True)
    raise ValueError(f"control_loss={kind!r} is not known. Choose mse, centered_mse or kl.")


def control_gap(control_logits: torch.Tensor, cloud_logits: torch.Tensor) -> torch.Tensor:
    r"""Mean \\(\lVert F_c - G \rVert_2\\) over examples, a scalar, of logits `(batch, classes)`.

    With p = softmax(F_c + F_s) and q = softmax(G + F_s), the gradient of the cross-entropy in the co-submodel's logits
    is off by \\(\lVert p - q \rVert \le \tfrac12 \lVert F_c - G \rVert\\), as softmax is 1/2-Lipschitz: half of this
    number bounds the mean error of the controlled gradient.
    """
    return (cloud_logits - control_logits).float().norm(dim=-1).mean()


__all__ = ["control_gap", "control_loss"]
