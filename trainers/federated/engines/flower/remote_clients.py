"""The clients of a federation as its server knows them: by what they told, without their examples."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np
import torch

from ...partition import ClientRows


@dataclass(frozen=True)
class Registration:
    """What a client tells of itself, once.

    Args:
        num_examples: how many it has.
        block_counts: how many of each block, for algorithms with blocks.
        rows: of each table, the rows that its examples read, where the server is to know.
    """

    num_examples: int
    block_counts: list[int] | None = None
    rows: Mapping[str, torch.Tensor] = field(default_factory=dict)


class RemoteClients(ClientRows):
    """In the order given; whoever asks for the examples themselves gets a `RuntimeError`."""

    def __init__(self, registrations: Mapping[str, Registration]):
        self.names = list(registrations)
        self._index = {name: index for index, name in enumerate(self.names)}
        self._registrations = dict(registrations)
        counts = [told.block_counts for told in registrations.values()]
        self._block_counts = None
        if counts and all(count is not None for count in counts):
            width = max(map(len, counts))
            self._block_counts = np.array([[*count, *[0] * (width - len(count))] for count in counts])

    def __len__(self) -> int:
        return sum(self.num_examples.values())

    @property
    def num_examples(self) -> dict[str, int]:
        """Of each client, as it told."""
        return {name: told.num_examples for name, told in self._registrations.items()}

    @property
    def involvement(self) -> dict[str, Mapping[str, torch.Tensor]] | None:
        """The rows of each client, if they told."""
        told = {name: one.rows for name, one in self._registrations.items()}
        return told if any(told.values()) else None

    def fingerprint(self) -> str:
        """Hash of what they told; of the examples themselves nothing is known."""
        told = [[name, one.num_examples, one.block_counts] for name, one in self._registrations.items()]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def count(self, client: str, block: int | None = None) -> int:
        """See [`ClientRows.count`][trainers.federated.partition.ClientRows.count]."""
        if block is None or self._block_counts is None:
            return self._registrations[client].num_examples
        counts = self._block_counts[self._index[client]]
        return int(counts[block]) if block < len(counts) else 0

    def indices(self, client: str, block: int | None = None) -> NoReturn:
        """`RuntimeError`: they are not here."""
        raise RuntimeError(f"The examples of {client!r} are on its node, the server has none.")

    data = indices
