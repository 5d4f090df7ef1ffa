"""What a store of users was made of, so that it is gone on with in a run of the same and in no other."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets.fingerprint import Hasher
from peft import LoraConfig
from torch import nn
from transformers.utils import logging

from ..federated.core import RoundError, RoundStore
from ..report import write_text_atomically
from .label_correction import Correction
from .on_device_parameters import Stacked
from .on_device_rows import UserRows


logger = logging.get_logger(__name__)

RUN_NAME = "run.json"
_NOT_OF_ADAPTERS = ("base_model_name_or_path", "revision", "peft_version", "inference_mode", "auto_mapping")


def run_identity(
    *,
    model: nn.Module,
    data: Mapping[str, UserRows | None],
    chunks: Iterable[torch.Tensor],
    arguments: Any,
    correction: Correction,
    lora: LoraConfig | None,
    sample_loss: Any,
    keep_parameters: bool,
) -> dict[str, Any]:
    """Everything that decides what a store holds, as JSON has it.

    Args:
        model: the cloud's, without adapters; parameters and buffers count, by name.
        data: rows by what they are for, `None` where there are none.
        chunks: users of each file.
    """
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    rows = {f"{role}/{name}": t for role, part in data.items() for name, t in _columns(part).items()}
    users = {f"chunk {number}": chunk for number, chunk in enumerate(chunks)}
    adapters = None
    if lora is not None:
        adapters = {key: value for key, value in lora.to_dict().items() if key not in _NOT_OF_ADAPTERS}
    identity = {
        "model": _digest(tensors),
        "data": _digest({**rows, **users}),
        "arguments": asdict(arguments),
        "correction": asdict(correction),
        "lora": adapters,
        "sample_loss": Hasher.hash(sample_loss),
        "keep_parameters": keep_parameters,
    }
    return json.loads(json.dumps(identity, default=lambda value: sorted(value, key=str)))


def open_store(folder: Path, identity: Mapping[str, Any]) -> RoundStore:
    """The store in `folder`, new or of the same identity. `ValueError` for another one, which names what differs."""
    path = folder / RUN_NAME
    found = json.loads(path.read_text()) if path.exists() else identity
    if found != identity:
        differ = sorted(key for key in identity.keys() | found.keys() if identity.get(key) != found.get(key))
        raise ValueError(
            f"{folder.name} holds users of other data, another model or other arguments (its {', '.join(differ)} "
            "differ): give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(identity, indent=1) + "\n")
    return RoundStore(folder)


def finished(rounds: RoundStore | None, number: int) -> tuple[dict[str, Stacked], dict[str, Any] | None]:
    """A chunk out of the store; nothing where it is to be computed, also because its files were damaged."""
    if rounds is None or number not in rounds.rounds():
        return {}, None
    try:
        return rounds.load(number)
    except RoundError as error:
        logger.warning(f"{error} These users are fine-tuned again.")
        return {}, None


def _columns(rows: UserRows | None) -> dict[str, torch.Tensor]:
    return {} if rows is None else {"users of the rows": rows.users, **rows.tensors}


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
