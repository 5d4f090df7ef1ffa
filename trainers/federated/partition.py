"""Whose row is whose: a dataset as the examples of its clients, by a column, an array, or a dataset for each."""

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch

from .local import ClientData


Collate = Callable[[Any], Mapping[str, Any]]


class ClientRows:
    """The clients of a dataset, in the order of their values, and the examples of each.

    Args:
        dataset: map-style; or `{client: dataset}`, in that order.
        partition_by: the column of a `datasets.Dataset` that tells the client, or one value for each row.
        collate: rows to a batch. If the dataset's own `__getitems__` gives whole batches, it takes these.
        block_by: the column of the block of each row, or one number for each row, from 0 on.
        read: what becomes of the dataset before its rows are read, such as the removal of columns.
        rowwise: a row's part of a batch is the same whatever else is in the batch. Where rows are fixed, too, as those
            of a `datasets.Dataset` without a transform or of a dataset that says so (`fixed_rows = True`), a client's
            are collated once and kept, on `device`, as long as there is room. Others are read anew in each round.
        room: bytes that kept rows may take.

    Raises:
        ValueError: no rows, no such column, a row without a client, a number of values that is not that of the rows.
    """

    def __init__(
        self,
        dataset: Any,
        partition_by: str | Sequence[Any] | None = None,
        *,
        collate: Collate,
        block_by: str | Sequence[int] | None = None,
        read: Callable[[Any], Any] = lambda dataset: dataset,
        rowwise: bool = False,
        device: torch.device | str = "cpu",
        room: int = 2**30,
    ):
        if isinstance(dataset, Mapping) and partition_by is None:
            names, codes, parts = [str(name) for name in dataset], [], list(dataset.values())
            codes = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            blocks = None if block_by is None else np.concatenate([_values(part, block_by) for part in parts])
            reader: _Reader = _ManyDatasets([read(part) for part in parts])
        elif isinstance(dataset, Mapping) or partition_by is None:
            raise ValueError("Give partition_by= with one dataset, or {client: dataset} without it.")
        else:
            names, codes = _coded(_values(dataset, partition_by), len(dataset))
            blocks = None if block_by is None else _values(dataset, block_by)
            reader = _OneDataset(read(dataset))
        if not len(codes):
            raise ValueError("The dataset has no rows.")
        self.names: list[str] = names
        self._index = {name: index for index, name in enumerate(names)}
        if len(self._index) < len(names):
            raise ValueError("Two clients have the same name once it is text.")
        self._order = np.argsort(codes, kind="stable")
        self._starts = np.concatenate([[0], np.bincount(codes, minlength=len(names)).cumsum()])
        self._blocks, self._block_counts = _blocks(blocks, codes, len(names))
        self._reader, self._collate, self._rowwise = reader, collate, rowwise
        self._device, self._room = torch.device(device), room
        self._kept: dict[tuple[str, int | None], _Collated] = {}

    @property
    def num_examples(self) -> dict[str, int]:
        """Of each client."""
        return dict(zip(self.names, np.diff(self._starts).tolist()))

    @property
    def num_blocks(self) -> int | None:
        """How many blocks the rows belong to; `None` if nobody said."""
        return None if self._block_counts is None else self._block_counts.shape[1]

    def __len__(self) -> int:
        """All rows: what a Trainer asks of its training set."""
        return len(self._order)

    def __contains__(self, client: str) -> bool:
        return client in self._index

    def fingerprint(self) -> str:
        """Hash of whose each row is, and of 64 rows where the data are a `datasets.Dataset`: other datasets may draw
        what they show."""
        digest = hashlib.sha256(json.dumps(self.names).encode())
        for array in (self._order, self._starts, self._blocks):
            digest.update(b"" if array is None else np.ascontiguousarray(array, np.int64).tobytes())
        for index in np.unique(np.linspace(0, len(self._order) - 1, 64).astype(np.int64)):
            digest.update(repr(self._reader.stored(int(index))).encode())
        return f"sha256:{digest.hexdigest()[:16]}"

    def count(self, client: str, block: int | None = None) -> int:
        """The examples of a client; with `block`, those of a block, where blocks are known."""
        index = self._index[client]
        if block is None or self._block_counts is None:
            return int(self._starts[index + 1] - self._starts[index])
        return int(self._block_counts[index, block]) if block < self._block_counts.shape[1] else 0

    def indices(self, client: str, block: int | None = None) -> np.ndarray:
        """The rows of a client in the dataset, in their order."""
        index = self._index[client]
        own = self._order[self._starts[index] : self._starts[index + 1]]
        return own if block is None or self._blocks is None else own[self._blocks[own] == block]

    def data(self, client: str, block: int | None = None) -> ClientData:
        """A client's examples, for local training and for evaluation."""
        key = (client, None if self._blocks is None else block)
        if key in self._kept:
            return self._kept[key]
        own = self.indices(client, block)
        found = _Rows(lambda: self._reader.rows(own), len(own), self._collate)
        if not self._reader.fixed or not len(own):
            return found
        if isinstance(found.rows, Mapping):
            batch, kept = found.rows, found
        elif self._rowwise:
            batch = kept = self._collate(found.rows)
        else:
            return found
        if not all(isinstance(value, torch.Tensor) and len(value) == len(own) for value in batch.values()):
            return found
        batch = {name: value.to(self._device) for name, value in batch.items()}
        kept = _Collated(batch, len(own)) if kept is not found else _Rows(lambda: batch, len(own), self._collate)
        if (size := sum(value.nbytes for value in batch.values())) <= self._room:
            self._kept[key] = kept
            self._room -= size
        return kept


class _Collated:
    """Rows that are a batch already."""

    def __init__(self, tensors: dict[str, torch.Tensor], count: int):
        self.tensors, self._count = tensors, count

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: torch.Tensor | None) -> Mapping[str, Any]:
        if indices is None:
            return dict(self.tensors)
        return {name: value[indices] for name, value in self.tensors.items()}


class _Rows:
    """Rows that are collated for each batch anew: those of a padding collator, or of one that draws. They are read
    when the first batch is asked for: then the client's own seed is set, for datasets that draw."""

    def __init__(self, read: Callable[[], Any], count: int, collate: Collate):
        self._read, self._count, self._collate = read, count, collate

    @functools.cached_property
    def rows(self) -> Any:
        return self._read()

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: torch.Tensor | None) -> Mapping[str, Any]:
        if isinstance(self.rows, Mapping):
            rows = self.rows if indices is None else {name: value[indices] for name, value in self.rows.items()}
        else:
            # a row is handed out as a copy: collators pop what they use
            chosen = range(self._count) if indices is None else indices.tolist()
            rows = [_copied(self.rows[index]) for index in chosen]
        return self._collate(rows)


class _OneDataset:
    def __init__(self, dataset: Any):
        self._dataset = dataset
        stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
        self.fixed = stored or getattr(dataset, "fixed_rows", False)

    def rows(self, indices: np.ndarray) -> Any:
        """All of them at once: a list of rows, or what the dataset makes a batch of."""
        chosen = indices.tolist()
        if hasattr(self._dataset, "__getitems__"):
            return self._dataset.__getitems__(chosen)
        return [self._dataset[index] for index in chosen]

    def stored(self, index: int) -> Any:
        """A row as it lies there, before any transform; `None` where nobody knows."""
        if not isinstance(self._dataset, datasets.Dataset):
            return None
        return self._dataset.with_format("arrow")[index].to_pydict()


class _ManyDatasets:
    """One after the other."""

    def __init__(self, parts: list[Any]):
        self._parts = [_OneDataset(part) for part in parts]
        self._starts = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
        self.fixed = all(part.fixed for part in self._parts)

    def rows(self, indices: np.ndarray) -> Any:
        part = self._part(int(indices[0])) if len(indices) else 0
        return self._parts[part].rows(indices - self._starts[part])

    def stored(self, index: int) -> Any:
        part = self._part(index)
        return self._parts[part].stored(index - int(self._starts[part]))

    def _part(self, index: int) -> int:
        return int(np.searchsorted(self._starts, index, side="right")) - 1


_Reader = _OneDataset | _ManyDatasets


def _copied(row: Any) -> Any:
    return dict(row) if isinstance(row, Mapping) else row


def _values(dataset: Any, column: str | Sequence[Any]) -> Any:
    """One for each row."""
    if not isinstance(column, str):
        return column
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(
            f"{column!r} names a column, and a {type(dataset).__name__} has none: give one value for each row instead."
        )
    if column not in dataset.column_names:
        raise ValueError(f"There is no column {column!r} among {', '.join(dataset.column_names)}.")
    return dataset.select_columns([column]).with_format("arrow")[:].column(column)


def _coded(values: Any, rows: int) -> tuple[list[str], np.ndarray]:
    """Names in the order of their values, and of each row the number of its client."""
    if len(values) != rows:
        raise ValueError(f"partition_by has {len(values)} values for {rows} rows.")
    if hasattr(values, "combine_chunks"):
        missing = int(pc.is_null(values, nan_is_null=True).to_numpy().sum())
        if missing:
            raise ValueError(f"{missing} rows have no client.")
        distinct = pc.unique(values)
        distinct = distinct.take(pc.array_sort_indices(distinct))
        return [str(value) for value in distinct.to_pylist()], pc.index_in(values, distinct).to_numpy()
    if missing := sum(value is None or value != value for value in np.asarray(values).tolist()):
        raise ValueError(f"{missing} rows have no client.")
    distinct, codes = np.unique(np.asarray(values), return_inverse=True)
    return [str(value) for value in distinct.tolist()], codes


def _blocks(values: Any, codes: np.ndarray, clients: int) -> tuple[np.ndarray | None, np.ndarray | None]:
    """The block of each row, and the rows of each client in each block."""
    if values is None:
        return None, None
    blocks = np.asarray(values)
    if blocks.shape != codes.shape or blocks.dtype.kind not in "iu" or blocks.min() < 0:
        raise ValueError("block_by must give a whole number from 0 on for each row.")
    counts = np.zeros((clients, int(blocks.max()) + 1), np.int64)
    np.add.at(counts, (codes, blocks), 1)
    return blocks, counts
