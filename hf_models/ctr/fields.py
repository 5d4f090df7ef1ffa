"""Features of a row as vectors and as first-order weights: the tables, and which of their rows a batch touches."""

from typing import Any, NamedTuple

import torch
from torch import nn

from .interactions import mean_of_known


class TouchedRows(NamedTuple):
    """Rows of one table that a batch reads and whose gradient is therefore not 0.

    `parameter` is the table's name in the model's state dict, `rows` ascend without repetition and leave padding out.
    `feature` is the one that the table belongs to; a history that shares it adds its rows here.
    """

    feature: str
    parameter: str
    module: nn.Embedding
    rows: torch.Tensor


class CtrNumericFields(nn.Module):
    """One vector for each number, scaled by it: the embedding of a numeric feature in factorisation machines."""

    def __init__(self, count: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, width))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """`(batch, N)` to `(batch, N, width)`."""
        return values.to(self.weight.dtype)[..., None] * self.weight


class CtrFields(nn.Module):
    """The embeddings of a row's features: categorical, numeric, sequences."""

    def __init__(self, config):
        super().__init__()
        width = config.embedding_dim
        self.columns = [feature["name"] for feature in config.categorical]
        self.sequences = [(f["name"], f.get("shares")) for f in config.sequences]
        self.tables = nn.ModuleDict(
            {name: nn.Embedding(rows, width, padding_idx=0) for name, rows in config.tables.items()}
        )
        if config.numeric:
            self.numeric = CtrNumericFields(len(config.numeric), width)

    def forward(
        self,
        categorical_features: torch.Tensor,
        numeric_features: torch.Tensor | None,
        sequence_features: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors of single values `(batch, F + N, d)`, and of the entries of sequences `(batch, S, L, d)`."""
        fields = torch.stack([self.tables[name](categorical_features[:, i]) for i, name in enumerate(self.columns)], 1)
        if hasattr(self, "numeric"):
            fields = torch.cat([fields, self.numeric(numeric_features)], dim=1)
        if not self.sequences:
            return fields, None
        tables = [self.tables[shared or name] for name, shared in self.sequences]
        return fields, torch.stack([table(sequence_features[:, i]) for i, table in enumerate(tables)], dim=1)


class CtrFirstOrder(nn.Module):
    """One weight for each value, summed over the features of a row; of a sequence, the mean over its entries."""

    def __init__(self, config):
        super().__init__()
        tables = config.tables
        self.columns = [(i, f["name"]) for i, f in enumerate(config.categorical) if config.has_first_order(f)]
        self.numbers = [i for i, feature in enumerate(config.numeric) if config.has_first_order(feature)]
        self.sequences = [(i, f["name"]) for i, f in enumerate(config.sequences) if config.has_first_order(f)]
        sizes = {f["name"]: tables[f.get("shares", f["name"])] for f in config.features if f["kind"] != "numeric"}
        self.tables = nn.ModuleDict(
            {name: nn.Embedding(sizes[name], 1, padding_idx=0) for _, name in self.columns + self.sequences}
        )
        if self.numbers:
            self.numeric = CtrNumericFields(len(self.numbers), 1)

    def forward(
        self,
        categorical_features: torch.Tensor,
        numeric_features: torch.Tensor | None,
        sequence_features: torch.Tensor | None,
    ) -> torch.Tensor:
        """`(batch,)`."""
        terms = [self.tables[name](categorical_features[:, i]) for i, name in self.columns]
        if self.numbers:
            terms.append(self.numeric(numeric_features[:, self.numbers]).sum(1))
        for i, name in self.sequences:
            ids = sequence_features[:, i]
            terms.append(mean_of_known(self.tables[name](ids), ids != 0))
        return torch.cat(terms, dim=1).sum(1)


def touched_rows(
    part: CtrFields | CtrFirstOrder,
    prefix: str,
    config: Any,
    categorical_features: torch.Tensor | None,
    sequence_features: torch.Tensor | None,
) -> list[TouchedRows]:
    """What a batch, `categorical_features (batch, columns)` and `sequence_features (batch, sequences, length)`, reads
    of the tables of `part`, whose name in the state dict is `prefix`."""
    ids = {name: [] for name in part.tables}
    if categorical_features is not None:
        for i, feature in enumerate(config.categorical):
            ids.get(feature["name"], []).append(categorical_features[:, i].flatten())
    if sequence_features is not None:
        for i, feature in enumerate(config.sequences):
            own = feature["name"] in ids
            ids.get(feature["name"] if own else feature.get("shares"), []).append(sequence_features[:, i].flatten())
    found = []
    for name, seen in ids.items():
        rows = torch.cat(seen).unique() if seen else torch.zeros(0, dtype=torch.long)
        found.append(TouchedRows(name, f"{prefix}.tables.{name}.weight", part.tables[name], rows[rows != 0]))
    return found


__all__ = ["CtrFields", "CtrFirstOrder", "CtrNumericFields", "TouchedRows", "touched_rows"]
