"""Questions to nodes, and which answers count.

A node signs its requests to the SuperLink, but an answer names its node itself. So each question carries a nonce that
its node alone gets to know, and an answer must return it: nobody answers for another, and no answer counts for a
later question.
"""

import secrets
from collections.abc import Sequence
from typing import Any

from flwr.app import Message

from .records import NONCE, about_in, files_in, record_of


class AnswerError(ValueError):
    """An answer of `node` that does not count, and the `reason`."""

    def __init__(self, node: int, reason: str):
        super().__init__(f"node {node}: {reason}")
        self.node, self.reason = node, reason


class Questions:
    """Of one kind, one to each of some nodes.

    Args:
        kind: Flower's message type, which says what function of the `ClientApp` answers.
        ttl: seconds for which a question is worth an answer; later, the SuperLink delivers neither.
    """

    def __init__(self, kind: str, *, ttl: float):
        self.kind, self.ttl = kind, ttl
        self._nonces: dict[int, str] = {}

    def to(self, node: int, files: Sequence[bytes] = (), **about: str | int | float) -> Message:
        """One of them."""
        self._nonces[node] = secrets.token_hex(16)
        content = record_of(files, about | {NONCE: self._nonces[node]})
        return Message(content, node, self.kind, ttl=self.ttl)

    def answer(self, reply: Message) -> tuple[int, dict[str, Any], list[bytes]]:
        """The node, and the words and files that it answered.

        Raises:
            AnswerError: it failed, or this is no answer to these questions.
        """
        node = reply.metadata.src_node_id
        if reply.has_error():
            raise AnswerError(node, f"it failed: {reply.error.reason}")
        about = about_in(reply.content)
        if node not in self._nonces or about.get(NONCE) != self._nonces[node]:
            raise AnswerError(node, "it answers no question that it was asked now")
        try:
            return node, about, files_in(reply.content)
        except ValueError as error:
            raise AnswerError(node, str(error)) from error
