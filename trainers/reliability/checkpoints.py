"""Which checkpoints of a run can be trusted: manifests, validation, and the last one that is good.

A checkpoint is a `checkpoint-N` folder as Trainer writes it. Two kinds count:

* with a manifest (`manifest.json`: size and SHA-256 of every file), which is written and synced after everything else
  and so is the mark of commitment: such a checkpoint is valid if every byte is as it was then;
* without one, as any Trainer leaves them: valid if every file is there and as long as its own header says. Damage
  inside a file goes unseen. Where the run writes manifests, one that lacks it was never committed, and is refused.

The SIGMA stack (arXiv 2512.13488, framework layer) uploads and tracks checkpoints; that they are validated, and how,
is ours.
"""

import hashlib
import json
import os
import platform
import re
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import safetensors
import torch
import transformers
from safetensors import safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_models.moe.checkpoint_files import checkpoint_file

from ..report import write_text_atomically
from .events import EventLog


logger = logging.get_logger(__name__)

MANIFEST_NAME = "manifest.json"
MANIFESTS_NAME = "manifests.json"  # in the run folder: from which step on manifests are demanded
LATEST_NAME = "latest"  # in the run folder: the name of the checkpoint that was committed last
TRAINING_ARGS_NAME = "training_args.bin"
FORMAT = 1

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
# What a loader would pick up although the manifest does not know it. Anything else may lie beside: `.nfs*` and
# `.DS_Store` are no reason to lose a checkpoint.
_LOADABLE = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")


class CheckpointError(ValueError):
    """A checkpoint that does not count; the message names the file and the remedy."""


class NotFiniteError(CheckpointError):
    """Weights that are NaN or infinite; `tensors` says of each which and how many of its values."""

    def __init__(self, folder: Path, tensors: list[str]):
        super().__init__(f"{folder.name} cannot be committed: {'; '.join(tensors[:3])}. Use the checkpoint before.")
        self.tensors = tensors


# Finding


def checkpoint_folders(output_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, by step, oldest first; links are passed over."""
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((p for p in found if _CHECKPOINT.fullmatch(p.name) and not p.is_symlink()), key=checkpoint_step)


def checkpoint_step(folder: Path) -> int:
    """The number of optimizer steps in the name of a checkpoint folder. `ValueError` for another name."""
    match = _CHECKPOINT.fullmatch(folder.name)
    if match is None:
        raise ValueError(f"{folder.name!r} is not the name of a checkpoint; those are {PREFIX_CHECKPOINT_DIR}-STEP.")
    return int(match.group(1))


def find_last_valid_checkpoint(
    output_dir: str | Path, *, up_to_step: int | None = None, log: EventLog | None = None
) -> Path | None:
    """The newest checkpoint of `output_dir` that is valid; `None` if there is none.

    Walks back by step and says of each that it refuses why: as an event where `log` is given, else as a warning. With
    manifests every file of the newest is read once (about a second per GB), so across ranks let one look and tell the
    others.

    Args:
        up_to_step (`int`, *optional*): pass over checkpoints of more optimizer steps than this.
        log (`EventLog`, *optional*): where refusals are recorded.
    """
    required_after = manifests_required_after(output_dir)
    for folder in reversed(checkpoint_folders(output_dir)):
        step = checkpoint_step(folder)
        if up_to_step is not None and step > up_to_step:
            continue
        required = required_after is not None and step > required_after
        problems = validate_checkpoint(folder, require_manifest=required)
        if not problems:
            return folder
        what = "incomplete" if manifest_state(folder) == "absent" else "damaged"
        message = f"{folder.name} is {what} ({'; '.join(problems[:3])}); trying the one before."
        if log is None:
            logger.warning(message)
        else:
            log.record("checkpoints", "warning", step=step, action="skip", message=message, evidence={"all": problems})
    return None


def manifests_required_after(output_dir: str | Path) -> int | None:
    """Checkpoints of more steps than this need a manifest; `None` where the run writes none.

    The marker that the run left, or, where only checkpoints were copied, the oldest that has a manifest.
    """
    try:
        marker = json.loads((Path(output_dir) / MANIFESTS_NAME).read_bytes())["required_after_step"]
        return None if marker is None else int(marker)
    except (OSError, ValueError, TypeError, KeyError):
        steps = [checkpoint_step(f) - 1 for f in checkpoint_folders(output_dir) if manifest_state(f) != "absent"]
        return min(steps, default=None)


def stop_requiring_manifests(output_dir: str | Path) -> None:
    """For a run that goes on without them: its next checkpoints count as those of any Trainer do."""
    if manifests_required_after(output_dir) is not None:
        text = json.dumps({"required_after_step": None}) + "\n"
        write_text_durably(Path(output_dir) / MANIFESTS_NAME, text)


def require_manifests(output_dir: str | Path, *, after_step: int) -> None:
    """Leave the marker that checkpoints of more than `after_step` steps count only with a manifest."""
    known = manifests_required_after(output_dir)
    if known is None or known > after_step:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"required_after_step": after_step}) + "\n"
        write_text_durably(Path(output_dir) / MANIFESTS_NAME, text)


def read_latest(output_dir: str | Path) -> str | None:
    """The name in the `latest` pointer; `None` if there is no pointer or it names no checkpoint."""
    try:
        name = (Path(output_dir) / LATEST_NAME).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return name if _CHECKPOINT.fullmatch(name) else None


def write_latest(output_dir: str | Path, name: str) -> None:
    """Point to the checkpoint `name`; a reader sees the old name or the new one."""
    write_text_durably(Path(output_dir) / LATEST_NAME, f"{name}\n")


# Manifests


def write_manifest(
    folder: str | Path, *, step: int, world_size: int, config_hash: str | None = None, ranks: int = 0
) -> dict[str, Any]:
    """Commit the checkpoint in `folder`: check it, sync every file to the disk, then write its manifest, last.

    `training_args.bin` is left out: it is never read back, and it holds the Hub token, so copies go without it.

    Args:
        step (`int`): optimizer steps that were finished.
        world_size (`int`): processes of the run.
        config_hash (`str`, *optional*): see [`config_fingerprint`].
        ranks (`int`): if the folder has random states by rank (`rng_state_R.pth`), those of R = 0 .. `ranks` - 1 must
            be there.

    Raises:
        CheckpointError: a file is missing, cut off or a link; nothing was written.
        NotFiniteError: a weight is NaN or infinite; nothing was written.
        OSError: the disk refused; nothing was written.
    """
    folder = Path(folder)
    if problems := [*structural_problems(folder), *_missing_ranks(folder, ranks)]:
        raise CheckpointError(
            f"{folder.name} cannot be committed: {'; '.join(problems)}. Save again, or use the checkpoint before."
        )
    if tensors := list(not_finite(folder)):
        raise NotFiniteError(folder, tensors)
    manifest = {
        "format": FORMAT,
        "step": step,
        "world_size": world_size,
        "config_sha256": config_hash,
        "versions": versions(),
        "time": time.time(),
    } | _listing(folder)
    sync_folder(folder.parent)
    write_text_durably(folder / MANIFEST_NAME, json.dumps(manifest, indent=1) + "\n")
    return manifest


def write_refusal(folder: str | Path, *, step: int, reason: str) -> None:
    """Mark the checkpoint in `folder` as one that must never be used, in place of its manifest."""
    content = {"format": FORMAT, "step": step, "refused": reason}
    write_text_durably(Path(folder) / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a checkpoint, `None` if it has none. `CheckpointError` if it cannot be read."""
    try:
        manifest = json.loads(checkpoint_file(Path(folder), MANIFEST_NAME).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{MANIFEST_NAME} cannot be read ({error}); use the checkpoint before") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"{MANIFEST_NAME} is not of format {FORMAT}; use the version of hf-sigma that wrote it, or the checkpoint "
            "before"
        )
    return manifest


def manifest_state(folder: str | Path) -> Literal["committed", "refused", "damaged", "absent"]:
    """What the manifest says, without reading any other file."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "damaged"
    if manifest is None:
        return "absent"
    return "refused" if "refused" in manifest else "committed"


def validate_checkpoint(folder: str | Path, *, require_manifest: bool = False) -> list[str]:
    """What is wrong with a checkpoint, empty if nothing is.

    With a manifest sizes are compared first, then every file is read for its SHA-256, in chunks. Without, see
    [`structural_problems`]; `require_manifest` then makes its absence the problem.
    """
    folder = Path(folder)
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)]
    if manifest is None:
        if require_manifest:
            return [f"{MANIFEST_NAME} is missing: the save did not come to its end"]
        return structural_problems(folder)
    if "refused" in manifest:
        return [f"it was refused when it was saved: {manifest['refused']}"]
    return list(_differences(folder, manifest, "", hashes=False)) or list(_differences(folder, manifest, ""))


def config_fingerprint(config: Any) -> str:
    """SHA-256 of a model configuration (`to_dict()`), or of any JSON values.

    Left out is what may differ for the same model: versions, where it was loaded from, what saving writes into it, and
    the number of active experts, which a sparsification schedule changes while the run goes on.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if isinstance(values, dict):
        passing = ("transformers_version", "_name_or_path", "auto_map", "architectures", "dtype", "use_cache")
        passing += ("num_experts_per_tok", "num_experts_per_tok_per_layer")
        values = {name: value for name, value in values.items() if name not in passing}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Of what wrote the checkpoint."""
    modules = {"torch": torch, "transformers": transformers, "safetensors": safetensors}
    return {name: str(module.__version__) for name, module in modules.items()} | {"python": platform.python_version()}


def _listing(folder: Path) -> dict[str, Any]:
    """`{"files": {name: {"size", "sha256"}}, "folders": {name: a listing}}`, each file synced. Nested, so that no
    name holds a separator."""
    files, folders = {}, {}
    for path in sorted(folder.iterdir()):
        if path.is_symlink():
            raise CheckpointError(f"{path.name} is a link, which may lead elsewhere later. Replace it by the file.")
        if path.is_dir():
            folders[path.name] = _listing(path)
        elif not _ours_or_secret(path.name):
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                files[path.name] = {"size": stream.tell(), "sha256": digest}
                os.fsync(stream.fileno())
    sync_folder(folder)
    return {"files": files, "folders": folders}


def _differences(folder: Path, listing: dict, prefix: str, *, hashes: bool = True) -> Iterator[str]:
    files, folders = listing.get("files"), listing.get("folders")
    if not isinstance(files, dict) or not isinstance(folders, dict):
        yield f"{MANIFEST_NAME} has no files and folders for {prefix or 'the checkpoint'}; use the checkpoint before"
        return
    for name, listed in {**files, **folders}.items():
        try:
            path = checkpoint_file(folder, name)
        except ValueError as error:
            yield f"{MANIFEST_NAME}: {error}"
            continue
        if not isinstance(listed, dict) or (name in files and not listed.keys() >= {"size", "sha256"}):
            yield f"{MANIFEST_NAME} has no size and sha256 for {prefix}{name}; use the checkpoint before"
        elif name in folders:
            if path.is_dir():
                yield from _differences(path, listed, f"{prefix}{name}/", hashes=hashes)
            else:
                yield f"{prefix}{name}/ is missing"
        elif not path.is_file():
            yield f"{prefix}{name} is missing"
        elif path.stat().st_size != listed["size"]:
            yield f"{prefix}{name} has {path.stat().st_size} bytes instead of {listed['size']}"
        elif hashes and file_sha256(path) != listed["sha256"]:
            yield f"{prefix}{name} is not what was saved: its SHA-256 differs"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.endswith(_LOADABLE) and path.name not in files and path.name != TRAINING_ARGS_NAME:
            yield f"{prefix}{path.name} is not in {MANIFEST_NAME}: remove it"


def _ours_or_secret(name: str) -> bool:
    return name in (MANIFEST_NAME, TRAINING_ARGS_NAME) or (name.startswith(".") and name.endswith(".tmp"))


def _missing_ranks(folder: Path, ranks: int) -> Iterator[str]:
    if not any(folder.glob("rng_state_*.pth")):
        return
    for rank in range(ranks):
        if not (folder / f"rng_state_{rank}.pth").is_file():
            yield (
                f"rng_state_{rank}.pth of rank {rank} is missing: put output_dir on storage that all ranks share, or "
                "set save_on_each_node=True"
            )


# Checks that need no manifest


def structural_problems(folder: str | Path) -> list[str]:
    """What is missing or cut off in a checkpoint, by what its files say of themselves: the first problem, or nothing.

    A process killed, or a disk full, in the middle of saving leaves a folder that looks like a checkpoint. Trainer
    writes `trainer_state.json` last, and rotates older checkpoints out only after that.
    """
    problem = _what_is_missing(Path(folder))
    return [problem] if problem else []


def not_finite(folder: str | Path) -> Iterator[str]:
    """The weights in a checkpoint's safetensors files that are NaN or infinite; one tensor is in memory at a time."""
    for file in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():
                tensor = tensors.get_tensor(name)
                if not tensor.is_floating_point():
                    continue
                # In parts: the mask of a whole embedding table would be a second large tensor.
                bad = sum(_count_not_finite(part) for part in tensor.flatten().split(2**24))
                if bad:
                    yield f"{name} in {file.name} has {bad} of {tensor.numel()} values that are not finite"


def _count_not_finite(part: torch.Tensor) -> int:
    part = part.float() if part.element_size() == 1 else part  # torch cannot add 8-bit floats
    wide = torch.float64 if part.dtype == torch.float64 else torch.float32
    # NaN and infinities survive in a sum, which is eight times as fast as a mask; a sum may also overflow by itself.
    if torch.isfinite(part.sum(dtype=wide)):
        return 0
    return int((~torch.isfinite(part)).sum())


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


# Files


def file_sha256(path: Path) -> str:
    """Of a file, read in chunks."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text_durably(path: Path, text: str) -> None:
    """Write atomically, so that it is there after a loss of power, too. `OSError` that names file and remedy."""
    write_text_atomically(path, text)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: without it a renamed file may be gone after a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "LATEST_NAME",
    "MANIFESTS_NAME",
    "MANIFEST_NAME",
    "TRAINING_ARGS_NAME",
    "CheckpointError",
    "NotFiniteError",
    "checkpoint_folders",
    "checkpoint_step",
    "config_fingerprint",
    "file_sha256",
    "find_last_valid_checkpoint",
    "manifest_state",
    "manifests_required_after",
    "not_finite",
    "read_latest",
    "read_manifest",
    "require_manifests",
    "stop_requiring_manifests",
    "structural_problems",
    "sync_folder",
    "validate_checkpoint",
    "versions",
    "write_latest",
    "write_manifest",
    "write_refusal",
    "write_text_durably",
]
