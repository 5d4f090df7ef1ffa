r"""Label correction: before a device fine-tunes, its labels are moved so that their mean is the cloud's.

After "On-Device Model Fine-Tuning with Label Correction in Recommender Systems" (arXiv 2211.01163), of which we know
the abstract only: the local share of positives drifts from the global one, which makes fine-tuning harmful to ranking,
and each user changes nothing but the labels of the local samples, ahead of fine-tuning, so that both agree. **The
formulas are our reading**, each with the properties that the abstract states, and are to be chosen among. With the
local share `p_u` of the labels `y` in {0, 1} and the reference `p`:

| method | what is trained | |
|---|---|---|
| `scale` | labels `(p / p_u) y` if `p_u > p`, else `y + (1 - y) (p - p_u) / (1 - p_u)` | in [0, 1], of mean `p` |
| `shift` | labels `y + (p - p_u)` | of mean `p`; may leave [0, 1], where the loss has no lower bound |
| `reweight` | labels `y`, positives weighted by `p / p_u`, negatives by `(1 - p) / (1 - p_u)` | not of labels only |
| `offset` | labels `y`, logits `z + logit(p_u) - logit(p)`; served is `z` | Bayes' rule if only the prior differs |
| `bias` | labels `y`, logits `z + b` with a free `b` that is dropped afterwards | absorbs drift by learning |

The reference is `global`, the share in the cloud's training set; or `model`, the mean prediction of the cloud's model
on the user's own samples, which keeps what the model knows of the user's level; or `smoothed`: global, with `p_u`
drawn towards it as if `strength` more samples had been seen, for users with few.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F


Method = Literal["none", "scale", "shift", "reweight", "offset", "bias"]
Prior = Literal["global", "model", "smoothed"]
LABEL_METHODS = ("scale", "shift")
METHODS = ("none", *LABEL_METHODS, "reweight", "offset", "bias")
PRIORS = ("global", "model", "smoothed")
Values = torch.Tensor | np.ndarray


class LabelCorrectionError(ValueError):
    """Labels or models that cannot be corrected, or were already; the message has the remedy."""


def correct_labels(
    labels: Values,
    p_ref: float | Values,
    p_local: float | Values | None = None,
    method: Literal["scale", "shift"] = "scale",
    *,
    groups: Values | Sequence | None = None,
    smoothing: float = 0.0,
) -> Values:
    """Soft labels whose mean is `p_ref`, in each group; of the kind, shape and dtype of `labels`, but in float32 for
    those in half precision, which would round the mean away.

    Args:
        labels: floats in [0, 1], `(n,)`, a torch tensor or a numpy array.
        p_ref: the reference, one number or one a sample, the same within a group.
        p_local: the local share of positives, one number or one a sample; by default that of the labels. Compute it
            on exactly the samples that are fine-tuned on.
        method: see the module.
        groups: the user of each sample; by default all are of one.
        smoothing: draw the local share towards `p_ref` as if so many more samples had been seen; the mean is then
            between both.

    Raises:
        LabelCorrectionError: integer labels, labels outside [0, 1], a reference that is not between 0 and 1.
        ValueError: an unknown method, or smoothing of a share that was given.
    """
    if p_local is not None and smoothing:
        raise ValueError("smoothing draws the share of the labels: leave it out, or smooth p_local beforehand.")
    if method not in LABEL_METHODS:
        raise ValueError(f"method {method!r} changes no labels; choose from {', '.join(LABEL_METHODS)}.")
    y, index = _checked_labels(labels), _group_index(groups, labels)
    reference = _reference(p_ref, y)
    if p_local is None:
        share, count = group_mean(y, index)
        share = (count * share + smoothing * reference) / (count + smoothing)
    else:
        share = torch.as_tensor(p_local, dtype=torch.float64, device=y.device)
    if method == "shift":
        soft = y + (reference - share)
    else:
        one = torch.ones_like(reference)
        down = reference / torch.where(share > reference, share, one)
        up = (reference - share) / torch.where(share < reference, 1 - share, one)
        soft = torch.where(share > reference, down * y, y + (1 - y) * up)
    return _like(soft, labels)


def prior_weights(
    labels: Values, p_ref: float | Values, *, groups: Values | Sequence | None = None, smoothing: float = 0.0
) -> Values:
    """Weights of the samples for `reweight`, of the dtype that [`correct_labels`] gives; local shares are kept off 0
    and 1 by half a sample."""
    y, index = _checked_labels(labels), _group_index(groups, labels)
    reference = _reference(p_ref, y)
    share = _inner_share(y, index, reference, smoothing)
    weights = y * reference / share + (1 - y) * (1 - reference) / (1 - share)
    return _like(weights, labels)


def prior_offset(
    labels: Values, p_ref: float | Values, *, groups: Values | Sequence | None = None, smoothing: float = 0.0
) -> Values:
    """`logit(p_u) - logit(p_ref)` of each sample for `offset`, of the kind of `labels`; local shares are kept off 0
    and 1 by half a sample. Where scores of several users are compared, add it back to what is served."""
    y, index = _checked_labels(labels), _group_index(groups, labels)
    reference = _reference(p_ref, y)
    offset = (torch.logit(_inner_share(y, index, reference, smoothing)) - torch.logit(reference)).expand(y.shape)
    return _like(offset, labels)


def prior_offset_loss(
    outputs: Any,
    labels: torch.Tensor,
    p_local: float | torch.Tensor,
    p_ref: float | torch.Tensor,
    *,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of `outputs` shifted by `logit(p_local) - logit(p_ref)`; they are served as they are.

    Example:
        >>> loss = partial(prior_offset_loss, p_local=0.7, p_ref=0.4)
        >>> trainer = Trainer(model, args, train_dataset=data, compute_loss_func=loss)

    Args:
        outputs: logits, or what has `logits`; of the shape of `labels` or with one more dimension of size 1.
        p_local: between 0 and 1, see [`clipped_share`].
    """
    logits = getattr(outputs, "logits", outputs)
    local, reference = (torch.as_tensor(p, dtype=torch.float64, device=logits.device) for p in (p_local, p_ref))
    offset = (torch.logit(local) - torch.logit(reference)).to(logits.dtype)
    reduction = "mean" if num_items_in_batch is None else "sum"
    logits = logits.reshape(labels.shape) + offset
    loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def clipped_share(share: float, count: int) -> float:
    """The share of positives among `count` samples, kept off 0 and 1 by half a sample."""
    return min(max(share, 0.5 / count), 1 - 0.5 / count)


@dataclass(frozen=True, kw_only=True)
class CtrStatistics:
    """How far users are from everybody's mean.

    Args:
        global_ctr (`float`): share of positives among all samples.
        users (`np.ndarray`): the users, in order.
        local_ctr, counts (`np.ndarray`): share of positives and number of samples of each.
        drift_sd (`float`): standard deviation of the local shares.
        deviating (`dict[float, float]`): share of the users whose local CTR is more than .1 and .2 off the global one.
    """

    global_ctr: float
    users: np.ndarray
    local_ctr: np.ndarray
    counts: np.ndarray
    drift_sd: float
    deviating: dict[float, float]


def ctr_statistics(labels: Values, groups: Values | Sequence) -> CtrStatistics:
    """Drift of the users in `groups`. `LabelCorrectionError` as [`correct_labels`], and for no sample at all."""
    y = _checked_labels(labels).numpy(force=True)
    if not len(y):
        raise LabelCorrectionError("There are no samples to take a share of.")
    users, index = np.unique(_as_numpy(groups), return_inverse=True)
    counts = np.bincount(index)
    local = np.bincount(index, weights=y) / counts
    off = np.abs(local - y.mean())
    return CtrStatistics(
        global_ctr=float(y.mean()),
        users=users,
        local_ctr=local,
        counts=counts,
        drift_sd=float(local.std()),
        deviating={limit: float((off > limit).mean()) for limit in (0.1, 0.2)},
    )


class Targets(NamedTuple):
    """What a corrected fine-tuning is on, `(n,)` each: labels, weights of the samples, offsets of the logits."""

    labels: torch.Tensor
    sample_weight: torch.Tensor
    logit_offset: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Correction:
    """A method and its reference prior, ready for many users at a time.

    Example:
        >>> correction = Correction(method="scale", prior="global", global_ctr=0.36)
        >>> targets = correction.targets(labels, users)

    Args:
        method, prior, strength: see the module.
        global_ctr: share of positives in the cloud's training set; after its sampling of negatives, if it samples.
    """

    method: Method = "scale"
    prior: Prior = "global"
    global_ctr: float | None = None
    strength: float = 10.0

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.prior not in PRIORS:
            raise ValueError(
                f"method {self.method!r} or prior {self.prior!r} is not known; methods are {', '.join(METHODS)}, "
                f"priors {', '.join(PRIORS)}."
            )

    @property
    def name(self) -> str:
        """`scale_model` and the like; `plain` for no correction, `bias` has no reference."""
        if self.method in ("none", "bias"):
            return {"none": "plain"}.get(self.method, self.method)
        return f"{self.method}_{self.prior}"

    @property
    def free_intercept(self) -> bool:
        """Whether each user trains an intercept that is dropped."""
        return self.method == "bias"

    def targets(self, labels: torch.Tensor, groups: torch.Tensor, logits: torch.Tensor | None = None) -> Targets:
        """The corrected samples.

        Args:
            labels: floats in [0, 1], `(n,)`.
            groups: the user of each sample, `(n,)`.
            logits: of the cloud's model on the samples, for the prior `model`.
        """
        weight, offset = torch.ones_like(labels), torch.zeros_like(labels)
        if self.method in ("none", "bias"):
            _checked_labels(labels)
            return Targets(labels, weight, offset)
        options = {"groups": groups, "smoothing": self.strength if self.prior == "smoothed" else 0.0}
        reference = self._reference(labels, groups, logits)
        if self.method == "reweight":
            weight = prior_weights(labels, reference, **options)
        elif self.method == "offset":
            offset = prior_offset(labels, reference, **options)
        else:
            labels = correct_labels(labels, reference, method=self.method, **options)
        return Targets(labels, weight, offset)

    def _reference(self, labels: torch.Tensor, groups: torch.Tensor, logits: torch.Tensor | None) -> Any:
        if self.prior != "model":
            if self.global_ctr is None:
                raise ValueError(f"The prior {self.prior!r} needs `global_ctr`, the one number that the cloud sends.")
            return self.global_ctr
        if logits is None:
            raise ValueError("The prior 'model' needs the logits of the cloud's model on the samples.")
        return model_prior(logits, groups=groups).to(labels.device)


def model_prior(logits: torch.Tensor, *, groups: Values | Sequence | None = None) -> torch.Tensor:
    """The mean prediction of each sample's group, float64 `(n,)`, kept within [1e-6, 1 - 1e-6]."""
    mean, _ = group_mean(logits.double().sigmoid(), _group_index(groups, logits))
    return mean.clamp(1e-6, 1 - 1e-6)


def group_mean(values: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and size of the group of each value, `(n,)` each; `index` counts groups from 0."""
    groups = int(index.max()) + 1 if index.numel() else 0
    total = values.new_zeros(groups).index_add(0, index, values)
    count = values.new_zeros(groups).index_add(0, index, torch.ones_like(values))
    return (total / count)[index], count[index]


def require_binary_labels(labels: Values, where: str) -> None:
    """`LabelCorrectionError` for integers, and for labels that are soft already, as after a correction."""
    y = _checked_labels(labels, where, bounded=False)
    if not bool(((y == 0) | (y == 1)).all()):
        raise LabelCorrectionError(
            f"{where} are not all 0 or 1: they were corrected before, which must happen once. Start from the labels "
            "as they were observed."
        )


def _checked_labels(labels: Values, where: str = "The labels", bounded: bool = True) -> torch.Tensor:
    y = labels if isinstance(labels, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(labels))
    if not y.dtype.is_floating_point:
        raise LabelCorrectionError(
            f"{where} are of dtype {y.dtype}: soft labels need floats. Cast the column to float32, and give the model "
            "a head that is trained on floats (problem_type='multi_label_classification', or a CTR model)."
        )
    y = y.detach().double()
    if y.isnan().any() or (bounded and bool(((y < 0) | (y > 1)).any())):
        raise LabelCorrectionError(f"{where} must be between 0 and 1, without NaN.")
    return y


def _like(values: torch.Tensor, labels: Values) -> Values:
    """Float64 `values` as the kind of `labels`, in at least single precision."""
    if isinstance(labels, torch.Tensor):
        return values.to(torch.promote_types(labels.dtype, torch.float32))
    return values.numpy(force=True).astype(np.promote_types(labels.dtype, np.float32))


def _reference(p_ref: float | Values, y: torch.Tensor) -> torch.Tensor:
    reference = torch.as_tensor(p_ref, dtype=torch.float64, device=y.device)
    if not bool(((reference > 0) & (reference < 1)).all()):
        raise LabelCorrectionError("The reference prior must lie between 0 and 1, both excluded.")
    return reference


def _inner_share(y: torch.Tensor, index: torch.Tensor, reference: torch.Tensor, smoothing: float) -> torch.Tensor:
    share, count = group_mean(y, index)
    share = (count * share + smoothing * reference) / (count + smoothing)
    return torch.clamp(share, 0.5 / count, 1 - 0.5 / count)


def _group_index(groups: Values | Sequence | None, like: Values) -> torch.Tensor:
    device = like.device if isinstance(like, torch.Tensor) else "cpu"
    if groups is None:
        return torch.zeros(len(like), dtype=torch.long, device=device)
    if len(groups) != len(like):
        raise ValueError(f"There are {len(groups)} groups for {len(like)} labels.")
    if isinstance(groups, torch.Tensor):
        return torch.unique(groups, return_inverse=True)[1].to(device)
    return torch.from_numpy(np.unique(_as_numpy(groups), return_inverse=True)[1]).to(device)


def _as_numpy(groups: Values | Sequence) -> np.ndarray:
    return groups.numpy(force=True) if isinstance(groups, torch.Tensor) else np.asarray(groups)


def local_shares(labels: Values, groups: Values | Sequence | None = None) -> Mapping[Any, float] | float:
    """The share of positives, or that of each group by its name."""
    if groups is None:
        return float(_checked_labels(labels).mean())
    statistics = ctr_statistics(labels, groups)
    return dict(zip(statistics.users.tolist(), statistics.local_ctr.tolist(), strict=True))
