"""Which checkpoint a killed run goes on from."""

import json
import struct
import zipfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest `checkpoint-*` of `output_dir` that was written to the end; `None` if there is none.

    A process killed, or a disk full, in the middle of saving leaves a folder that looks like a checkpoint. Trainer
    writes `trainer_state.json` last, and rotates older checkpoints out only after that, so the one before is still
    there.
    """
    folders = [p for p in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.name.rsplit("-", 1)[1].isdigit()]
    for folder in sorted(folders, key=lambda p: int(p.name.rsplit("-", 1)[1]), reverse=True):
        reason = _what_is_missing(folder)
        if reason is None:
            return folder
        logger.warning(f"{folder.name} is incomplete ({reason}); trying the one before.")
    return None


def _what_is_missing(folder: Path) -> str | None:
    state = folder / "trainer_state.json"
    try:
        json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or cut off"
    weights = {file.name: file for file in folder.glob("*.safetensors")}
    if not weights and not any(folder.glob("pytorch_model_fsdp*/.metadata")):  # shards of FSDP's own kind
        return "no safetensors file"
    for index in folder.glob("*.safetensors.index.json"):
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError):
            return f"{index.name} is cut off"
        if missing := sorted(named - set(weights)):
            return f"{missing[0]} is missing"
    for file in weights.values():
        if not _is_whole(file):
            return f"{file.name} is cut off"
    for file in folder.glob("*.pt*"):  # optimizer, scheduler, random states: archives whose directory comes last
        if file.is_file() and not zipfile.is_zipfile(file):
            return f"{file.name} is cut off"
    return None


def _is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            return False
        length = struct.unpack("<Q", prefix)[0]
        if length > file.stat().st_size:
            return False
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return False
    end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    return file.stat().st_size == 8 + length + end
