"""Which node is which client: by the key that it signs with, not by what it says.

A SuperLink lets a node speak for itself only, by signatures with the node's key, and tells a ServerApp that key. A
file beside the server says whose key is whose:

    {"hospital a": "ecdsa-sha2-nistp384 AAAA...", "hospital b": "ecdsa-sha2-nistp384 BBBB..."}

In a simulation there are no keys, the engine makes the nodes, and they are believed. A node that says to be another
client than its key's is refused, and named.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from flwr.serverapp import Grid
from transformers.utils import logging

from ...core import unpack
from .questions import AnswerError, Questions
from .records import CLIENT, REGISTER
from .remote_clients import Registration, RemoteClients


logger = logging.get_logger(__name__)

BLOCK_COUNTS, NUM_EXAMPLES, POSITION = "block_counts", "num_examples", "position"


def read_identities(path: str | os.PathLike) -> dict[str, str]:
    """`{client: public key}` from a file. `ValueError` if it is none, or a key is there twice or is no key."""
    try:
        identities = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{Path(path).name} is no JSON: {error}.") from error
    if not isinstance(identities, dict) or not all(isinstance(key, str) for key in identities.values()):
        raise ValueError(f"{Path(path).name} must be {{client: public key}}.")
    _clients_by_key(identities)
    return identities


def write_identities(path: str | os.PathLike, identities: Mapping[str, str]) -> None:
    """The counterpart of [`read_identities`]."""
    _clients_by_key(identities)
    Path(path).write_text(json.dumps(dict(identities), indent=1) + "\n", encoding="utf-8")


class Nodes:
    """The nodes of a grid, as clients.

    Args:
        identities: `{client: public key}`, in the order of clients, keys as OpenSSH or PEM text. `None`: clients are
            whom they say they are, where nodes have no keys.
        timeout: seconds that a node has to register.
        attempts: how often a node is asked that does not.
    """

    def __init__(self, identities: Mapping[str, str] | None = None, *, timeout: float = 600.0, attempts: int = 3):
        self._order = None if identities is None else list(identities)
        self._clients_by_key = None if identities is None else _clients_by_key(identities)
        self.timeout, self._attempts = timeout, attempts
        self._failures: dict[int, int] = {}
        self._client_of: dict[int, str] = {}
        self._node_of: dict[str, int] = {}
        self._told: dict[str, tuple[int, Registration]] = {}
        self.refused: dict[int, str] = {}

    def client(self, node: int) -> str | None:
        """Who a node is; `None` of one that is not registered."""
        return self._client_of.get(node)

    def node(self, client: str) -> int:
        """Where a client is."""
        return self._node_of[client]

    def online(self, grid: Grid) -> list[str]:
        """The clients that are there now; those that are new are registered first."""
        there = set(grid.get_node_ids())
        if strange := sorted(there - self._client_of.keys() - self.refused.keys()):
            self._register(grid, strange)
        return [client for client, node in self._node_of.items() if node in there]

    def wait(self, grid: Grid, count: int | None = None) -> None:
        """Until all clients are registered, `count` of them where there are no identities.

        Raises:
            TimeoutError: they are not, within the timeout; it names those that are missing.
        """
        if (count is None) == (self._order is None):
            raise ValueError("Without identities, say how many clients there are; with them, don't.")
        end = time.monotonic() + self.timeout
        while True:
            self.online(grid)
            missing = sorted(set(self._order or ()) - self._told.keys()) or max((count or 0) - len(self._told), 0)
            if not missing:
                return
            if time.monotonic() > end:
                refused = "".join(f"; node {node} was refused: {reason}" for node, reason in self.refused.items())
                raise TimeoutError(f"After {self.timeout:.0f} s these clients are missing: {missing}{refused}.")
            time.sleep(min(1.0, self.timeout))

    def population(self) -> dict[str, Any]:
        """What a `FederatedTrainer` on the server takes in place of a dataset."""
        order = self._order
        if order is None:
            order = sorted(self._told, key=lambda client: (self._told[client][0], client))
        clients = RemoteClients({client: self._told[client][1] for client in order})
        involvement = clients.involvement
        return {"train_dataset": clients, "involvement": involvement, "submodels": involvement is not None}

    def _register(self, grid: Grid, strange: list[int]) -> None:
        expected = {node: self._by_key(node, key) for node, key in _keys(grid, strange).items()}
        questions = Questions(REGISTER, ttl=self.timeout)
        asked = [node for node in expected if node not in self.refused]
        heard, reasons = set(), {}
        for reply in grid.send_and_receive([questions.to(node) for node in asked], timeout=self.timeout):
            try:
                node, about, files = questions.answer(reply)
                heard.add(node)
                self._believe(node, expected[node], about, files)
            except AnswerError as error:
                reasons[error.node] = f", {error.reason}"
                logger.warning("Registration: %s", error)
        for node in set(asked) - heard:
            self._failures[node] = self._failures.get(node, 0) + 1
            if self._failures[node] >= self._attempts:
                self._refuse(node, f"it did not register when asked {self._attempts} times{reasons.get(node, '')}")

    def _by_key(self, node: int, key: bytes) -> str | None:
        """Whose key it is; `None`: there are no keys, and it may say."""
        canonical = _canonical(key)
        if self._clients_by_key is None:
            if canonical is not None:
                raise ValueError(
                    "These nodes have keys, so this is no simulation: say whose they are, by identities (in the run "
                    'configuration, identities = "<file>")'
                )
            return None
        client = self._clients_by_key.get(canonical)
        if client is None:
            self._refuse(node, "its key is none of those in the identities")
        return client

    def _believe(self, node: int, expected: str | None, about: Mapping[str, Any], files: list[bytes]) -> None:
        claimed = about.get(CLIENT)
        if expected is not None and claimed != expected:
            self._refuse(node, f"it says that it is {claimed!r}, by its key it is {expected!r}")
            return
        if not isinstance(claimed, str):
            self._refuse(node, f"its name is {claimed!r}, a text is expected")
            return
        if expected is None and claimed in self._told:
            self._refuse(node, f"it says that it is {claimed!r}, whom node {self._node_of[claimed]} is already")
            return
        try:
            told = int(about.get(POSITION, 0)), _registration(about, files)
        except (ValueError, TypeError, KeyError) as error:
            self._refuse(node, f"what {claimed!r} tells of itself cannot be: {error}")
            return
        self._told.setdefault(claimed, told)
        self._client_of[node], self._node_of[claimed] = claimed, node

    def _refuse(self, node: int, reason: str) -> None:
        self.refused[node] = reason
        logger.warning("Node %d is refused: %s.", node, reason)


def _registration(about: Mapping[str, Any], files: list[bytes]) -> Registration:
    count, blocks = about[NUM_EXAMPLES], about.get(BLOCK_COUNTS)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"its number of examples is {count!r}")
    if blocks is not None:
        blocks = [int(number) for number in blocks]
        if not blocks or min(blocks) < 0 or sum(blocks) != count:
            raise ValueError(f"its {count} examples are not those of its blocks, {blocks}")
    rows = {table: own.to(torch.int64) for file in files for table, own in unpack(file)[0].items()}
    return Registration(count, blocks, rows)


def _keys(grid: Grid, nodes: list[int]) -> dict[int, bytes]:
    wanted = set(nodes)
    return {node.node_id: node.public_key for node in grid.get_nodes() if node.node_id in wanted}


def _clients_by_key(identities: Mapping[str, str]) -> dict[bytes, str]:
    found: dict[bytes, str] = {}
    for client, text in identities.items():
        key = _canonical(text.encode())
        if key is None:
            raise ValueError(f"The key of {client!r} is no public key, as OpenSSH or PEM has them.")
        if key in found:
            raise ValueError(f"{found[key]!r} and {client!r} have the same key.")
        found[key] = client
    return found


def _canonical(key: bytes) -> bytes | None:
    """The same bytes for all spellings of a public key; `None` if it is none."""
    for load in (serialization.load_pem_public_key, serialization.load_ssh_public_key):
        try:
            public = load(key)
        except (ValueError, UnsupportedAlgorithm):
            continue
        return public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return None
