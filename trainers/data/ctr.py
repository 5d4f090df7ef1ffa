"""From a table of impressions (user, item, side features, label, time) to what a CTR model reads."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, DatasetDict, DatasetInfo, Features, List, Value

from hf_models.ctr import CtrConfig


PADDING, UNKNOWN = 0, 1
MODEL_INPUTS = ("categorical_features", "numeric_features", "sequence_features", "labels", "sample_weight")
MODEL_INPUTS += ("logit_offset",)
HISTORY = "history"


@dataclasses.dataclass(frozen=True)
class CtrColumns:
    """What the columns of a table of impressions are.

    Args:
        user, item (`str`): who, and what was shown.
        label (`str`): 1 for a click and 0 for none, as number or bool.
        user_features, item_features, context_features (`tuple[str, ...]`): categorical, of any type.
        numeric_features (`tuple[str, ...]`): numbers, which are standardised; of the context.
        bag_features (`tuple[str, ...]`): lists of values of the item, such as genres.
        time (`str`, *optional*): when; histories need it.
    """

    user: str
    item: str
    label: str
    user_features: tuple[str, ...] = ()
    item_features: tuple[str, ...] = ()
    context_features: tuple[str, ...] = ()
    numeric_features: tuple[str, ...] = ()
    bag_features: tuple[str, ...] = ()
    time: str | None = None

    def categorical(self) -> dict[str, str]:
        """Categorical columns in the order of `categorical_features`, and their roles."""
        roles = {"user": (self.user, *self.user_features), "item": (self.item, *self.item_features)}
        roles["context"] = self.context_features
        return {name: role for role, names in roles.items() for name in names}


class CtrVocabulary:
    """Ids of the values of a feature: 0 is padding, 1 an unknown value, and the known ones follow in their order."""

    def __init__(self, values: Sequence[str]):
        self.values = [str(value) for value in values]
        if len(set(self.values)) != len(self.values):
            raise ValueError("A vocabulary repeats a value.")

    @classmethod
    def fit(cls, values: Sequence[Any] | pa.ChunkedArray, *, min_count: int = 1) -> "CtrVocabulary":
        """The distinct `values`, as strings, that occur at least `min_count` times; the rest become unknown, which is
        what trains the row of the unknown: with 1 it keeps the weights that it was drawn with."""
        counts = _strings(values).drop_null().value_counts().to_pylist()
        return cls(sorted(row["values"] for row in counts if row["counts"] >= min_count))

    def __len__(self) -> int:
        return len(self.values) + UNKNOWN + 1

    def encode(self, values: Sequence[Any] | pa.ChunkedArray) -> np.ndarray:
        """Ids, int64; of None, padding."""
        strings = _strings(values)
        known = pc.index_in(strings.drop_null(), value_set=pa.array(self.values, pa.string()))
        ids = np.full(len(strings), PADDING, dtype=np.int64)
        ids[pc.is_valid(strings).to_numpy(zero_copy_only=False)] = (
            pc.fill_null(known, -1).to_numpy(zero_copy_only=False) + UNKNOWN + 1
        )
        return ids


class CtrRows(torch.utils.data.Dataset):
    """Rows as columns of tensors in memory: a batch is one indexing of each column, whatever its size.

    Args:
        tensors: what the model takes, by name; first dimension the rows.
        users: `(rows,)` int64, an index of the user; all one user if None.
    """

    fixed_rows = True  # federated clients may keep them

    def __init__(self, tensors: Mapping[str, torch.Tensor], users: torch.Tensor | None = None):
        self.tensors = dict(tensors)
        sizes = {len(tensor) for tensor in self.tensors.values()}
        if len(sizes) != 1:
            raise ValueError(f"Columns have {sorted(sizes)} rows; they must agree.")
        (count,) = sizes
        self.users = torch.zeros(count, dtype=torch.long) if users is None else users
        if len(self.users) != count:
            raise ValueError(f"{count} rows, but {len(self.users)} users.")

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "CtrRows":
        """The columns of a split of [`CtrData`] that a model takes, and `user`."""
        names = [name for name in (*MODEL_INPUTS, "user") if name in dataset.column_names]
        tensors = {name: torch.from_numpy(_array(column)) for name, column in _arrow(dataset, names).items()}
        users = tensors.pop("user", None)
        return cls(tensors, users)

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def __getitems__(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        """A whole batch; DataLoader asks for it in one call and hands it to the collator."""
        return self.select(indices).tensors

    def select(self, indices: Sequence[int] | torch.Tensor) -> "CtrRows":
        """These rows; a mask works as well."""
        index = torch.as_tensor(indices)
        return CtrRows({name: tensor[index] for name, tensor in self.tensors.items()}, self.users[index])

    def by_user(self) -> dict[int, "CtrRows"]:
        """The rows of each user, in their order."""
        order = self.users.argsort(stable=True)
        users, counts = self.users[order].unique_consecutive(return_counts=True)
        return {int(user): self.select(rows) for user, rows in zip(users, order.split(counts.tolist()))}


class CtrCollator:
    """Rows of a `datasets.Dataset` or of [`CtrRows`] to a batch; a batch that [`CtrRows`] made stays as it is.

    Columns that no model takes, such as `user`, are left out, so that the Trainer needs `remove_unused_columns=False`.
    """

    def __call__(self, rows: Mapping[str, torch.Tensor] | Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        if isinstance(rows, Mapping):
            return {name: rows[name] for name in MODEL_INPUTS if name in rows}
        batch = {}
        for name in (name for name in MODEL_INPUTS if name in rows[0]):
            dtype = torch.long if name in ("categorical_features", "sequence_features") else torch.float32
            batch[name] = torch.from_numpy(np.stack([np.asarray(row[name]) for row in rows])).to(dtype)
        return batch


@dataclasses.dataclass(frozen=True)
class CtrData:
    """Impressions ready for a model.

    Args:
        splits (`DatasetDict`): columns `user` (index into `user_names`), `labels`, `categorical_features`, and as far
            as there are any `numeric_features`, `sequence_features`, `time`.
        features (`list[dict]`): what [`CtrConfig`] is told of the columns.
        vocabularies (`dict[str, CtrVocabulary]`): of each table.
        user_names (`list[str]`): the users of all splits.
        prior (`float`): share of positives in the training split, the global CTR.
    """

    splits: DatasetDict
    features: list[dict[str, Any]]
    vocabularies: dict[str, CtrVocabulary]
    user_names: list[str]
    prior: float

    def config(self, architecture: str, **fields: Any) -> CtrConfig:
        """A configuration for these features, its intercept beginning at the global CTR."""
        return CtrConfig(**({"features": self.features, "architecture": architecture, "prior": self.prior} | fields))

    def rows(self, split: str) -> CtrRows:
        """A split as tensors."""
        return CtrRows.from_dataset(self.splits[split])

    def without_users(self, users: Collection[int], splits: Sequence[str]) -> "CtrData":
        """These `splits` without the rows of some users, whose rows of the tables nothing then trains; the prior is
        that of what is left of the first."""
        kept = {}
        for split in splits:
            found = np.asarray(self.splits[split]["user"][:])
            kept[split] = self.splits[split].select(np.flatnonzero(~np.isin(found, list(users))))
        prior = float(np.mean(kept[splits[0]]["labels"][:]))
        return dataclasses.replace(self, splits=DatasetDict(kept), prior=prior)

    @cached_property
    def fingerprint(self) -> str:
        """Of every number that a model or a metric sees, and of what the features are."""
        digest = hashlib.sha256(repr((self.features, self.user_names)).encode())
        for split in self.splits:
            rows = self.rows(split)
            for name, tensor in (("user", rows.users), *sorted(rows.tensors.items())):
                digest.update(f"{split}/{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()[:16]}"


def encode_ctr(
    splits: DatasetDict,
    columns: CtrColumns,
    *,
    history_length: int = 0,
    history_until: Literal["row", "train"] = "row",
    min_count: int | Mapping[str, int] = 1,
    train: str = "train",
) -> CtrData:
    """
    Vocabularies and scales of the training split, and every split encoded by them.

    Args:
        splits: rows of impressions, in any order.
        columns: what they are.
        history_length: length of a sequence feature `history`: the last items that the user clicked strictly before
            the row's time, in whichever split that was, oldest first; 0 for none. What comes at the same time, the row
            itself included, is no past.
        history_until: `"row"`, as a service knows it that sees every click at once; `"train"`: only clicks of the
            training split count, so that later rows have the history that was there when training ended.
        min_count: values seen less often in training are unknown, whose row is trained on them; by column, or one
            number for all. With 1 no row of training is unknown, and the row of the unknown is not trained.
        train: name of the training split.

    Raises:
        ValueError: a column is missing, labels are not 0 and 1, users or times are missing, a number is infinite, the
            training split is empty, or histories are asked for without a time.
    """
    if history_until not in ("row", "train"):
        raise ValueError(f"history_until={history_until!r} is not known. Choose 'row' or 'train'.")
    _require_columns(splits, columns, train)
    if history_length and columns.time is None:
        raise ValueError("A history is the past; name the column of the time, or set history_length=0.")
    names = [*columns.categorical(), columns.label, *columns.numeric_features, *columns.bag_features]
    tables = {split: _arrow(rows, names + [columns.time] * bool(columns.time)) for split, rows in splits.items()}
    _require_labels(tables, columns.label)
    _require_present(tables, [columns.user, columns.time] if columns.time else [columns.user])
    vocabularies = {}
    for name in (*columns.categorical(), *columns.bag_features):
        least = min_count if isinstance(min_count, int) else min_count.get(name, 1)
        column = tables[train][name]
        values = pc.list_flatten(column) if name in columns.bag_features else column
        vocabularies[name] = CtrVocabulary.fit(values, min_count=least)
    users = CtrVocabulary.fit(pa.concat_arrays([_strings(table[columns.user]) for table in tables.values()]))
    _require_finite(tables, columns.numeric_features)
    scales = {name: _scale(_array(tables[train][name])) for name in columns.numeric_features}
    arrays = {split: _encoded(table, columns, vocabularies, users, scales) for split, table in tables.items()}
    if history_length:
        counted = [train] if history_until == "train" else list(arrays)
        _add_histories(arrays, list(columns.categorical()).index(columns.item), history_length, counted)
    return CtrData(
        splits=DatasetDict({split: _dataset(encoded) for split, encoded in arrays.items()}),
        features=_features(columns, vocabularies, history_length),
        vocabularies=vocabularies,
        user_names=users.values,
        prior=float(arrays[train]["labels"].mean()),
    )


def past_clicks(
    users: np.ndarray, times: np.ndarray, clicked: np.ndarray, items: np.ndarray, length: int
) -> np.ndarray:
    """`(rows, length)`: the items of the user's last clicks strictly before each row, oldest first, then 0."""
    order = np.lexsort((times, users))
    u, t, c = users[order], times[order], clicked[order].astype(bool)
    before = np.concatenate([[0], np.cumsum(c)])  # clicks of anybody ahead of a place in the order
    new_user = np.concatenate([[True], u[1:] != u[:-1]])
    new_time = new_user | np.concatenate([[True], t[1:] != t[:-1]])
    places = np.arange(len(u))
    first_of_user = np.maximum.accumulate(np.where(new_user, places, 0))
    first_of_time = np.maximum.accumulate(np.where(new_time, places, 0))
    end = before[first_of_time]
    start = np.maximum(before[first_of_user], end - length)
    window = start[:, None] + np.arange(length)  # (rows, length), places among all clicks
    clicks = np.concatenate([items[order][c], np.zeros(length + 1, dtype=items.dtype)])
    histories = np.where(window < end[:, None], clicks[np.minimum(window, len(clicks) - 1)], PADDING)
    found = np.empty_like(histories)
    found[order] = histories
    return found


def _encoded(
    table: Mapping[str, pa.ChunkedArray],
    columns: CtrColumns,
    vocabularies: Mapping[str, CtrVocabulary],
    users: CtrVocabulary,
    scales: Mapping[str, tuple[float, float]],
) -> dict[str, np.ndarray]:
    """The columns of a split, without histories."""
    encoded = {
        "user": users.encode(table[columns.user]) - UNKNOWN - 1,
        "labels": _array(table[columns.label]).astype(np.float32),
        "categorical_features": np.stack(
            [vocabularies[name].encode(table[name]) for name in columns.categorical()], axis=1
        ),
    }
    if columns.time is not None:
        encoded["time"] = _times(table[columns.time])
    if columns.numeric_features:
        numbers = [(_array(table[name]).astype(np.float64) - m) / s for name, (m, s) in scales.items()]
        encoded["numeric_features"] = np.nan_to_num(np.stack(numbers, axis=1)).astype(np.float32)
    if columns.bag_features:
        bags = [_bags(table[name], vocabularies[name]) for name in columns.bag_features]
        encoded["sequence_features"] = _joined(bags)
    return encoded


def _add_histories(
    arrays: Mapping[str, dict[str, np.ndarray]], item_column: int, length: int, counted: Sequence[str]
) -> None:
    """Put a history behind the bags of every split, from the clicks of the splits in `counted`."""
    parts = list(arrays.values())
    users, times, labels = (np.concatenate([part[name] for part in parts]) for name in ("user", "time", "labels"))
    counts = np.concatenate([np.full(len(part["labels"]), split in counted) for split, part in arrays.items()])
    items = np.concatenate([part["categorical_features"][:, item_column] for part in parts])
    histories = past_clicks(users, times, (labels == 1) & counts, items, length)
    ends = np.cumsum([len(part["labels"]) for part in parts])
    for part, history in zip(parts, np.split(histories, ends[:-1])):
        bags = part.get("sequence_features")
        part["sequence_features"] = _joined([*([] if bags is None else bags.transpose(1, 0, 2)), history])


def _bags(column: pa.ChunkedArray, vocabulary: CtrVocabulary) -> np.ndarray:
    """`(rows, longest)` ids of lists of values, then 0."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    table = np.zeros((len(lengths), max(lengths.max(initial=0), 1)), dtype=np.int64)
    table[np.arange(table.shape[1]) < lengths[:, None]] = vocabulary.encode(pc.list_flatten(column))
    return table


def _joined(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """`(rows, S, L)` of tables `(rows, l)`, filled up to the longest."""
    longest = max(sequence.shape[1] for sequence in sequences)
    return np.stack([np.pad(s, ((0, 0), (0, longest - s.shape[1]))) for s in sequences], axis=1)


def _dataset(arrays: Mapping[str, np.ndarray]) -> Dataset:
    """Fixed-size lists, which become arrays and tensors again without a loop over rows."""
    features, columns = {}, {}
    for name, array in arrays.items():
        features[name], columns[name] = Value(str(array.dtype)), pa.array(array.ravel())
        for size in reversed(array.shape[1:]):
            features[name] = List(features[name], length=size)
            columns[name] = pa.FixedSizeListArray.from_arrays(columns[name], size)
    return Dataset(pa.table(columns), info=DatasetInfo(features=Features(features)))


def _features(
    columns: CtrColumns, vocabularies: Mapping[str, CtrVocabulary], history_length: int
) -> list[dict[str, Any]]:
    described = [
        {"name": name, "kind": "categorical", "role": role, "vocab_size": len(vocabularies[name])}
        for name, role in columns.categorical().items()
    ]
    described += [{"name": name, "kind": "numeric", "role": "context"} for name in columns.numeric_features]
    described += [
        {"name": name, "kind": "sequence", "role": "item", "vocab_size": len(vocabularies[name])}
        for name in columns.bag_features
    ]
    if history_length:
        described.append({"name": HISTORY, "kind": "sequence", "role": "user", "shares": columns.item})
    return described


def _scale(values: np.ndarray) -> tuple[float, float]:
    """Mean and deviation; 1 for a column that does not vary, whose deviation is what rounding leaves of 0."""
    numbers = values.astype(np.float64)
    numbers = numbers[~np.isnan(numbers)]
    if not len(numbers):
        return 0.0, 1.0
    varies = numbers.min() < numbers.max()
    return float(numbers.mean()), (float(numbers.std()) if varies else 0.0) or 1.0


def _arrow(dataset: Dataset, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    table = dataset.select_columns(list(names)).with_format("arrow")[:]
    return {name: table[name] for name in names}


def _strings(values: Sequence[Any] | pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if not isinstance(values, pa.Array):
        values = pa.array([None if value is None else str(value) for value in values], pa.string())
    return values.cast(pa.string())


def _array(column: pa.ChunkedArray) -> np.ndarray:
    """A column of numbers, or of lists of one length, as `(rows, ...)`; the caller's own."""
    array, shape = column.combine_chunks(), [len(column)]
    while pa.types.is_fixed_size_list(array.type):
        shape.append(array.type.list_size)
        array = array.flatten()
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):  # what `Dataset.map` may have made of it
        return np.array(column.to_pylist())
    return np.array(array.to_numpy(zero_copy_only=False)).reshape(shape)


def _times(column: pa.ChunkedArray) -> np.ndarray:
    """Numbers that grow with the time: dates and times as whole microseconds."""
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("us"))
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz), safe=False).cast(pa.int64())
    return _array(column)


def _require_columns(splits: DatasetDict, columns: CtrColumns, train: str) -> None:
    if train not in splits or not len(splits[train]):
        raise ValueError(f"There is no split {train!r} with rows; there are {sorted(splits)}.")
    wanted = [*columns.categorical(), columns.label, *columns.numeric_features, *columns.bag_features]
    wanted += [columns.time] if columns.time else []
    for split, dataset in splits.items():
        if missing := [name for name in wanted if name not in dataset.column_names]:
            raise ValueError(f"{split} lacks the columns {missing}; it has {dataset.column_names}.")


def _require_labels(tables: Mapping[str, Mapping[str, pa.ChunkedArray]], label: str) -> None:
    for split, table in tables.items():
        values = set(pc.unique(table[label]).to_pylist())
        if not values <= {0, 1}:
            raise ValueError(f"{split}: {label!r} holds {sorted(map(str, values))[:5]}; clicks are 0 or 1.")


def _require_present(tables: Mapping[str, Mapping[str, pa.ChunkedArray]], names: Sequence[str]) -> None:
    for split, table in tables.items():
        for name in names:
            if missing := pc.sum(pc.is_null(table[name], nan_is_null=True)).as_py():
                raise ValueError(f"{split}: {missing} rows have no {name!r}; drop them.")


def _require_finite(tables: Mapping[str, Mapping[str, pa.ChunkedArray]], names: Sequence[str]) -> None:
    for split, table in tables.items():
        for name in names:
            if infinite := int(np.isinf(_array(table[name]).astype(np.float64)).sum()):
                raise ValueError(f"{split}: {infinite} values of {name!r} are infinite; clip them, or use None.")


__all__ = ["CtrCollator", "CtrColumns", "CtrData", "CtrRows", "CtrVocabulary", "encode_ctr", "past_clicks"]
