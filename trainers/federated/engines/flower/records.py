"""Our messages as Flower's records: safetensors files, one array of bytes each, whatever the dtype (its arrays know no
bfloat16), and beside them a few words *about* the message."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from ...core import ClientUpdate, UploadError, pack, unpack
from ...messages import update_from


FILES, ABOUT = "files", "about"
NONCE, CLIENT, FEDERATION, ROUND = "nonce", "client", "federation", "round"
REGISTER, TRAIN, SCORE = "query.register", "train", "evaluate.score"

FlatMessage = tuple[Mapping[str, torch.Tensor], Mapping[str, str]]
About = Mapping[str, str | int | float]


def array_of(file: bytes) -> Array:
    """A file as Flower carries and keeps it: in chunks."""
    return Array("uint8", (len(file),), "safetensors", file)


def record_of(files: Sequence[bytes], about: About) -> RecordDict:
    """Files and words, to be sent."""
    arrays = {str(index): array_of(file) for index, file in enumerate(files)}
    return RecordDict({FILES: ArrayRecord(arrays), ABOUT: ConfigRecord(dict(about))})


def packed(message: FlatMessage) -> bytes:
    """A message as one file."""
    tensors, metadata = message
    return pack(tensors, metadata)


def about_in(record: RecordDict) -> dict[str, Any]:
    """The words that came; none, if there are none."""
    return dict(record[ABOUT]) if isinstance(record.get(ABOUT), ConfigRecord) else {}


def files_in(record: RecordDict) -> list[bytes]:
    """The files that came. `ValueError` if they are not as [`record_of`] has them."""
    arrays = record.get(FILES)
    if not isinstance(arrays, ArrayRecord) or set(arrays) != {str(index) for index in range(len(arrays))}:
        raise ValueError(f"the message has no record {FILES!r} of numbered files")
    return [arrays[str(index)].data for index in range(len(arrays))]


def update_in(client: str, file: bytes) -> ClientUpdate:
    """An update that `client` sent; whether it is a good one, the algorithm finds out.

    Raises:
        UploadError: it is none.
    """
    try:
        return update_from(client, *unpack(file))
    except ValueError as error:
        raise UploadError(client, f"it cannot be read ({error})") from error
