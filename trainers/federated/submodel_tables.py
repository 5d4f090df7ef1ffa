"""Embedding tables of which a client has only some rows, and which rows it reads.

For a client with |S| of V rows, the table in the model holds these |S| rows while it trains, so that a step costs |S|
rows and not V, and an id outside of S is an error instead of a stale vector.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .master_weights import MasterWeights


Tensors = dict[str, torch.Tensor]


class SubmodelTables:
    """The tables of a model that can be narrowed, see [`embedding_tables`]."""

    def __init__(self, model: nn.Module, weights: MasterWeights):
        self._weights = weights
        self._modules = embedding_tables(model)
        self._positions: Tensors = {}  # of each row of a table, where it is in the narrowed one; -1: nowhere

    @contextlib.contextmanager
    def narrowed(self, rows: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> Iterator[Tensors]:
        """Within, the tables that `rows` names have room for these rows only; ids stay those of the whole table.

        Gives what to train from: `values`, where a table's row of padding, if it is none of its rows, comes after
        them. Nobody trains it, and it stays as the model has it.

        Raises:
            ValueError: rows of a parameter that is no table which can be narrowed.
        """
        inside, leave = dict(values), contextlib.ExitStack()
        with leave:
            for name, own in rows.items():
                if name not in self._modules:
                    raise ValueError(
                        f"{name!r} came as rows, but is no trainable nn.Embedding of its own in this model; tables "
                        "that an output layer shares have dense gradients and travel whole."
                    )
                inside[name] = self._narrow(name, own.to(values[name].device), values[name], leave)
            yield inside

    def _narrow(self, name: str, own: torch.Tensor, values: torch.Tensor, leave: contextlib.ExitStack) -> torch.Tensor:
        module, whole, padding = self._modules[name], self._weights.masters[name].data, self._modules[name].padding_idx
        if name not in self._positions:
            self._positions[name] = torch.full((len(whole),), -1, device=whole.device)
        positions = self._positions[name]
        positions[own] = torch.arange(len(own), device=own.device)
        known = own
        if padding is not None and int(positions[padding]) < 0:
            positions[padding] = len(own)
            known = torch.cat([own, own.new_tensor([padding])])
            values = torch.cat([values, whole[padding : padding + 1].to(values.dtype)])
        hook = module.register_forward_pre_hook(lambda _, inputs: (_found(name, positions, inputs[0]), *inputs[1:]))
        self._weights.set_data(name, torch.empty_like(values))
        if padding is not None:
            module.padding_idx = int(positions[padding])

        def widen() -> None:
            hook.remove()
            module.padding_idx = padding
            positions[known] = -1
            self._weights.drop_gradient(name)
            self._weights.set_data(name, whole)

        leave.callback(widen)
        return values


def _found(name: str, positions: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    found = positions[ids]
    if ids.device.type == "cpu" and (lacking := found < 0).any():  # a GPU would have to be waited for
        raise ValueError(
            f"{name!r}: rows {ids[lacking].unique()[:3].tolist()} are read in training, and are not among those that "
            "this client got. Give involvement= with all rows it may read, or submodels=False."
        )
    return found


def embedding_tables(model: nn.Module) -> dict[str, nn.Embedding]:
    """Trainable `nn.Embedding` modules whose weight nothing else in the model shares, by the name of the weight."""
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    return {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and module.weight.requires_grad
        and module.max_norm is None  # which writes to the table
        and owners[id(module.weight)] == 1
    }


def rows_reader(model: nn.Module) -> Callable[[Mapping[str, Any]], Tensors]:
    """What tells which rows of which tables a batch reads, padding left out: the model's own `touched_rows` if it has
    one, else `get_input_embeddings()` and the model's main input.

    Raises:
        ValueError: neither is there, or the input embeddings are tied to another layer, whose gradient is dense.
    """
    if hasattr(model, "touched_rows"):
        names = inspect.signature(model.touched_rows).parameters

        def touched(batch: Mapping[str, Any]) -> Tensors:
            found = model.touched_rows(**{name: value for name, value in batch.items() if name in names})
            return {table.parameter: table.rows for table in found}

        return touched
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    table = next((name for name, module in embedding_tables(model).items() if module is embeddings), None)
    if table is None:
        raise ValueError(
            f"{type(model).__name__} has no trainable input embeddings of their own, whose rows could travel alone "
            "(tied ones get dense gradients from the output layer: tie_word_embeddings=False). Give involvement=."
        )
    source = getattr(model, "main_input_name", "input_ids")

    def read(batch: Mapping[str, Any]) -> Tensors:
        rows = batch[source].unique()
        return {table: rows if embeddings.padding_idx is None else rows[rows != embeddings.padding_idx]}

    return read
