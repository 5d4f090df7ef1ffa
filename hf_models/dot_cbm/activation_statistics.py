"""Mean, spread and range of the concept probabilities on a training set: the scale of the classifier's inputs."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist


BINS = 1000
STD_FLOOR = 0.01


class ActivationStatisticsMixin:
    """`set_activation_statistics` and `fit_activation_statistics`, to be called between the two stages."""

    @torch.no_grad()
    def set_activation_statistics(self, probabilities: torch.Tensor) -> None:
        """Standardise by these predictions `(images, M)`. Deviations below 0.01 count as 0.01, so that a concept that
        is always the same is not blown up."""
        self._store_statistics(*_sums(probabilities))

    @torch.no_grad()
    def fit_activation_statistics(self, batches: Iterable[Mapping]) -> None:
        """The same over batches of inputs, `(pixel_values=...)` or `(patch_features=...)`, of any device, in one pass;
        labels are ignored. Where torch.distributed runs, over the batches of all ranks, every one of which must call
        it."""
        was_training = self.training
        self.eval()
        totals = None
        for batch in batches:
            inputs = {name: self._here(value) for name, value in batch.items() if not name.endswith("labels")}
            sums = _sums(self(**inputs).concept_probs)
            totals = sums if totals is None else tuple(a + b for a, b in zip(totals, sums, strict=True))
        self.train(was_training)
        if totals is None:
            zero = self.activation_mean.double() * 0.0
            # Tensors of their own: the reduction below is in place.
            totals = zero.sum(), zero, zero.clone(), zero.expand(BINS, -1).T.clone()
        if dist.is_available() and dist.is_initialized():
            for each in totals:
                dist.all_reduce(each)
        if totals[0] == 0:
            raise ValueError("there was no image to take statistics of.")
        self._store_statistics(*totals)

    def _here(self, value: Any) -> Any:
        """A tensor, or a tuple of tensors, on the model's device."""
        if isinstance(value, tuple | list):
            return tuple(self._here(part) for part in value)
        return value.to(self.device) if torch.is_tensor(value) else value

    def _store_statistics(self, count, first, second, histogram) -> None:
        mean = first / count
        deviation = (second / count - mean.pow(2)).clamp_min(0.0).sqrt().clamp_min(STD_FLOOR)
        self.activation_mean.copy_(mean)
        self.activation_std.copy_(deviation)
        low, high = self.config.intervention_range or (0.05, 0.95)
        self.activation_low.copy_(_quantile(histogram, low))
        self.activation_high.copy_(_quantile(histogram, high))


def _sums(probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Count, sums, sums of squares `(M,)` and histograms `(M, BINS)`, fp64."""
    p = probabilities.double()
    bins = (p * BINS).long().clamp(0, BINS - 1).T  # (M, images)
    histogram = torch.zeros(p.shape[1], BINS, dtype=torch.float64, device=p.device)
    histogram.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    return torch.tensor(float(len(p)), dtype=torch.float64, device=p.device), p.sum(0), p.pow(2).sum(0), histogram


def _quantile(histogram: torch.Tensor, share: float) -> torch.Tensor:
    """The middle of the bin that the quantile falls in, `(M,)`."""
    below = histogram.cumsum(1) / histogram.sum(1, keepdim=True)
    return ((below < share - 1e-12).sum(1).clamp_max(BINS - 1).double() + 0.5) / BINS


__all__ = ["ActivationStatisticsMixin"]
