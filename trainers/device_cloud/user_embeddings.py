r"""Stages 2 and 3 of anonymous personalisation (arXiv 2501.06062): a device fits its user's distribution, the cloud
trains on texts with fresh draws from it.

    stage 1   cloud    an ordinary run without users
    stage 2   device   min over D_u of E_{e ~ D_u} loss(model(x, e), y), the model frozen:  [`fit_user_distribution`]
    stage 3   cloud    an ordinary run on (x, e, y), e drawn on the device and detached:     [`AnonymousUserCollator`]

A text that is trained on in several epochs is one upload: its e is drawn once. Two draws for a text would be linked by
the text, and name its user as two uploads of one session do.

Many users are fitted at once here, each as it would be alone: every step takes a batch of each user's, a user's
gradient is clipped by itself, and Adam works entry by entry. That is the simulation of many devices in one process.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from hf_models.personal_lm import MemoisedNoise, PrivateNoise, UserDistribution, noise_source


Rows = Sequence[Mapping[str, Any]]
Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """
    How a device fits its distribution.

    `steps` x `learning_rate` is a privacy parameter too: Adam moves an entry by about the rate in a step, so a small
    budget keeps users close to each other; `UserDistributionConfig.max_radius` does so for certain.

    Args:
        learning_rate: 5e-5 is the default of the authors' command line; what they used is not known.
        steps, batch_size: of every user, however many texts they have; these are gone through again and again.
        warmup_steps: of a linear schedule that ends at 0.
        max_grad_norm: of each user's gradient by itself.
        evaluate_every: steps between measurements of the hold-out, all with the same noise; the best of them is kept,
            the start included.
        users_at_once: users fitted together; changes nothing but speed and memory.
    """

    learning_rate: float = 5e-5
    steps: int = 200
    batch_size: int = 8
    warmup_steps: int = 0
    max_grad_norm: float = 5.0
    evaluate_every: int = 20
    users_at_once: int = 32

    def __post_init__(self):
        for name in ("learning_rate", "steps", "batch_size", "evaluate_every", "users_at_once"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive.")


@dataclass
class FitRecord:
    """What stage 2 came to, one entry a user in the order of the table: `hold_out_before`, `hold_out_after` (means of
    the loss), `best_step`, and `radius_over_std`, ||mu - centre|| / sigma (Gaussian only)."""

    hold_out_before: list[float] = field(default_factory=list)
    hold_out_after: list[float] = field(default_factory=list)
    best_step: list[int] = field(default_factory=list)
    radius_over_std: list[float] = field(default_factory=list)
    randomness: str = ""


def sample_losses(model: PreTrainedModel, batch: Mapping[str, Any]) -> torch.Tensor:
    """
    The task's loss of every text, `(batch,)`: cross-entropy of its class, or the mean over its tokens.

    In a language model the first token, which nothing of the text predicts, does not count.
    """
    labels = batch["labels"]
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    if labels.ndim == 1:
        return F.cross_entropy(logits.float(), labels, reduction="none")
    targets = labels[:, 1:]
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none")
    return losses.sum(1) / (targets != -100).sum(1).clamp_min(1)


def fit_user_distribution(
    model: PreTrainedModel,
    distribution: UserDistribution,
    train: Rows,
    validation: Rows,
    collator: Collator,
    args: FitArguments,
    *,
    user_column: str = "user",
    simulation: bool = False,
    seed: int | None = None,
) -> FitRecord:
    """
    Stage 2: fit each row of `distribution` to the texts of its user, the model as it is.

    The model is in eval mode and keeps its weights, its flags and its mode. For a mixture, whose weights no gradient
    reaches, see [`assign_components`][trainers.device_cloud.user_embedding_mixture.assign_components].

    Args:
        train, validation: rows with `user_column`, the number of a row of `distribution`, and what `collator` takes.
            They share no row: what the hold-out measures is the loss on texts that the fit has not seen.
        simulation, seed: draws and the order of texts from a seed; both or neither. Without, from the operating
            system.

    Raises:
        ValueError: a user without a text in either part, a row of no user, a seed without `simulation=True`, or a
            mixture.
    """
    if distribution.config.design == "mixture":
        raise ValueError("a mixture is not fitted by draws: use assign_components.")
    noise = noise_source(simulation=simulation, seed=seed)
    train, validation = as_list(train), as_list(validation)
    texts = rows_by_user(train, distribution.num_users, user_column, "train")
    held = rows_by_user(validation, distribution.num_users, user_column, "validation")
    record, secret = FitRecord(randomness=randomness_of(noise)), noise.secret()
    with frozen(model):
        for start in range(0, distribution.num_users, args.users_at_once):
            users = list(range(start, min(start + args.users_at_once, distribution.num_users)))
            table = distribution.rows(users)
            part = _Part(
                model,
                collator,
                [[train[i] for i in texts[u]] for u in users],
                [[validation[i] for i in held[u]] for u in users],
                secret,
            )
            _fit_part(table, part, args, noise, user_column, record)
            distribution.put_rows(users, table)
    radii = distribution.radius_over_std()
    record.radius_over_std = [] if radii is None else radii.tolist()
    return record


@dataclass
class _Part:
    """Users that are fitted together: their texts and hold-outs, one list a user; `secret` is the hold-outs' noise."""

    model: PreTrainedModel
    collator: Collator
    texts: list[list[Mapping[str, Any]]]
    held: list[list[Mapping[str, Any]]]
    secret: bytes

    def losses(
        self, rows: list[tuple[int, Mapping[str, Any]]], table: UserDistribution, noise: PrivateNoise, user_column: str
    ) -> torch.Tensor:
        """Loss of each of the pairs (user, row), with a draw of its own."""
        batch = self.collator([without(row, user_column) for _, row in rows])
        batch = {name: value.to(self.model.device) for name, value in batch.items()}
        users = torch.tensor([user for user, _ in rows])
        drawn = table.sample(users, noise=noise).to(self.model.device)
        return sample_losses(self.model, batch | {"user_embeds": drawn})


def _fit_part(
    table: UserDistribution, part: _Part, args: FitArguments, noise: PrivateNoise, user_column: str, record: FitRecord
) -> None:
    parameters = list(table.parameters())
    optimizer = torch.optim.Adam(parameters, lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, args))
    orders = [_endless(len(rows), noise) for rows in part.texts]
    best = _hold_out(part, table, args, user_column)
    kept = [parameter.detach().clone() for parameter in parameters]
    steps = torch.zeros(table.num_users, dtype=torch.long)
    record.hold_out_before += best.tolist()
    for step in range(1, args.steps + 1):
        rows = [
            (user, part.texts[user][next(order)]) for user, order in enumerate(orders) for _ in range(args.batch_size)
        ]
        losses = part.losses(rows, table, noise, user_column)
        optimizer.zero_grad()
        losses.reshape(table.num_users, args.batch_size).mean(1).sum().backward()
        _clip_each(parameters, args.max_grad_norm)
        optimizer.step()
        schedule.step()
        table.project_()
        if step % args.evaluate_every == 0 or step == args.steps:
            found = _hold_out(part, table, args, user_column)
            better = found < best
            best = torch.where(better, found, best)
            steps[better] = step
            for keep, parameter in zip(kept, parameters):
                keep[better] = parameter.detach()[better]
    with torch.no_grad():
        for keep, parameter in zip(kept, parameters):
            parameter.copy_(keep)
    record.hold_out_after += best.tolist()
    record.best_step += steps.tolist()


@torch.no_grad()
def _hold_out(part: _Part, table: UserDistribution, args: FitArguments, user_column: str) -> torch.Tensor:
    """
    Mean loss of each user's hold-out, `(users,)`, one draw for each text.

    The noise of a text is the same every time: the least of many measurements with noise of their own would lie below
    the first by luck alone.
    """
    pairs = [(user, row) for user, rows in enumerate(part.held) for row in rows]
    names = [str(index).encode() for rows in part.held for index in range(len(rows))]
    width, losses = args.batch_size * table.num_users, []
    for start in range(0, len(pairs), width):
        noise = MemoisedNoise(part.secret, names[start : start + width])
        losses.append(part.losses(pairs[start : start + width], table, noise, user_column))
    users = torch.tensor([user for user, _ in pairs])
    return _mean_by(torch.cat(losses).cpu(), users, table.num_users)


def _mean_by(values: torch.Tensor, groups: torch.Tensor, count: int) -> torch.Tensor:
    sums = torch.zeros(count).index_add_(0, groups, values.float())
    return sums / torch.bincount(groups, minlength=count)


def _linear(step: int, args: FitArguments) -> float:
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    return max(0.0, (args.steps - step) / max(1, args.steps - args.warmup_steps))


def _clip_each(parameters: list[torch.nn.Parameter], largest: float) -> None:
    squares = sum(parameter.grad.flatten(1).square().sum(1) for parameter in parameters)
    factor = (largest / squares.sqrt().clamp_min(1e-12)).clamp_max(1.0)  # (users,)
    for parameter in parameters:
        parameter.grad.mul_(factor.reshape(-1, *[1] * (parameter.ndim - 1)))


def _endless(count: int, noise: PrivateNoise) -> Iterator[int]:
    """Indices below `count` in a new random order each time round."""
    while True:
        yield from noise.uniform((count,)).argsort().tolist()


def rows_by_user(rows: Rows, num_users: int, user_column: str, part: str) -> list[list[int]]:
    """The indices of each user's rows. `ValueError` for a user without any, or a row of no user."""
    users = [row.get(user_column) for row in rows]
    found: list[list[int]] = [[] for _ in range(num_users)]
    for index, user in enumerate(users):
        if not isinstance(user, int) or not 0 <= user < num_users:
            raise ValueError(f"{part}[{index}] has {user_column}={user!r}; there are users 0 to {num_users - 1}.")
        found[user].append(index)
    if empty := [user for user, indices in enumerate(found) if not indices]:
        raise ValueError(f"{part} has no row of user {empty[0]} (nor of {len(empty) - 1} others): leave them out.")
    return found


def as_list(rows: Rows) -> list[Mapping[str, Any]]:
    """Rows of a `datasets.Dataset`, or of a list, as a list: reading one of a data set is slow."""
    return rows.to_list() if hasattr(rows, "to_list") else list(rows)


@contextmanager
def frozen(model: PreTrainedModel) -> Iterator[None]:
    """The model in eval mode without gradients for its weights, and as it was afterwards."""
    flags, training = [(parameter, parameter.requires_grad) for parameter in model.parameters()], model.training
    model.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        model.train(training)


def without(row: Mapping[str, Any], column: str) -> dict[str, Any]:
    """A copy of a row that lacks a column."""
    return {name: value for name, value in row.items() if name != column}


def randomness_of(noise: PrivateNoise) -> str:
    """Where draws came from, for reports."""
    return f"simulation=True, seed {noise.seed}" if noise.simulation else "the operating system"


def text_key(row: Mapping[str, Any], columns: Sequence[str] = ("input_ids",)) -> bytes:
    """What tells a text from others, whatever it was labelled. `ValueError` for a row without one of the columns."""
    if missing := [name for name in columns if name not in row]:
        raise ValueError(f"a row has no column {missing[0]!r}, which tells its text from others: see `text_columns`.")
    parts = [np.asarray(row[name]) for name in columns]
    parts = [part.astype(np.int64) if part.dtype.kind in "iu" else part for part in parts]
    return b"".join(f"{part.dtype.str}{part.shape}".encode() + part.tobytes() for part in parts)


class AnonymousUserCollator:
    """
    Stage 3's batches: for every text the draw that it was uploaded with, and no column that names its user.

    In a deployment draws are made on the devices; here one process holds `distribution` and uses the user's number for
    nothing but the draw. Give the Trainer `remove_unused_columns=False`, or it takes the column away too soon.

    A text of a user has one draw, in all epochs, on all ranks, in all workers and after a run was resumed: it is made
    of `secret`, the text and the user's distribution. So a text is one upload, and what is proved or measured of one
    upload holds. Another distribution makes another draw, which is a second upload of the text.

    Args:
        collator: makes a batch of rows without `user_column`.
        distribution: of all users; drawn from for the users of the batch alone, without gradient.
        user_column: holds a row of `distribution`, `-1` for a user who has none.
        missing_user: `"raise"`, or `"zero"`, an embedding of zeros for users who have no distribution yet.
        fresh: draw anew whenever a text comes by, as the authors' code does. A text is then as many uploads as it has
            epochs, and they are linked: `attribution_linked` of a privacy report, not `attribution`, is theirs.
        text_columns: what tells a text from others.
        secret: of [`kept_secret`][hf_models.personal_lm.kept_secret], for a run that is to be resumed or has several
            processes. `None`: of the seed, or made for this object.
        simulation, seed: both or neither, see `hf_models.personal_lm.noise_source`.

    Raises:
        ValueError: a secret beside a seed or `fresh=True`; or several processes without a common secret.

    Example:
        >>> collator = AnonymousUserCollator(DataCollatorWithPadding(tokenizer), distribution)
        >>> Trainer(model, TrainingArguments(..., remove_unused_columns=False), data_collator=collator, ...).train()
    """

    def __init__(
        self,
        collator: Collator,
        distribution: UserDistribution,
        *,
        user_column: str = "user",
        missing_user: str = "raise",
        fresh: bool = False,
        text_columns: Sequence[str] = ("input_ids",),
        secret: bytes | None = None,
        simulation: bool = False,
        seed: int | None = None,
    ):
        if missing_user not in ("raise", "zero"):
            raise ValueError(f"missing_user={missing_user!r} must be 'raise' or 'zero'.")
        if secret is not None and (simulation or fresh):
            raise ValueError("a secret is for draws that are kept and have no seed: leave it out here.")
        if secret is None and not (simulation or fresh) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError(
                "several processes without a common secret would draw twice for one text. Give "
                "secret=kept_secret(path)."
            )
        self.collator, self.user_column, self.missing_user = collator, user_column, missing_user
        self.fresh, self.text_columns = fresh, tuple(text_columns)
        self.distribution = copy.deepcopy(distribution).requires_grad_(False)
        self.noise = noise_source(simulation=simulation, seed=seed)
        self._seed, self._stream = seed, (0, 0)
        self._secret = secret if secret is not None else self.noise.secret()
        self._digests = _digests(self.distribution)

    def __call__(self, features: list[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch with `user_embeds (batch, tokens, width)`."""
        if any(self.user_column not in row for row in features):
            raise ValueError(
                f"a row has no column {self.user_column!r}. If a Trainer feeds this collator, give it "
                "remove_unused_columns=False: the column is dropped here, after the draw."
            )
        batch = dict(self.collator([without(row, self.user_column) for row in features]))
        batch["user_embeds"] = self.draw(features)
        return batch

    @torch.no_grad()
    def draw(self, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        """The draw of every row, `(batch, tokens, width)`. `ValueError` for a user who has no distribution, if that is
        to raise."""
        users = torch.tensor([int(row[self.user_column]) for row in rows])
        known = (users >= 0) & (users < self.distribution.num_users)
        if self.missing_user == "raise" and not known.all():
            raise ValueError(
                f"user {int(users[~known][0])} has no distribution among {self.distribution.num_users}. Fit one, or "
                "give missing_user='zero'."
            )
        drawn = torch.zeros(len(users), *self.distribution.config.shape)
        if known.any():
            noise = self._fresh_noise() if self.fresh else self._kept_noise([r for r, k in zip(rows, known) if k])
            drawn[known] = self.distribution.sample(users[known], noise=noise).float()
        return drawn

    def _kept_noise(self, rows: Sequence[Mapping[str, Any]]) -> MemoisedNoise:
        users = [int(row[self.user_column]) for row in rows]
        texts = [
            user.to_bytes(8, "big") + self._digests[user] + text_key(row, self.text_columns)
            for user, row in zip(users, rows)
        ]
        return MemoisedNoise(self._secret, texts, simulation=self.noise.simulation)

    def _fresh_noise(self) -> PrivateNoise:
        """In a simulation ranks, and workers of a data loader, are copies with one state: each goes on from a seed of
        its own, a worker's changing with the epoch."""
        if not self.noise.simulation:
            return self.noise
        worker = torch.utils.data.get_worker_info()
        stream = (int(os.environ.get("RANK", "0")), 0 if worker is None else worker.seed)
        if stream != self._stream:
            self._stream = stream
            mixed = hashlib.sha256(f"{self._seed} {stream}".encode()).digest()
            self.noise = noise_source(simulation=True, seed=int.from_bytes(mixed[:4], "big"))
        return self.noise


def _digests(distribution: UserDistribution) -> list[bytes]:
    """Of each user's parameters: after another fit the noise is another, or two uploads would differ by the means'
    difference and nothing else."""
    state = sorted(distribution.named_parameters()), sorted(distribution.named_buffers())
    shared = b"".join(tensor.detach().cpu().numpy().tobytes() for _, tensor in state[1])
    return [
        hashlib.sha256(
            shared + b"".join(tensor.detach()[user].cpu().numpy().tobytes() for _, tensor in state[0])
        ).digest()
        for user in range(distribution.num_users)
    ]


__all__ = [
    "AnonymousUserCollator",
    "FitArguments",
    "FitRecord",
    "as_list",
    "fit_user_distribution",
    "frozen",
    "randomness_of",
    "rows_by_user",
    "sample_losses",
    "text_key",
]
