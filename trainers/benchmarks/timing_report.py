"""What every report of a timing says of itself, how it is asked for, and where it goes."""

import argparse
import dataclasses
import json
import re
from pathlib import Path

import torch

from ..redaction import command_line
from ..report import collect_versions, device_name, write_text_atomically


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimingReport:
    """What each JSON file holds. `shape`: configuration of the model; `blocks`, `steps_per_block`: see
    [`~trainers.benchmarks.alternating_blocks.time_alternately`]; the others are filled in."""

    benchmark: str
    shape: dict
    blocks: int
    steps_per_block: int
    command: str = dataclasses.field(default_factory=command_line)
    device: str = dataclasses.field(default_factory=device_name)
    versions: dict[str, str] = dataclasses.field(default_factory=collect_versions)
    threads: int = dataclasses.field(default_factory=torch.get_num_threads)


def clock_of(threads: int) -> str:
    """The clock that verdicts rest on: the CPU time of several threads includes their waiting."""
    return "process" if threads == 1 else "wall"


def add_timing_arguments(parser: argparse.ArgumentParser, *, blocks: int, steps_per_block: int) -> None:
    """Options of every benchmark, with these defaults."""
    parser.add_argument("--blocks", type=int, default=blocks, help="alternating blocks of a comparison, at least ten")
    parser.add_argument("--steps-per-block", type=int, default=steps_per_block, help="steps of each arm in a block")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON file")


def write_report(report: TimingReport, folder: Path, *, variant: str = "") -> Path:
    """`folder/<benchmark>-[<variant>-]<device>.json`."""
    device = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    path = folder / f"{report.benchmark}-{variant}{'-' if variant else ''}{device}.json"
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return path
