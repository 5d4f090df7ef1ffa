"""How every recipe takes its arguments: dataclasses, a preset, a file, the command line; the later wins."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser, TrainingArguments


# Of a Trainer inside a comparison, which reports, shows and keeps for all of them.
QUIET = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", "save_strategy": "no"}


@dataclasses.dataclass
class DataArguments:
    """Where the text comes from and how it is cut."""

    dataset_name: str = dataclasses.field(
        default="python-stdlib",
        metadata={"help": "python-stdlib, libreoffice-help[:lang,...], a file or folder, or a Hub dataset id."},
    )
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    text_column: str = "text"
    held_out_fraction: float = 0.05
    max_documents: int | None = None
    streaming: bool = False
    dataset_cache_dir: str | None = None
    dataset_license: str = dataclasses.field(default="unknown", metadata={"help": "SPDX identifier, for the card."})
    dataset_language: str = dataclasses.field(default="en", metadata={"help": "ISO 639-1 or `code`, for the card."})
    tokenizer_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder or Hub id; without one, a tokenizer is trained on the training split."}
    )
    tokenizer_vocab_size: int = 4096
    tokenizer_max_documents: int = dataclasses.field(
        default=100_000, metadata={"help": "Train the tokenizer on at most this many documents."}
    )
    sequence_length: int = 256
    max_eval_blocks: int | None = dataclasses.field(
        default=None, metadata={"help": "Evaluate on at most this many held-out blocks, taken evenly."}
    )


@dataclasses.dataclass
class RecipeTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and what every recipe has beyond: MSign around the optimizer, and the reliability suite.
    Where one of them cannot act, the recipe refuses it, see [`refuse_options`]."""

    optimizer: Literal["base", "msign"] = dataclasses.field(
        default="base", metadata={"help": "base: what --optim names, alone; msign: MSign around it."}
    )
    msign_period: int = dataclasses.field(default=100, metadata={"help": "Optimizer steps between applications."})
    msign_targets: str = dataclasses.field(
        default="attention", metadata={"help": "attention, all_2d, or a regular expression of parameter names."}
    )
    reliability: Literal["off", "on", "rollback"] = dataclasses.field(
        default="off",
        metadata={
            "help": "on: the recommended set of trainers.reliability, which skips steps with NaN; rollback: it goes "
            "back to the last valid checkpoint instead, at loss spikes too."
        },
    )


def parse_arguments(
    types: Sequence[type],
    presets: Mapping[str, Mapping[str, Any]],
    argv: Sequence[str] | None = None,
    *,
    default_preset: str,
) -> tuple[str, list[Any]]:
    """The name of the preset and one instance of each dataclass in `types`.

    Values come from the dataclass, then `--preset NAME`, then `--config FILE` (YAML or JSON), then the command line. A
    list may be empty (`--baselines` alone), which takes back what the preset says.

    Raises:
        SystemExit: an unknown preset, file or option, or one that would publish secrets, with the message of argparse
            naming it.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(presets), default=default_preset, help="Named set of defaults.")
    first.add_argument("--config", type=Path, default=None, help="YAML or JSON file with any of the options below.")
    chosen, rest = first.parse_known_args(argv)
    parser = HfArgumentParser(types, parents=[first], allow_abbrev=False)
    known = {field.name for cls in types for field in dataclasses.fields(cls)}
    defaults = dict(presets[chosen.preset])
    if chosen.config is not None:
        defaults |= _read_file(chosen.config, parser)
    for name in sorted(set(defaults) - known):
        parser.error(f"{name!r} in the preset or {chosen.config} is not an option of this recipe (see --help)")
    for action in parser._actions:
        # A required option that a preset or file has set is no longer required.
        action.required = action.required and action.dest not in defaults
        if action.nargs == "+":
            action.nargs = "*"
            # `baselines: dense` in a file would be taken for a list of letters.
            if isinstance(defaults.get(action.dest), (str, int, float)):
                defaults[action.dest] = [defaults[action.dest]]
    parser.set_defaults(**defaults)
    *values, _, unknown = parser.parse_args_into_dataclasses(
        rest, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unknown options: {' '.join(unknown)} (see --help)")
    if any(getattr(value, "push_to_hub", False) for value in values):
        parser.error(
            "--push_to_hub would upload the whole output folder, with the Hub token inside training_args.bin: train "
            "without it, then `python -m model_cards.publish OUTPUT_DIR --repo-id ORG/NAME`"
        )
    return chosen.preset, values


def _read_file(path: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        parser.error(f"--config {path}: {error.strerror}. Name a readable YAML or JSON file.")
    try:
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        parser.error(f"--config {path} cannot be parsed: {error}")
    if not isinstance(values, dict):
        parser.error(f"--config {path} holds a {type(values).__name__}; it must map option names to values.")
    return values


def refuse_options(args: RecipeTrainingArguments, *names: str, because: str) -> None:
    """`SystemExit` with `because` if one of the options `names` was set to another value than its default: what would
    silently change nothing is refused."""
    defaults = {field.name: field.default for field in dataclasses.fields(RecipeTrainingArguments)}
    # Recipes are also called with plain TrainingArguments, which have none of them.
    given = {name: getattr(args, name, defaults[name]) for name in names}
    if asked := [f"--{name} {value}" for name, value in given.items() if value != defaults[name]]:
        raise SystemExit(f"{', '.join(asked)}: {because}")


def training_arguments_of(base: TrainingArguments, **changes: Any) -> TrainingArguments:
    """A copy of `base` with other values, for a run beside the main one (another output folder, seed, number of
    steps)."""
    return dataclasses.replace(base, **changes)
