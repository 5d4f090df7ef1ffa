"""What crosses the wire: tensors as bytes, and a meter that counts the bytes which it hands out."""

import json
from collections import Counter
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save


Direction = Literal["up", "down"]
DIRECTIONS = ("up", "down")


class WireError(ValueError):
    """A payload that is no safetensors file, or metadata that cannot be in one."""


def pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """`tensors` and `metadata` as one safetensors file. Equal tensors without metadata give equal bytes.

    Tensors that share memory, such as tied weights, are written each; those of other devices come over the CPU.

    Raises:
        WireError: a value is no tensor, or the metadata is not from strings to strings.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not isinstance(name, str):
            raise WireError(f"{name!r}: tensors by name expected, got {type(tensor).__name__}.")
    for name, value in (metadata or {}).items():
        if not (isinstance(name, str) and isinstance(value, str)):
            raise WireError(f"metadata {name!r}: strings expected, got {type(value).__name__}; use `json.dumps`.")
    # each a copy of its own: safetensors refuses memory that two names share
    own = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return save(own, metadata=dict(metadata) if metadata else None)


def unpack(payload: bytes) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors and the metadata of [`pack`]; the tensors are on the CPU and may be written to.

    Raises:
        WireError: the payload is cut off or is no safetensors file.
    """
    try:
        tensors = load(bytes(payload))
        length = int.from_bytes(payload[:8], "little")
        metadata = json.loads(payload[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise WireError(f"{len(payload)} bytes are no safetensors file ({error}): cut off or damaged.") from error
    return tensors, metadata


class WireMeter:
    """Serialises what is sent, and counts it by direction, round, user and purpose.

    Example:
        >>> meter = WireMeter()
        >>> payload = meter.send(model.state_dict(), direction="down", round=3, user="u17")
        >>> tensors, metadata = unpack(payload)  # what the device gets
        >>> meter.totals()
        {'up': 0, 'down': 1234}

    Rounds are integers, users integers or strings. The meter stays with the simulation: no user identity is added to
    what is sent.
    """

    def __init__(self) -> None:
        self._bytes: Counter[tuple[str, int, Hashable, str]] = Counter()

    def send(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        direction: Direction = "up",
        round: int = 0,
        user: int | str | None = None,
        what: str = "",
        metadata: Mapping[str, str] | None = None,
    ) -> bytes:
        """The payload, which was counted. `ValueError` for another direction; `WireError` as [`pack`]."""
        payload = pack(tensors, metadata)
        self.count(len(payload), direction=direction, round=round, user=user, what=what)
        return payload

    def count(
        self, size: int, *, direction: Direction, round: int = 0, user: int | str | None = None, what: str = ""
    ) -> None:
        """Count a payload of `size` bytes that was serialised already, such as the same one for another user."""
        if direction not in DIRECTIONS:
            raise ValueError(f"direction {direction!r} must be 'up' (device to cloud) or 'down'.")
        self._bytes[direction, int(round), user, what] += int(size)

    def totals(self) -> dict[str, int]:
        """Bytes up and down."""
        return self._by(lambda key: "all").get("all", _nothing())

    def by_round(self) -> dict[int, dict[str, int]]:
        """Bytes up and down of each round, in order."""
        return dict(sorted(self._by(lambda key: key[1]).items()))

    def by_user(self) -> dict[int | str | None, dict[str, int]]:
        """Bytes up and down of each user; `None` for what was sent to nobody in particular."""
        return self._by(lambda key: key[2])

    def by_purpose(self) -> dict[str, dict[str, int]]:
        """Bytes up and down by the `what` of each payload."""
        return self._by(lambda key: key[3])

    def _by(self, group: Any) -> dict[Any, dict[str, int]]:
        found: dict[Any, dict[str, int]] = {}
        for key, size in self._bytes.items():
            found.setdefault(group(key), _nothing())[key[0]] += size
        return found

    def state_dict(self) -> dict[str, Any]:
        """All counts, as JSON has them."""
        return {"bytes": [[*key, size] for key, size in self._bytes.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from the counts of [`state_dict`], instead of those that are here."""
        self._bytes = Counter({(way, turn, user, what): size for way, turn, user, what, size in state["bytes"]})


def _nothing() -> dict[str, int]:
    return dict.fromkeys(DIRECTIONS, 0)
