# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as files: fetched, read from their headers, written shard by shard, put in place whole or not at all.

What a checkpoint says about itself is input: file names of an index that leave the folder, links and pickles are
refused. At most one shard is in memory.
"""

import fnmatch
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging


logger = logging.get_logger(__name__)

# Travels with the weights unchanged. Code does not: a tokenizer's own module is left behind with a warning.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja*",
    "chat_template.json",
    "LICENSE*",
    "NOTICE*",
)


def fetch_checkpoint(source: str | Path, revision: str | None, patterns: list[str]) -> Path:
    """The folder of a checkpoint: `source` itself, or for a Hub id the snapshot with the files that match."""
    folder = Path(source)
    if folder.is_dir():
        return folder.resolve()
    if isinstance(source, Path) or folder.is_absolute() or folder.exists():
        raise FileNotFoundError(f"{source} is not a folder. Pass a checkpoint folder or a Hub id.")
    return Path(snapshot_download(source, revision=revision, allow_patterns=patterns)).resolve()


def commit_of(folder: Path, source: str | Path, revision: str | None) -> str | None:
    """The commit that was read, so that a push in between cannot mix two."""
    return revision if Path(source).is_dir() else folder.name


def checkpoint_file(folder: Path, name: str) -> Path:
    """`folder / name`, if that is a file of this very folder: an index is input, and must not reach other files."""
    if not isinstance(name, str) or name != os.path.basename(name) or "\\" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a plain file name. Checkpoint files must lie in {folder} itself.")
    path = folder / name
    blobs = folder.parent.parent / "blobs"  # what the links of a Hub cache's snapshots point to
    if path.is_symlink() and not (folder.parent.name == "snapshots" and path.resolve().is_relative_to(blobs)):
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}. Replace it by the file, or pass the folder that holds it."
        )
    return path


def read_json(folder: Path, name: str) -> dict:
    """The JSON object in a file of a checkpoint. `FileNotFoundError` or `ValueError` that names file and remedy."""
    path = checkpoint_file(folder, name)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {name}, so it is not a checkpoint.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download or save it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object. Download or save it again.")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write `content` as transformers writes its configuration files."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_headers(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """`{file: {tensor name: meta tensor}}` from the headers of the shards, without their data."""
    weight_map: dict[str, str] | None = None
    if (folder / SAFE_WEIGHTS_INDEX_NAME).exists():
        weight_map = read_json(folder, SAFE_WEIGHTS_INDEX_NAME).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(
                f"{folder / SAFE_WEIGHTS_INDEX_NAME} has no weight_map. Download or save the checkpoint again."
            )
        files = sorted(set(map(str, weight_map.values())))
    elif (folder / SAFE_WEIGHTS_NAME).exists():
        files = [SAFE_WEIGHTS_NAME]
    else:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise FileNotFoundError(
            f"{folder} has neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME}. Pickles "
            f"{pickles or '(.bin, .pt)'} are not read, because they can run code: if you trust their author, load "
            "them with from_pretrained and write safetensors with save_pretrained."
        )
    shards = {}
    for file in files:
        path = checkpoint_file(folder, file)
        if path.suffix != ".safetensors":
            raise ValueError(
                f"{file!r} in the index is not a safetensors file; pickles are not read, because they can run code."
            )
        if not path.is_file():
            raise FileNotFoundError(
                f"{SAFE_WEIGHTS_INDEX_NAME} names {file}, which is missing from {folder}. Download it again."
            )
        try:
            with safe_open(path, "pt") as shard:
                shapes = {name: shard.get_slice(name).get_shape() for name in shard.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or incomplete ({error}). Download or save it again.") from error
        if weight_map is not None:
            listed = {name for name, holder in weight_map.items() if holder == file}
            if listed != set(shapes):
                examples = sorted(listed ^ set(shapes))[:3]
                raise ValueError(
                    f"{SAFE_WEIGHTS_INDEX_NAME} and {file} disagree on the tensors of that file: {examples}."
                )
        shards[file] = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    return shards


def write_renamed_shards(
    folder: Path, shards: dict[str, dict[str, torch.Tensor]], partial: Path, rename: Callable[[str], str | None]
) -> None:
    """Copy the shards with new tensor names, one in memory at a time; `rename` gives None for what stays behind."""
    weight_map, total_size, total_parameters = {}, 0, 0
    for file, names in logging.tqdm(shards.items(), desc="Converting shards"):
        tensors = {}
        with safe_open(checkpoint_file(folder, file), "pt") as shard:
            for name in names:
                if (new_name := rename(name)) is not None:
                    tensors.update(per_expert_tensors(new_name, shard.get_tensor(name)))
        if not tensors:
            continue
        save_file(tensors, partial / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        total_size += sum(tensor.nbytes for tensor in tensors.values())
        total_parameters += sum(tensor.numel() for tensor in tensors.values())
    if set(shards) != {SAFE_WEIGHTS_NAME}:
        metadata = {"total_size": total_size, "total_parameters": total_parameters}
        write_json(partial / SAFE_WEIGHTS_INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})


def copy_side_files(folder: Path, partial: Path) -> None:
    """Copy what travels with the weights unchanged ([`SIDE_FILES`])."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatch.fnmatch(path.name, pattern) for pattern in SIDE_FILES):
            (partial / path.name).write_bytes(checkpoint_file(folder, path.name).read_bytes())
    tokenizer = partial / "tokenizer_config.json"
    if tokenizer.exists() and "auto_map" in read_json(partial, tokenizer.name):
        logger.warning(
            "The tokenizer is code of its own, which is not copied: save a fast tokenizer into the new folder."
        )


def vacant_destination(destination: str | Path, source: str | Path | None, overwrite: bool) -> Path:
    """The absolute destination, its parent made, once it is certain that writing it destroys nothing wanted."""
    destination = Path(destination).resolve()
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"{destination} is a file. Choose a folder.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(
            f"{destination} is not empty. Choose another folder, or pass overwrite=True (--overwrite)."
        )
    if source is not None and Path(source).is_dir() and Path(source).resolve().is_relative_to(destination):
        raise ValueError(f"{destination} is or contains the source, which would be replaced. Choose another folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    return destination


@contextmanager
def in_one_piece(destination: Path) -> Iterator[Path]:
    """A folder beside `destination` to write to, which takes its place at the end, or vanishes with an exception."""
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as workspace:
        partial, replaced = Path(workspace, "partial"), Path(workspace, "replaced")
        partial.mkdir()
        yield partial
        if destination.exists():
            os.replace(destination, replaced)
        try:
            os.replace(partial, destination)
        except BaseException:
            if replaced.exists():
                os.replace(replaced, destination)
            raise


def per_expert_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """`tensor` as checkpoints keep it: fused 3-D experts, the form in memory, come apart into single matrices."""
    experts, _, leaf = name.rpartition(".")
    if leaf not in ("gate_up_proj", "down_proj") or tensor.dim() != 3:
        yield name, tensor
        return
    for e, matrix in enumerate(tensor):
        matrices = zip(("gate_proj", "up_proj"), matrix.chunk(2)) if leaf == "gate_up_proj" else [(leaf, matrix)]
        yield from ((f"{experts}.{e}.{proj}.weight", part) for proj, part in matrices)


__all__ = [
    "SIDE_FILES",
    "checkpoint_file",
    "commit_of",
    "copy_side_files",
    "fetch_checkpoint",
    "in_one_piece",
    "per_expert_tensors",
    "read_headers",
    "read_json",
    "vacant_destination",
    "write_json",
    "write_renamed_shards",
]
