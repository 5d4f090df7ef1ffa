"""Embedding tables of many users without a copy of the table for each: only the rows that a user's samples read.

A user's gradient is 0 on every other row. So a device's own part of a table is a few rows, which are looked up before
the cloud's table is: `OwnRows` stands in for `nn.Embedding` while users are trained and predicted for.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from .on_device_rows import PaddedRows


class OwnRows(nn.Module):
    """A table of which rows `rows (R,)`, ascending, are replaced by `own (R, d)`; none, as long as nothing is put in
    their place with `functional_call`."""

    def __init__(self, table: nn.Embedding):
        super().__init__()
        self.weight = table.weight
        self.own = nn.Parameter(torch.zeros_like(table.weight[:1]), requires_grad=False)
        self.register_buffer("rows", torch.tensor([table.num_embeddings], device=table.weight.device))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """As a table does."""
        place = torch.searchsorted(self.rows, ids.contiguous()).clamp_max(self.rows.shape[0] - 1)
        mine = self.rows[place] == ids
        return torch.where(mine[..., None], self.own[place], F.embedding(ids, self.weight))


def tables_among(model: nn.Module, names: list[str]) -> dict[str, nn.Embedding]:
    """The tables whose weights are among the parameters `names`, by the name of the module. Tied weights, which other
    modules read whole, do not count."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Embedding
        and f"{name}.weight" in names
        and module.max_norm is None
        and owners[id(module.weight)] == 1
    }


def read_rows(tables: Mapping[str, nn.Embedding], predict: Callable[[], list[int]]) -> dict[str, torch.Tensor]:
    """Which rows of each table each sample reads, `(samples, K)`, padding as one past the last row.

    Args:
        predict: runs the model on all samples in order, and returns the sizes of its batches.

    Tables whose ids don't come sample by sample, such as those of positions, are left out.
    """
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in tables}
    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: seen[name].append(inputs[0]))
        for name, module in tables.items()
    ]
    try:
        sizes = predict()
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, ids in seen.items():
        calls = len(ids) // len(sizes)  # a table may be read several times in a pass
        sized = [size for size in sizes for _ in range(calls)]
        if not calls or [len(part) for part in ids] != sized:
            continue
        batches = [ids[at : at + calls] for at in range(0, len(ids), calls)]
        rows = [torch.cat([part.reshape(len(part), -1) for part in batch], dim=1) for batch in batches]
        width = max(part.shape[1] for part in rows)
        absent = tables[name].num_embeddings
        rows = torch.cat([F.pad(part, (0, width - part.shape[1]), value=absent) for part in rows])
        padding = tables[name].padding_idx
        found[name] = rows if padding is None else rows.masked_fill(rows == padding, absent)
    return found


def rows_of_users(read: torch.Tensor, padded: PaddedRows, absent: int) -> torch.Tensor:
    """The rows that each user's samples read, `(U, R)`, ascending, filled up with `absent`."""
    ids = torch.where(padded.mask[..., None], padded.take(read), absent).flatten(1).sort(dim=1).values
    first = ids != absent
    first[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    rows = ids.new_full((len(ids), max(1, int(first.sum(1).max()))), absent)
    user, column = first.nonzero(as_tuple=True)
    rows[user, first.cumsum(1)[user, column] - 1] = ids[user, column]
    return rows


@contextmanager
def own_rows(model: nn.Module, tables: Mapping[str, nn.Embedding]) -> Iterator[None]:
    """The tables replaced by [`OwnRows`], and put back in the end."""
    try:
        for name, table in tables.items():
            model.set_submodule(name, OwnRows(table))
        yield
    finally:
        for name, table in tables.items():
            model.set_submodule(name, table)
