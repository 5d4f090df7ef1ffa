"""What a device sends up, and the check that stands between it and the cloud's state.

A check only reads: whoever receives calls it before anything is added up, so that a corrupt upload changes nothing.
"""

import math
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass

import torch

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
    sender = upload.sender
    if upload.round != round:
        raise UploadError(sender, f"it belongs to round {upload.round}, round {round} is being collected")
    if sender in seen:
        raise UploadError(sender, f"round {round} has an upload of this sender already")
    samples = upload.num_samples
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
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
    for key, tensor in upload.tensors.items():
        _check_tensor(sender, key, tensor, expected[key])
    if max_norm is not None:
        norm = math.sqrt(sum(_square_norm(tensor) for tensor in upload.tensors.values()))
        if not norm <= max_norm:
            raise UploadError(sender, f"its norm is {norm:.4g}, at most {max_norm:.4g} is allowed")


def _check_tensor(sender: Hashable, key: str, tensor: object, expected: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise UploadError(sender, f"a tensor is expected, not {type(tensor).__name__}", key=key)
    if tensor.shape != expected.shape:
        raise UploadError(sender, f"its shape is {tuple(tensor.shape)} instead of {tuple(expected.shape)}", key=key)
    if tensor.dtype != expected.dtype:
        raise UploadError(sender, f"its dtype is {tensor.dtype} instead of {expected.dtype}", key=key)
    if (tensor.dtype.is_floating_point or tensor.dtype.is_complex) and not bool(torch.isfinite(tensor).all()):
        bad = int((~torch.isfinite(tensor)).sum())
        raise UploadError(sender, f"{bad} of its {tensor.numel()} values are NaN or infinite", key=key)


def _square_norm(tensor: torch.Tensor) -> float:
    values = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return float(values.double().square().sum())
