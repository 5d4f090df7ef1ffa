"""Payloads and updates as flat tensors and a line of text: what any transport carries, and what is metered.

    parameters/<name>   separate/<name>   rows/<table>      and, as metadata, {"message": JSON}

The sender of an update is not in it: whoever receives knows from the connection.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch

from .core import ClientUpdate, Payload, WireMeter


Tensors = dict[str, torch.Tensor]
PARAMETERS, SEPARATE, ROWS = "parameters/", "separate/", "rows/"
MESSAGE = "message"


def payload_message(payload: Payload) -> tuple[Tensors, dict[str, str]]:
    """A payload, to be sent."""
    tensors = _flat(payload.tensors, payload.rows)
    tensors |= {SEPARATE + name: tensor for name, tensor in payload.separate.items()}
    return tensors, {MESSAGE: _text({"round": payload.round, "config": payload.config})}


def payload_from(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Payload:
    """What [`payload_message`] was made of; `ValueError` of anything else."""
    round, config = _said(metadata, "round", "config")
    if isinstance(round, bool) or not isinstance(round, int) or not isinstance(config, dict):
        raise ValueError("The message has no whole round, or no config by name.")
    return Payload(round, _under(PARAMETERS, tensors), _rows(tensors), config, _under(SEPARATE, tensors))


def update_message(update: ClientUpdate) -> tuple[Tensors, dict[str, str]]:
    """An update, to be sent."""
    said = {
        "round": update.round,
        "num_examples": update.num_examples,
        "metrics": update.metrics,
        "chain": update.chain,
    }
    return _flat(update.tensors, update.rows), {MESSAGE: _text(said)}


def update_from(client: str, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> ClientUpdate:
    """What [`update_message`] was made of, by `client`.

    What the client says is taken as it is: the algorithm checks types and values, and refuses the update by name.

    Raises:
        ValueError: the message is no JSON object with all that belongs to an update, or rows are no whole numbers.
    """
    round, num_examples, metrics, chain = _said(metadata, "round", "num_examples", "metrics", "chain")
    return ClientUpdate(client, round, _under(PARAMETERS, tensors), _rows(tensors), num_examples, metrics, chain)


class LayoutMeter(WireMeter):
    """A meter that writes a file once for each layout (names, shapes, dtypes, length of the text) and counts its size
    again for all of that layout: sizes are those of what [`WireMeter.send`] gives, for a fraction of the time.

    Args:
        keep: sizes that are remembered.
    """

    def __init__(self, *, keep: int = 100_000):
        super().__init__()
        self.keep, self._sizes = keep, {}
        self._latest: tuple[int, dict[str, int]] = (-1, {"up": 0, "down": 0})

    def size(self, message: tuple[Tensors, dict[str, str]]) -> int:
        """Bytes of a message, uncounted."""
        tensors, metadata = message
        layout = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
        key = hash((layout, tuple((name, len(json.dumps(text))) for name, text in metadata.items())))
        if key not in self._sizes:
            if len(self._sizes) >= self.keep:
                self._sizes.clear()
            self._sizes[key] = len(WireMeter().send(tensors, metadata=metadata))
        return self._sizes[key]

    def add(self, size: int, *, direction: str, round: int, what: str = "") -> None:
        """Count bytes that were sent."""
        if not size:
            return
        self._bytes[direction, round, None, what] += size
        if self._latest[0] != round:
            self._latest = (round, {"up": 0, "down": 0})
        self._latest[1][direction] += size

    def of_latest(self, round: int) -> dict[str, int]:
        """Bytes up and down of the round that is under way, without a look at all others."""
        return dict(self._latest[1]) if self._latest[0] == round else {"up": 0, "down": 0}


def _flat(parameters: Mapping[str, torch.Tensor], rows: Mapping[str, torch.Tensor]) -> Tensors:
    tensors = {PARAMETERS + name: tensor for name, tensor in parameters.items()}
    # no table has 2^31 rows
    return tensors | {ROWS + table: own.to(torch.int32) for table, own in rows.items()}


def _under(prefix: str, tensors: Mapping[str, torch.Tensor]) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _rows(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    found = _under(ROWS, tensors)
    for table, own in found.items():
        if own.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"The rows of {table!r} are {own.dtype}, whole numbers are expected.")
    return {table: own.to(torch.int64) for table, own in found.items()}


def _said(metadata: Mapping[str, str], *names: str) -> list[Any]:
    """What the line of text says of each name. `ValueError` where it says nothing."""
    try:
        said = json.loads(metadata[MESSAGE])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The metadata have no {MESSAGE!r} that is JSON ({type(error).__name__}).") from error
    if not isinstance(said, dict) or not said.keys() >= set(names):
        raise ValueError(f"The message is no JSON object with {', '.join(names)}.")
    return [said[name] for name in names]


def _text(said: Mapping[str, Any]) -> str:
    return json.dumps(said)  # NaN stays NaN: a client whose loss is not a number says so
