"""The arithmetic of fine-tuning many users at once: gradients of each one's loss by their own parameters, steps, and
which step is kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.utils import logging

from .on_device_parameters import Stacked


logger = logging.get_logger(__name__)

INTERCEPT = "free intercept"  # no parameter of a model has a space in its name
SampleLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Judge = Callable[[Stacked], torch.Tensor]


@dataclass(frozen=True)
class UserBatch:
    """Samples of U users, at most N each: arguments of the model `(U, N, ...)`, and `(U, N)` each of labels, weights,
    0 where there is no sample, and offsets of the logits in the loss."""

    inputs: Stacked
    labels: torch.Tensor
    weights: torch.Tensor
    offsets: torch.Tensor

    def at(self, positions: torch.Tensor) -> "UserBatch":
        """The samples at `positions (U, B)`."""
        users = torch.arange(len(positions), device=positions.device)[:, None]
        parts = (self.inputs, self.labels, self.weights, self.offsets)
        return UserBatch(*tree_map(lambda value: value[users, positions], parts))


class BatchedUsers:
    """One model with the own parameters of many users.

    Args:
        shared: parameters that all users have alike.
        rows: of tables, which rows each user has of their own, see [`OwnRows`].
    """

    def __init__(
        self, model: nn.Module, shared: Stacked, rows: Stacked, *, sample_loss: SampleLoss, vectorized: bool = True
    ):
        self.model, self.shared, self.rows = model, shared, {f"{name}.rows": value for name, value in rows.items()}
        self.sample_loss, self.vectorized = sample_loss, vectorized

    def gradients(self, own: Stacked, batch: UserBatch) -> Stacked:
        """Of each user's loss, `(U, ...)`."""
        return self._each(grad(self._loss), own, self.rows, batch.inputs, batch.labels, batch.weights, batch.offsets)

    @torch.no_grad()
    def logits(self, own: Stacked, inputs: Stacked) -> torch.Tensor:
        """What each user's model gives, `(U, N, ...)`."""
        return self._each(self._forward, own, self.rows, inputs)

    def computes(self, own: Stacked, batch: UserBatch) -> torch.Tensor:
        """Whether all logits of a user's samples are finite, `(U,)`; finite parameters may give others."""
        return all_finite(self.logits(own, batch.inputs), batch.weights != 0)

    def _loss(self, own, rows, inputs, labels, weights, offsets) -> torch.Tensor:
        """Of one user: the weighted losses over the number of samples."""
        logits = self._forward(own, rows, inputs)
        if labels.dtype.is_floating_point:
            logits = logits + offsets.to(logits.dtype) + own.get(INTERCEPT, 0.0)
        losses = self.sample_loss(logits, labels)
        return (losses * weights).sum() / (weights != 0).sum().clamp_min(1)

    def _forward(self, own: Stacked, rows: Stacked, inputs: Stacked) -> torch.Tensor:
        own = {name: value for name, value in own.items() if name != INTERCEPT}
        return flat_logits(functional_call(self.model, {**self.shared, **own, **rows}, kwargs=inputs).logits)

    def _each(self, function: Callable, *parts: Any) -> Any:
        if self.vectorized:
            try:
                return vmap(function)(*parts)
            except RuntimeError as error:
                if "vmap" not in str(error):
                    raise
                # Such as the look that transformers takes into an attention mask.
                logger.warning_once(
                    f"{type(self.model).__name__} cannot be batched over users ({str(error).splitlines()[0][:120]}): "
                    "one after the other instead."
                )
                self.vectorized = False
        users = len(next(iter(parts[0].values())))
        results = [function(*tree_map(lambda value, user=user: value[user], parts)) for user in range(users)]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results)
        return {name: torch.stack([result[name] for result in results]) for name in results[0]}


class Update:
    """Gradient descent or Adam on stacked parameters; every user's coordinates are on their own."""

    def __init__(self, rate: float, optimizer: Literal["sgd", "adam"]):
        if optimizer not in ("sgd", "adam"):
            raise ValueError(f"device_optimizer {optimizer!r} is not known; choose from sgd, adam.")
        self.rate, self.adam = rate, optimizer == "adam"
        self.step, self.first, self.second = 0, {}, {}

    def __call__(self, own: Stacked, gradients: Stacked) -> Stacked:
        """The parameters after one more step."""
        self.step += 1
        return {name: value - self.rate * self._direction(name, gradients[name]) for name, value in own.items()}

    def _direction(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if not self.adam:
            return gradient
        zero = torch.zeros_like(gradient)
        self.first[name] = torch.lerp(self.first.get(name, zero), gradient, 0.1)
        self.second[name] = torch.lerp(self.second.get(name, zero), gradient.square(), 0.001)
        mean, square = self.first[name] / (1 - 0.9**self.step), self.second[name] / (1 - 0.999**self.step)
        return mean / (square.sqrt() + 1e-8)


def train_users(
    users: BatchedUsers,
    start: Stacked,
    batch: UserBatch,
    *,
    update: Update,
    steps: int,
    positions: torch.Tensor | None = None,
    judge: Judge | None = None,
    judge_every: int | None = None,
    roll_back: bool = True,
) -> tuple[Stacked, Stacked]:
    """The parameters that each user serves, and what is known of how they came about, `(U,)` each.

    Args:
        positions: `(U, steps, B)`, the samples of each step; by default all.
        judge: each user's validation, higher is better, NaN where it cannot be told: there the last step counts;
            minus infinity is never served.
        judge_every: look so often, and keep the best step, of equals the first; by default after the last one alone.
        roll_back: return to the start where validation got worse. Who diverged, in parameters or in the logits of the
            samples, returns in any case.
    """
    count = len(batch.labels)
    before = judge(start) if judge else torch.full((count,), torch.nan, device=batch.labels.device)
    own, best, after = start, start, before
    found, step_of = torch.full_like(before, -torch.inf), torch.zeros_like(before, dtype=torch.long)
    for step in range(1, steps + 1):
        own = update(own, users.gradients(own, batch if positions is None else batch.at(positions[:, step - 1])))
        last = step == steps
        if not (last or (judge and judge_every and step % judge_every == 0)):
            continue
        score = judge(own) if judge else before
        better = torch.where(score.isnan(), last, score > found) & _finite(own) & users.computes(own, batch)
        found, after = torch.where(better, score, found), torch.where(better, score, after)
        step_of = torch.where(better, step, step_of)
        best = {name: torch.where(_over(better, value), own[name], value) for name, value in best.items()}
    worse = (after < before) & roll_back
    served = {name: torch.where(_over(worse, value), start[name], value) for name, value in best.items()}
    return served, {
        "accepted": ~worse & (step_of > 0),
        "best_step": torch.where(worse, 0, step_of),
        "validation_before": before.double(),
        "validation_after": after.double(),
    }


def per_sample_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of float labels, cross-entropy of integer ones, `(N,)`."""
    if labels.dtype.is_floating_point:
        exact = torch.promote_types(logits.dtype, torch.float32)  # soft labels in half precision have another mean
        return F.binary_cross_entropy_with_logits(logits.to(exact), labels.to(exact), reduction="none")
    return F.cross_entropy(logits, labels, reduction="none")


class OneUser(nn.Module):
    """One user's loss, as a device computes it: what its cost is counted on."""

    def __init__(self, model: nn.Module, sample_loss: SampleLoss, labels: torch.Tensor):
        super().__init__()
        self.model, self.sample_loss, self.labels = model, sample_loss, labels

    def forward(self, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        """The mean loss of the samples, and their logits."""
        logits = flat_logits(self.model(**inputs).logits)
        return SequenceClassifierOutput(loss=self.sample_loss(logits, self.labels).mean(), logits=logits)


def flat_logits(logits: torch.Tensor) -> torch.Tensor:
    """`(N,)` of `(N, 1)`; others as they are."""
    return logits[:, 0] if logits.dim() == 2 and logits.shape[1] == 1 else logits


def all_finite(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Whether the logits `(U, N, ...)` are finite wherever `mask (U, N)` is, `(U,)`."""
    return (
        (torch.isfinite(logits).flatten(2).all(2) if logits.dim() > 2 else torch.isfinite(logits))
        .logical_or(~mask)
        .all(1)
    )


def _finite(own: Stacked) -> torch.Tensor:
    """Whether all parameters of a user are, `(U,)`."""
    return torch.stack([torch.isfinite(value).view(len(value), -1).all(1) for value in own.values()]).all(0)


def _over(flag: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`(U,)` so that it broadcasts over `(U, ...)`."""
    return flag.view(-1, *([1] * (value.dim() - 1)))
