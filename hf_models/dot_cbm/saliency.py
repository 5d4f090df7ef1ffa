"""Which patches belong to the object: forms of the saliency, none of which is reliable for every backbone.

DINOv2's CLS and patch tokens are not trained to agree, and on some backbones the similarity is inverted; measure the
foreground AUC of a form before trusting the prior that is made of it.
"""

import torch
from torch.nn import functional as F


def patch_saliency(
    kind: str,
    patches: torch.Tensor,
    global_token: torch.Tensor,
    *,
    grid: tuple[int, int],
    cls_attention: torch.Tensor | None = None,
) -> torch.Tensor:
    """Saliency `(batch, N)`, fp32 (float64 of float64), without gradient, of `patches (batch, N, D)` and
    `global_token (batch, D)` as the backbone gives them.

    Args:
        kind: `"cls_dot"`, g . p (Eq. 4); `"cls_cosine"`; `"cls_attention"`, what the last layer's CLS token attends
            to, mean over heads, passed as `cls_attention (batch, N)`; `"contrast"`, the distance from the image's
            median patch; `"pca"`, the first principal component, signed so that the border of the image is low;
            `"uniform"`, 1 everywhere.
        grid: rows and columns of patches; `"pca"` needs to know where the border is.
    """
    dtype = torch.promote_types(patches.dtype, torch.float32)
    patches, global_token = patches.detach().to(dtype), global_token.detach().to(dtype)
    if kind == "uniform":
        return patches.new_ones(patches.shape[:2])
    if kind == "cls_attention":
        if cls_attention is None:
            raise ValueError(
                "saliency='cls_attention' needs the attention of the last layer: pass pixel_values, or patch_features "
                "with the attention as their third entry, as `extract_features` returns them."
            )
        return cls_attention.detach().to(dtype)
    if kind == "cls_dot":
        return (patches @ global_token.unsqueeze(-1)).squeeze(-1)
    if kind == "cls_cosine":
        return (F.normalize(patches, dim=-1) @ F.normalize(global_token, dim=-1).unsqueeze(-1)).squeeze(-1)
    if kind == "contrast":
        return (patches - patches.median(dim=1, keepdim=True).values).norm(dim=-1)
    if kind == "pca":
        return first_component(patches, grid)
    raise ValueError(f"{kind!r} is no saliency that can be computed from patches.")


def first_component(patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Coordinates `(batch, N)` of `patches (batch, N, D)` along their direction of largest variance; its sign makes
    the patches at the border of the grid lower, on average, than those inside."""
    centred = patches - patches.mean(dim=1, keepdim=True)
    if patches.shape[1] <= patches.shape[2]:
        values, vectors = torch.linalg.eigh(centred @ centred.mT)  # (batch, N, N)
        scores = vectors[..., -1] * values[..., -1:].clamp_min(0.0).sqrt()
    else:
        _, vectors = torch.linalg.eigh(centred.mT @ centred)  # (batch, D, D)
        scores = (centred @ vectors[..., -1:]).squeeze(-1)
    border = border_of(grid, patches.device)
    if border.all():
        return scores
    outside, within = scores[:, border].mean(-1, keepdim=True), scores[:, ~border].mean(-1, keepdim=True)
    return torch.where(outside > within, -scores, scores)


def border_of(grid: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """The patches in the first and last row and column, bool, `(N,)`."""
    border = torch.ones(grid, dtype=torch.bool, device=device)
    border[1:-1, 1:-1] = False
    return border.flatten()


def mask_coverage(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Share of each patch, `(batch, N)` in 0..1, that a mask covers: `(batch, H, W)` in pixels, or `(batch, N)`
    already."""
    rows, columns = grid
    if mask.ndim == 2 and mask.shape[1] == rows * columns:
        return mask.float()
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3:
        raise ValueError(
            f"foreground_mask has shape {tuple(mask.shape)}; it must be (batch, height, width), or (batch, "
            f"{rows * columns}) for the {rows} x {columns} patches."
        )
    return F.adaptive_avg_pool2d(mask.float().unsqueeze(1), grid).flatten(1)


__all__ = ["border_of", "first_component", "mask_coverage", "patch_saliency"]
