"""How much mass each patch (theta) and each concept (gamma) has in the transport."""

import torch


def patch_marginal(
    saliency: torch.Tensor,
    *,
    temperature: float = 1.0,
    floor: float = 1e-6,
    patch_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """theta `(batch, N)` = softmax(z(S) / temperature) of a saliency of that shape; rows sum to 1.

    z standardises each image, so that theta does not see shifts and scales of the saliency: the softmax of raw dot
    products is one patch. Patches outside `patch_mask` (bool, `(batch, N)`) have no mass and do not count in z; an
    image without any patch inside is treated as if it had all. A constant saliency gives the uniform marginal.
    """
    inside = inside_of(saliency, patch_mask)
    count = inside.sum(-1, keepdim=True)
    mean = saliency.masked_fill(~inside, 0.0).sum(-1, keepdim=True) / count
    centred = (saliency - mean).masked_fill(~inside, 0.0)
    # Rounding of a constant saliency must not be blown up to unit variance.
    noise = torch.finfo(saliency.dtype).eps * 8 * saliency.abs().amax(-1, keepdim=True)
    deviation = (centred.pow(2).sum(-1, keepdim=True) / count).sqrt()
    z = torch.where(deviation > noise, centred / deviation.clamp_min(torch.finfo(saliency.dtype).tiny), 0.0)
    theta = (z / temperature).masked_fill(~inside, float("-inf")).softmax(-1)
    return floored(theta, floor, inside)


def mask_marginal(
    coverage: torch.Tensor, *, floor: float = 1e-6, patch_mask: torch.Tensor | None = None
) -> torch.Tensor:
    """theta `(batch, N)` proportional to the share of each patch that a mask covers; uniform where it covers none."""
    inside = inside_of(coverage, patch_mask)
    coverage = coverage.clamp_min(0.0).masked_fill(~inside, 0.0)
    empty = coverage.sum(-1, keepdim=True) == 0
    coverage = torch.where(empty, inside.to(coverage.dtype), coverage)
    return floored(coverage / coverage.sum(-1, keepdim=True), floor, inside)


def inside_of(saliency: torch.Tensor, patch_mask: torch.Tensor | None) -> torch.Tensor:
    """The patches that take part, bool, of the saliency's shape."""
    if patch_mask is None:
        return torch.ones_like(saliency, dtype=torch.bool)
    inside = patch_mask.to(device=saliency.device, dtype=torch.bool).expand(saliency.shape)
    return inside | ~inside.any(-1, keepdim=True)


def floored(marginal: torch.Tensor, floor: float, inside: torch.Tensor | None = None) -> torch.Tensor:
    """`marginal (..., N)`, at least `floor` before everything is normalised again; nothing outside of `inside`, bool
    of the same shape."""
    marginal = marginal.clamp_min(floor)
    if inside is not None:
        marginal = marginal.masked_fill(~inside, 0.0)
    return marginal / marginal.sum(-1, keepdim=True)


def cooccurrence(class_concepts: torch.Tensor) -> torch.Tensor:
    """r `(M,)` of a class-concept matrix `(K, M)`, Eq. 17: with how many concepts, itself included, a concept shares
    its classes, in fp64. 0 for a concept that no class has, where the paper divides by 0."""
    matrix = class_concepts.to(torch.float64)
    together = matrix.T @ matrix  # (M, M)
    classes = matrix.sum(0)
    return together.sum(1) / classes.clamp_min(torch.finfo(torch.float64).tiny) * (classes > 0)


def concept_marginal(
    class_concepts: torch.Tensor | None,
    num_concepts: int,
    *,
    prior: str = "cooccurrence",
    temperature: float = 1.0,
    floor: float = 1e-6,
) -> torch.Tensor:
    """gamma `(M,)`, fp32, sums to 1: what share of the image's mass a concept receives.

    Args:
        class_concepts: `(K, M)`, which class has which concept (0 or 1, or shares). `None`: uniform.
        prior: `"uniform"`; `"paper"`, (1 - softmax(r)) / (M - 1), of which the paper prints the part before the
            division; `"cooccurrence"`, softmax((1 - r/M) / temperature) over the concepts that some class has.
        floor: least mass, before everything is normalised again; all that a concept of no class has.
    """
    uniform = torch.full((num_concepts,), 1.0 / num_concepts, dtype=torch.float64)
    if class_concepts is None or prior == "uniform" or num_concepts == 1:
        return uniform.float()
    if class_concepts.ndim != 2 or class_concepts.shape[1] != num_concepts:
        raise ValueError(
            f"the class-concept matrix has shape {tuple(class_concepts.shape)}; it must be (classes, {num_concepts})."
        )
    class_concepts = class_concepts.detach().cpu()
    ratio, alive = cooccurrence(class_concepts), class_concepts.sum(0) > 0
    if prior == "paper":
        gamma = (1.0 - ratio.softmax(0)) / (num_concepts - 1)
    elif alive.any():
        scores = (1.0 - ratio / num_concepts) / temperature
        gamma = scores.masked_fill(~alive, float("-inf")).softmax(0)
    else:
        gamma = uniform
    return floored(gamma, floor).float()


__all__ = ["concept_marginal", "cooccurrence", "floored", "inside_of", "mask_marginal", "patch_marginal"]
