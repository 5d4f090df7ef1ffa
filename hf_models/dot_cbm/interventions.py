"""Putting known concepts in the place of predicted ones."""

from collections.abc import Iterable

import torch

from .configuration_dot_cbm import DotCbmConfig


def intervened(
    probabilities: torch.Tensor,
    interventions: torch.Tensor | None,
    *,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    """`probabilities (batch, M)`, and in their place every entry of `interventions (batch, M)` or `(M,)` that is not
    NaN. NaN is untouched; no gradient flows to the probability that was replaced, nor to what replaced it.

    `low` and `high (M,)`: what an intervention by 0 and by 1 becomes, linear between them. Given the 5th and 95th
    percentile of the predictions, the classifier never sees a value that it was not trained on.
    """
    if interventions is None:
        return probabilities
    batch, count = probabilities.shape
    if tuple(interventions.shape) not in ((batch, count), (1, count), (count,)):
        raise ValueError(
            f"interventions have shape {tuple(interventions.shape)}; they must be ({batch}, {count}), a row for each "
            f"image, or ({count},), the same for all. NaN leaves a concept as predicted."
        )
    values = interventions.detach().to(probabilities.device, probabilities.dtype).expand(probabilities.shape)
    untouched = values.isnan()
    if low is not None:
        values = low.to(values.dtype) + values * (high - low).to(values.dtype)
    return torch.where(untouched, probabilities, values.nan_to_num())


def intervention_on(
    config: DotCbmConfig,
    truth: torch.Tensor,
    *,
    concepts: Iterable[int | str] = (),
    groups: Iterable[str] = (),
) -> torch.Tensor:
    """`truth (batch, M)` where it names one of the `concepts` (names or indices) or a member of one of the `groups`
    of the config, NaN elsewhere. `ValueError` for a name that there is not."""
    chosen = [concept_index(config, concept) for concept in concepts]
    for group in groups:
        if group not in (config.concept_groups or {}):
            raise ValueError(
                f"there is no concept group {group!r}. config.concept_groups has {list(config.concept_groups or {})}."
            )
        chosen += config.concept_groups[group]
    values = torch.full(truth.shape, float("nan"), dtype=torch.float32, device=truth.device)
    values[..., chosen] = truth[..., chosen].float()
    return values


def concept_index(config: DotCbmConfig, concept: int | str) -> int:
    """Where a concept, by its name or its index, stands among all. `ValueError` if there is no such one."""
    if isinstance(concept, str):
        if concept not in config.concept_names:
            raise ValueError(f"there is no concept {concept!r}. config.concept_names has all of them.")
        return config.concept_names.index(concept)
    if not 0 <= concept < config.num_concepts:
        raise ValueError(f"there is no concept {concept}: indices are 0..{config.num_concepts - 1}.")
    return int(concept)


__all__ = ["concept_index", "intervened", "intervention_on"]
