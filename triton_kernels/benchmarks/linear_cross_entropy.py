"""Time and memory of one training step of a head over a vocabulary, without its logits and with them.

`plain` is torch's `cross_entropy(hidden @ weight.T + bias, labels)`, forward and backward, of one head or of every
prefix of a grid; the other arms are named after the function, which `linear_cross_entropy` calls for each prefix.
Inputs are leaves with gradients. Activations are the peak of the step above its beginning less the gradients that it
leaves, which is in favour of `plain`: at its peak not all of those are there. Every arm takes its memory in a process
of its own, and times take turns.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from ..linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_grid
from .allocations import allocations, kept_bytes, resident_bytes
from .experts import RESULTS, versions
from .report import results_file, write
from .timing import Arm, median_interval, prepared_device, time_in_turns


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TARGET = 5.0  # how many times less memory for activations the grid is to need


@dataclass(frozen=True)
class Cell:
    """Heads that are prefixes of one, each with hidden states of its own."""

    tokens: int
    classes: int
    hidden: int
    widths: tuple[int, ...]

    @property
    def key(self) -> str:
        """Tokens x classes x width, or the number of heads."""
        of = f"{len(self.widths)} heads" if len(self.widths) > 1 else str(self.widths[0])
        return f"{self.tokens}x{self.classes}x{of}"


GRID = (32, 64, 128, 768) * 3  # m3BERT: its widths at each of three layers
# Tokens are masked ones. The grid is timed with fewer than its memory is taken with: a step takes seconds.
SHOWN = {
    "cpu": (
        (Cell(256, 32768, 768, (32,)), True),
        (Cell(256, 32768, 768, (128,)), True),
        (Cell(256, 32768, 768, (768,)), True),
        (Cell(2048, 2048, 384, (384,)), True),  # in-batch negatives
        (Cell(64, 250002, 768, GRID), True),
        (Cell(256, 250002, 768, GRID), False),
    ),
    "cuda": (
        (Cell(4096, 32768, 768, (128,)), True),
        (Cell(4096, 250002, 768, (768,)), True),
        (Cell(32768, 32768, 768, (768,)), True),
        (Cell(1024, 250002, 768, GRID), True),
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device")
    parser.add_argument("--dtype", default=None, choices=list(DTYPES), help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--cells", type=int, nargs="+", help="numbers of those shown for the device, from 0")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--blocks", type=int, default=10, help="alternating blocks of a cell, at least ten")
    parser.add_argument("--steps", type=int, default=1, help="steps of each arm in a block")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--memory", nargs=2, metavar=("CELL", "ARM"), help=argparse.SUPPRESS)  # one, in this process


def run(options: argparse.Namespace) -> int:
    """Measure and report."""
    device, name, clock = prepared_device(options.device, options.threads)
    shown = SHOWN[device.type]
    options.dtype = options.dtype or ("fp32" if device.type == "cpu" else "bf16")
    if options.memory:
        cell, arm = options.memory
        print(json.dumps(memory(shown[int(cell)][0], arm, DTYPES[options.dtype], device)))
        return 0
    results = {"benchmark": "linear_cross_entropy", "device": name, "dtype": options.dtype, "versions": versions()}
    path = results_file(options.output, "linear-cross-entropy", name)
    cells = _known_cells(path, results)
    for at in options.cells or range(len(shown)):
        cell, timed = shown[at]
        print(cell.key, flush=True)
        cells[cell.key] = {"cell": asdict(cell), "arms": {a: _memory_of(at, a, options) for a in arms_of(cell)}}
        if timed:
            seconds = times(cell, DTYPES[options.dtype], device, clock, blocks=options.blocks, steps=options.steps)
            add_times(cells[cell.key]["arms"], seconds)
        text = write(results | {"cells": cells}, markdown(results | {"cells": cells}), path)
    print(f"{text}\nWrote {path.name} and its .md.")
    return 0


def _known_cells(path: Path, results: dict) -> dict:
    """Cells that were measured before in the same circumstances: with `--cells` others are kept."""
    if not path.exists():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    cells = before.pop("cells")
    return cells if before == results else {}


# --- arms


Step = Callable[[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def _plain(hiddens, weight, bias, labels):
    return sum(F.cross_entropy(F.linear(h, weight[:, : h.shape[1]], bias), labels) for h in hiddens)


def _one_by_one(hiddens, weight, bias, labels):
    return sum(linear_cross_entropy(h, weight[:, : h.shape[1]], bias, labels) for h in hiddens)


def _together(hiddens, weight, bias, labels):
    return linear_cross_entropy_grid(hiddens, weight, bias, labels).sum()


def arms_of(cell: Cell) -> dict[str, Step]:
    """The losses that are compared; for a single head there is one way to call ours."""
    arms = {"plain": _plain, "linear_cross_entropy": _one_by_one}
    return arms | {"linear_cross_entropy_grid": _together} if len(cell.widths) > 1 else arms


def inputs(cell: Cell, dtype: torch.dtype, device: torch.device):
    """Hidden states, weight, bias and labels; the weight is as wide as the widest head."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    hiddens = [draw(cell.tokens, width).to(dtype).requires_grad_() for width in cell.widths]
    width = max(cell.widths)
    weight = draw(cell.classes, width).mul_(width**-0.5).to(dtype).requires_grad_()
    bias = torch.zeros(cell.classes, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(cell.classes, (cell.tokens,), generator=generator, device=device)
    return hiddens, weight, bias, labels


def times(cell: Cell, dtype, device, clock, *, blocks: int, steps: int) -> dict[str, list[float]]:
    """Seconds of a forward and a backward of each arm, a median for each block."""
    hiddens, weight, bias, labels = inputs(cell, dtype, device)
    leaves = [*hiddens, weight, bias]

    def step(loss: Step) -> None:
        torch.autograd.grad(loss(hiddens, weight, bias, labels), leaves)

    arms = [Arm(name, lambda: None, lambda _, loss=loss: step(loss)) for name, loss in arms_of(cell).items()]
    return time_in_turns(arms, clock, blocks=blocks, steps=steps)


def add_times(arms: dict[str, dict], seconds: dict[str, list[float]]) -> None:
    """Put milliseconds and the ratio to `plain` beside the memory of each arm."""
    for name, values in seconds.items():
        arms[name]["milliseconds"] = asdict(median_interval([1e3 * value for value in values]))
        if name != "plain":
            ratios = [theirs / ours for theirs, ours in zip(seconds["plain"], values)]
            arms[name]["faster_than_plain"] = asdict(median_interval(ratios))


# --- memory


def _memory_of(at: int, arm: str, options: argparse.Namespace) -> dict:
    command = [sys.executable, "-m", f"{__package__}", "linear_cross_entropy", "--device", options.device]
    command += ["--dtype", options.dtype, "--threads", str(options.threads), "--memory", str(at), arm]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed with status {done.returncode}.")
    return json.loads(done.stdout.splitlines()[-1])


def memory(cell: Cell, arm: str, dtype: torch.dtype, device: torch.device) -> dict:
    """Bytes of one step of an arm; the resident ones are those of a process that has made no step before."""
    hiddens, weight, bias, labels = inputs(cell, dtype, device)
    found = {}

    def forward() -> torch.Tensor:
        found["loss"] = arms_of(cell)[arm](hiddens, weight, bias, labels)
        return found["loss"]

    def train() -> None:
        found["kept"] = kept_bytes(forward, [*hiddens, weight, bias, labels])
        found.pop("loss").backward()

    before = resident_bytes()
    step = allocations(train, device)
    after = resident_bytes()
    on_host = before and device.type == "cpu"
    return {
        "activation_bytes": step.peak - step.left,
        "gradient_bytes": step.left,
        "largest_allocation": step.largest,
        "kept_bytes": found["kept"],
        "resident_growth": after[1] - before[0] if on_host else None,
    }


# --- report


def markdown(results: dict) -> str:
    """One line an arm of each cell."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Cross-entropy over a vocabulary, {results['device']}",
        "",
        f"{used}; {results['dtype']}. One training step, forward and backward. Activations: the peak above the "
        "beginning less the gradients that the step leaves; kept: of them, what autograd keeps for the backward; "
        "resident: growth of the process, gradients included. Times: arms take turns; medians of blocks with "
        "order-statistic intervals.",
        "",
        "| tokens x classes x width | loss | activations MB | less than plain | kept MB | gradients MB | resident MB "
        "| ms [interval] | faster than plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results["cells"].items():
        plain = cell["arms"]["plain"]
        for name, arm in cell["arms"].items():
            texts = [f"{arm['activation_bytes'] / 1e6:.1f}", ""]
            if name != "plain":
                texts[1] = f"{plain['activation_bytes'] / arm['activation_bytes']:.1f} times"
            texts += [
                f"{arm[kind] / 1e6:.1f}" if arm[kind] is not None else ""
                for kind in ("kept_bytes", "gradient_bytes", "resident_growth")
            ]
            texts += [_interval(arm.get("milliseconds"), ".1f"), _interval(arm.get("faster_than_plain"), ".2f")]
            lines.append(f"| {' | '.join((key, name, *texts))} |")
    return "\n".join(lines) + "\n"


def _interval(found: dict | None, digits: str) -> str:
    if found is None:
        return ""
    return f"{found['median']:{digits}} [{found['low']:{digits}}, {found['high']:{digits}}]"
