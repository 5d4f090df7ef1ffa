"""What a device sends up, and the check that stands between it and the cloud's state.

A check only reads: whoever receives calls it before anything is added up, so that a corrupt upload changes nothing.
"""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from reprlib import repr as shortened

import torch

from .exchange import ClientUpdate, joint_norm
from .wire import WireError, unpack


@dataclass(frozen=True, kw_only=True)
class Upload:
    """What `sender` made of its `num_samples` samples in `round`: an update, weights, or whatever was agreed on."""

    round: int
    sender: Hashable
    tensors: Mapping[str, torch.Tensor]
    num_samples: int

    @property
    def metadata(self) -> dict[str, str]:
        """What goes with the tensors on the wire, see [`received_upload`]."""
        return {"round": str(self.round), "num_samples": str(self.num_samples)}


MAX_SAMPLES = 2**53  # above it a weight in double precision is no count any more
MAX_NORM = 1e150  # of a tensor; beyond it, squares leave double precision


class UploadError(ValueError):
    """An upload that is refused: `sender`, the `key` of the tensor if one is to blame, and `reason`."""

    def __init__(self, sender: Hashable, reason: str, *, key: str | None = None):
        where = "" if key is None else f", tensor {key!r}"
        super().__init__(f"Upload of {sender!r} refused{where}: {reason}.")
        self.sender, self.key, self.reason = sender, key, reason


def received_upload(payload: bytes, *, sender: Hashable) -> Upload:
    """The upload in the bytes that `sender` sent, unchecked.

    `WireMeter.send(upload.tensors, metadata=upload.metadata)` makes such bytes. The sender is whom the connection says
    it is, never what a payload claims.

    Raises:
        UploadError: the bytes are cut off, no safetensors file, or without the round and the number of samples.
    """
    try:
        tensors, metadata = unpack(payload)
        round, num_samples = int(metadata["round"]), int(metadata["num_samples"])
    except WireError as error:
        raise UploadError(sender, str(error).rstrip(".")) from error
    except (KeyError, ValueError) as error:
        raise UploadError(sender, f"its metadata lacks a round or a number of samples ({error})") from error
    return Upload(round=round, sender=sender, tensors=tensors, num_samples=num_samples)


def check_upload(
    upload: Upload,
    *,
    expected: Mapping[str, torch.Tensor],
    round: int,
    max_norm: float | None = None,
    max_samples: int = MAX_SAMPLES,
    seen: Collection[Hashable] = (),
) -> None:
    """Return if the upload may be used.

    Args:
        expected: tensors of the names, shapes and dtypes that must come; their values and devices don't matter.
        round: the round that is being collected.
        max_norm: the largest Euclidean norm over all tensors together.
        max_samples: the largest number of samples that is believed; who weights by it should know one.
        seen: senders whose upload of this round was accepted already.

    Raises:
        UploadError: with sender, key and reason; nothing was changed.
    """
    checked_norms(upload, expected=expected, round=round, max_norm=max_norm, max_samples=max_samples, seen=seen)


def checked_norms(
    upload: Upload,
    *,
    expected: Mapping[str, torch.Tensor],
    round: int,
    max_norm: float | None = None,
    max_samples: int = MAX_SAMPLES,
    seen: Collection[Hashable] = (),
) -> dict[str, float]:
    """[`check_upload`], and what it has to find out for that: the norm of each tensor, in the order of `expected`."""
    sender = upload.sender
    if not isinstance(upload.tensors, Mapping):
        raise UploadError(sender, f"tensors by name are expected, not {type(upload.tensors).__name__}")
    if not _is_whole(upload.round):
        raise UploadError(sender, f"its round is {shortened(upload.round)}, a whole number is expected")
    if upload.round != round:
        raise UploadError(sender, f"it belongs to round {upload.round}, round {round} is being collected")
    if sender in seen:
        raise UploadError(sender, f"round {round} has an upload of this sender already")
    samples = upload.num_samples
    if not _is_whole(samples) or samples < 1:
        raise UploadError(sender, f"num_samples is {samples!r}, a whole number from 1 on is expected")
    if samples > max_samples:
        size = str(samples) if samples < 10**20 else f"more than 10^{samples.bit_length() * 3 // 10 - 1}"
        raise UploadError(sender, f"num_samples is {size}, at most {max_samples} is believed")
    for key in expected:
        if key not in upload.tensors:
            raise UploadError(sender, "it is missing", key=key)
    for key in upload.tensors:
        if key not in expected:
            raise UploadError(sender, "nobody asked for it", key=key)
    norms = {key: _checked_norm(sender, key, upload.tensors[key], like) for key, like in expected.items()}
    if max_norm is not None and not (norm := joint_norm(norms.values())) <= max_norm:
        raise UploadError(sender, f"its norm is {norm:.4g}, at most {max_norm:.4g} is allowed")
    return norms


def check_form(update: ClientUpdate) -> None:
    """Return if round, rows, metrics and chain are of the types that [`ClientUpdate`] says, whatever their values.

    Raises:
        UploadError: with the client and what is wrong.
    """
    client = update.client
    if not _is_whole(update.round):
        raise UploadError(client, f"its round is {shortened(update.round)}, a whole number is expected")
    if not isinstance(update.chain, str):
        raise UploadError(client, f"its chain is {shortened(update.chain)}, a name is expected")
    for what, values in (("rows", update.rows), ("metrics", update.metrics)):
        if not isinstance(values, Mapping):
            raise UploadError(client, f"its {what} are {shortened(values)}, not by name")
    for name, value in update.metrics.items():
        if not isinstance(name, str) or not _is_number(value):
            raise UploadError(client, f"its metric {shortened(name)} is {shortened(value)}, a number is expected")


def norm_of_tensor(tensor: torch.Tensor) -> float:
    """The Euclidean norm, in double precision whatever the dtype."""
    if not tensor.is_floating_point():
        tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor.double()
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def strided_problem(tensor: torch.Tensor) -> str:
    """Why the values of a tensor do not lie in memory one after the other; nothing if they do."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return "it is sparse or nested, a dense tensor is expected"
    return "it has no values, only a shape" if tensor.is_meta else ""


def _checked_norm(sender: Hashable, key: str, tensor: object, expected: torch.Tensor) -> float:
    if not isinstance(tensor, torch.Tensor):
        raise UploadError(sender, f"a tensor is expected, not {type(tensor).__name__}", key=key)
    if problem := strided_problem(tensor):
        raise UploadError(sender, problem, key=key)
    if tensor.shape != expected.shape:
        raise UploadError(sender, f"its shape is {tuple(tensor.shape)} instead of {tuple(expected.shape)}", key=key)
    if tensor.dtype != expected.dtype:
        raise UploadError(sender, f"its dtype is {tensor.dtype} instead of {expected.dtype}", key=key)
    norm = norm_of_tensor(tensor)
    if norm <= MAX_NORM:  # then every value is finite
        return norm
    if bad := int((~torch.isfinite(tensor)).sum()):
        raise UploadError(sender, f"{bad} of its {tensor.numel()} values are NaN or infinite", key=key)
    raise UploadError(sender, f"its norm is {norm:.4g}, too large for double precision to square", key=key)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    """NaN and infinity are some; a whole number may be too large for one."""
    return isinstance(value, float) or (_is_whole(value) and value.bit_length() < 1024)
