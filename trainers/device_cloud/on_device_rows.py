"""The samples of many users as tensors of one shape: padded, weighted, and cut into chunks that fit the memory."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch


NOT_INPUTS = ("labels", "sample_weight", "logit_offset")


class UserRows(Protocol):
    """Samples of many users, such as [`CtrRows`]: `tensors` by argument of the model, `labels` among them, and whose
    each row is. A user's rows are in the order of time."""

    tensors: Mapping[str, torch.Tensor]
    users: torch.Tensor


@dataclass(frozen=True)
class PaddedRows:
    """Rows of U users, at most N each. `index (U, N)` into the rows, 0 where there is none; `mask (U, N)` says
    where."""

    index: torch.Tensor
    mask: torch.Tensor

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """`(rows, ...)` to `(U, N, ...)`; padding repeats the first row."""
        return values[self.index]

    def inputs(self, rows: UserRows) -> dict[str, torch.Tensor]:
        """What the model takes, `(U, N, ...)` each."""
        return {name: self.take(tensor) for name, tensor in rows.tensors.items() if name not in NOT_INPUTS}


class RowsByUser:
    """Where the rows of each user are.

    Args:
        users: `(rows,)`, integers.
        last: keep only so many of a user's last rows.
    """

    def __init__(self, users: torch.Tensor, *, last: int | None = None):
        order = users.argsort(stable=True)
        self.users, counts = users[order].unique_consecutive(return_counts=True)
        starts = counts.cumsum(0) - counts
        if last is not None:
            starts, counts = starts + (counts - last).clamp_min(0), counts.clamp_max(last)
        self._order, self._starts, self.counts = order, starts, counts

    def kept(self) -> torch.Tensor:
        """All rows that count, user by user."""
        return torch.cat([self._order[s : s + n] for s, n in zip(self._starts.tolist(), self.counts.tolist())])

    def padded(self, users: torch.Tensor) -> PaddedRows:
        """The rows of `users`, among them such that have none here; at least one column."""
        place = torch.searchsorted(self.users, users).clamp_max(len(self.users) - 1)
        known = self.users[place] == users
        counts = torch.where(known, self.counts[place], 0)
        columns = torch.arange(max(1, int(counts.max())))
        mask = columns < counts[:, None]
        at = torch.where(mask, self._starts[place][:, None] + columns, 0)
        return PaddedRows(torch.where(mask, self._order[at], 0), mask)


def chunks_of(users: torch.Tensor, counts: torch.Tensor, *, bytes_of, max_bytes: int) -> Iterator[torch.Tensor]:
    """The users in chunks, those with few rows first, so that little is padded.

    Args:
        bytes_of: what one user needs with so many rows.
        max_bytes: what a chunk may need; one user always fits.
    """
    order = counts.argsort(stable=True)
    begin, sizes = 0, counts[order].tolist()
    while begin < len(sizes):
        end = begin + 1
        while end < len(sizes) and (end + 1 - begin) * bytes_of(sizes[end]) <= max_bytes:
            end += 1
        yield users[order[begin:end]]
        begin = end


def batch_positions(
    mask: torch.Tensor, users: torch.Tensor, *, steps: int, batch_size: int, seed: int
) -> torch.Tensor:
    """Which of a user's rows each step sees, `(U, steps, batch_size)`: epochs of an order that depends on the seed and
    the user alone, one after the other without regard to where a batch ends."""
    positions = torch.zeros(len(mask), steps * batch_size, dtype=torch.long)
    for row, (user, count) in enumerate(zip(users.tolist(), mask.sum(1).tolist(), strict=True)):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + int(user)) % 2**63)
        epochs = -(-positions.shape[1] // count) if count else 0
        orders = [torch.randperm(count, generator=generator) for _ in range(epochs)]
        if orders:
            positions[row] = torch.cat(orders)[: positions.shape[1]]
    return positions.view(len(mask), steps, batch_size)


def auc_of_users(scores: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The AUC of each row of `(U, N)`, `(U,)`; equal scores count half, NaN for one class only."""
    positive = (mask & (labels > 0.5)).to(scores.dtype)
    negative = (mask & (labels <= 0.5)).to(scores.dtype)
    above = torch.sign(scores[:, :, None] - scores[:, None, :]) / 2 + 0.5  # (U, N, N)
    pairs = torch.einsum("ui,uij,uj->u", positive, above, negative)
    return pairs / (positive.sum(1) * negative.sum(1))
