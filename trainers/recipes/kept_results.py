"""Results that are kept beside what they were made of, and given back for exactly that."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..report import write_text_atomically


_IMMATERIAL = (  # beginnings of names of training arguments that change no number
    *("hub_", "push_", "log", "report_to", "run_name", "output_dir", "disable_tqdm", "save_", "eval_", "resume"),
    *("overwrite", "do_", "project", "trackio", "include_", "dataloader_num", "dataloader_p", "skip_memory"),
)


def kept(file: Path, made_of: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
    """What `file` holds, or else `compute()`, which is written into it with `made_of`; both are JSON.

    Raises:
        ValueError: the file is of other settings, or says nothing of them; the message names what differs.
    """
    made_of = json.loads(json.dumps(made_of))
    if not file.exists():
        found = compute()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps({"made_of": made_of, "found": found}))
        return found
    content = json.loads(file.read_text())
    if not isinstance(content, dict) or content.keys() != {"made_of", "found"}:
        raise ValueError(f"{_place(file)} does not say what it was made of. Give another --output_dir, or delete it.")
    if differ := differences(content["made_of"], made_of):
        raise ValueError(
            f"{_place(file)} is of other settings ({', '.join(differ[:5])}). Give another --output_dir, or delete it."
        )
    return content["found"]


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """Where two JSON values differ, by dotted names; with both values where they are short."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [line for key in keys for line in differences(found.get(key), wanted.get(key), f"{name}.{key}")]
    if found == wanted:
        return []
    values = f"{found!r}, now {wanted!r}"
    return [f"{name.lstrip('.')}: {values}" if len(values) < 80 else name.lstrip(".")]


def deciding_settings(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that decide what is learned: without folders, logging and the like."""
    settings = json.loads(args.to_json_string())
    return {name: value for name, value in settings.items() if not name.startswith(_IMMATERIAL)}


def _place(file: Path) -> str:
    return "/".join(file.parts[-3:])


__all__ = ["deciding_settings", "differences", "kept"]
