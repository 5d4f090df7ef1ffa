"""Time the expert layer against those of transformers, at the shapes of published models.

All arms get the same tensors and take turns; a cell is one model, dtype, routing, number of tokens and mode. Cells
are kept as they are finished, and running again continues. Without a GPU the compile reports, the floors and the bytes
kept for the backward are written instead, which need none.
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn

from ..compile_report import MODELS, Model
from ..weight_casts import clear_casts
from . import offline
from .floors import Load, Peak, peak_of
from .layers import BASELINE, OURS, Layer, layers
from .report import draw, markdown, results_file
from .routings import ROUTINGS, route
from .saved import saved_bytes
from .timing import Arm, Clock, CudaClock, median_interval, time_in_turns


MODES = ("inference", "forward", "backward", "both", "decode")
DTYPES = ("bf16", "bf16 of fp32")
TOKENS = (1, 8, 64, 512, 4096, 32768)
DECODE_TOKENS = 64  # more are no decoding, and fewer no training
MAX_DIFFERENCE = 2e-2  # RMS ratio of two bf16 results
RESULTS = Path(__file__).parent / "results"
UNFINISHED = 3  # exit status


@dataclass(frozen=True)
class Cell:
    """One comparison."""

    model: str
    dtype: str
    routing: str
    tokens: int
    mode: str

    @property
    def key(self) -> str:
        """Its name in the file of results."""
        return "/".join(map(str, asdict(self).values()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    shown = ("Sigma-MoE-Tiny", "Qwen3-30B-A3B", "OLMoE-1B-7B")
    parser.add_argument("--device", default="cuda:0", help="a CUDA device with its number")
    parser.add_argument("--models", nargs="+", default=shown, choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--routings", nargs="+", default=ROUTINGS, choices=ROUTINGS)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS)
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--blocks", type=int, default=10, help="alternating blocks of a cell, at least ten")
    parser.add_argument("--steps", type=int, default=5, help="steps of each arm in a block")
    parser.add_argument("--seconds", type=float, default=480, help="start no cell after so long")
    parser.add_argument("--bandwidth", type=float, help="TB/s that the GPU reaches, where it is not known")
    parser.add_argument("--tflops", type=float, help="TFLOP/s that the GPU reaches in bf16")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time, without a GPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")


def run(options: argparse.Namespace) -> int:
    """Measure and report. Exit status 3: the time was up, run it again."""
    if not torch.cuda.is_available():
        offline.write(options.output, TOKENS, jobs=options.jobs)
        return 0
    torch.cuda.set_device(options.device)
    device = torch.cuda.get_device_name()
    peak = peak_of(device, options.bandwidth, options.tflops)
    if peak is None:
        print(f"The peak of {device} is not known: give --bandwidth and --tflops.", file=sys.stderr)
        return 2
    path = results_file(options.output, "experts", device)
    measure = partial(
        measure_cell, device=options.device, clock=CudaClock(), blocks=options.blocks, steps=options.steps, peak=peak
    )
    wanted = cells(options.models, options.dtypes, options.routings, options.tokens, options.modes)
    complete = run_cells(wanted, path, device, peak, measure, seconds=options.seconds)
    results = json.loads(path.read_text(encoding="utf-8"))
    path.with_suffix(".md").write_text(markdown(results), encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    print(f"Wrote {path.name} and its .md and .png." + ("" if complete else " Not all; run the same command again."))
    return 0 if complete else UNFINISHED


def cells(models, dtypes, routings, tokens, modes) -> list[Cell]:
    """What is worth measuring of all combinations: decoding has few tokens and one routing, training has many."""
    found = []
    for model in models:
        for dtype in dtypes:
            for count in tokens:
                for routing in routings:
                    for mode in modes:
                        few = count <= DECODE_TOKENS
                        if (mode == "decode" and (dtype != "bf16" or routing != "uniform")) or few != (
                            mode == "decode"
                        ):
                            continue
                        found.append(Cell(model, dtype, routing, count, mode))
    return found


def run_cells(
    wanted: Iterable[Cell],
    path: Path,
    device: str,
    peak: Peak,
    measure: Callable[[Cell], dict],
    *,
    seconds: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Measure the cells that the file lacks and write it after each; False when the time was up before the end.

    Raises:
        ValueError: the file was measured with another device or other versions.
    """
    head = {"benchmark": "experts", "device": device, "versions": versions(), "peak": asdict(peak)}
    results = head | {"cells": {}}
    if path.exists():
        results = json.loads(path.read_text(encoding="utf-8"))
        if {name: results[name] for name in head} != head:
            raise ValueError(f"{path.name} was measured on another device or with other versions: move it away.")
    start = time.monotonic()
    for cell in wanted:
        if cell.key in results["cells"]:
            continue
        if time.monotonic() - start > seconds:
            return False
        say(cell.key)
        results["cells"][cell.key] = measure(cell)
        draft = path.with_name(f"{path.name}.{os.getpid()}")
        draft.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        os.replace(draft, path)
    return True


def versions() -> dict[str, str]:
    """Of what the arms are made of, where it is installed."""
    found = {}
    for name in ("torch", "triton", "transformers", "liger-kernel", "scattermoe", "kernels"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found | {"cuda": torch.version.cuda or "none"}


# --- one cell


def measure_cell(
    cell: Cell, *, device: str, clock: Clock, blocks: int, steps: int, peak: Peak, model: Model | None = None
) -> dict:
    """All arms of a cell, as it goes into the file."""
    model = model or MODELS[cell.model]
    masters, training = cell.dtype.endswith("fp32"), cell.mode in ("forward", "backward", "both")
    inputs = _inputs(cell, model, device, torch.float32 if masters else torch.bfloat16, training)
    x, gate_up, down, index, weights = inputs
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=masters)
    found = layers(gate_up, down, pairs=index.numel(), compute_dtype=torch.bfloat16, training=training)
    arms, failed, details = [], {}, {}
    for name, layer in found.items():
        try:
            arm = _arm(name, _in(autocast, layer), cell.mode, inputs, masters)
            details[name] = _memory(arm, _in(autocast, layer), training, inputs)
            arms.append(arm)
        except (RuntimeError, ValueError, ImportError, TypeError, AttributeError) as error:
            # One arm that cannot run here (no memory, no capture, another version) is no reason to lose the others.
            failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"
    if OURS in failed or BASELINE in failed:
        return {"not_measured": failed}
    _check_equal([(arm.name, _in(autocast, found[arm.name])) for arm in arms], x, index, weights)
    seconds = time_in_turns(arms, clock, blocks=blocks, steps=steps)
    counts = torch.bincount(index.flatten().cpu(), minlength=model.experts)
    active = int((counts > 0).sum())
    load = Load(cell.tokens, model.slots, model.experts, active, model.hidden, model.inner)
    work = load.work(cell.mode)
    return {
        "rows_per_expert": {"mean": index.numel() / model.experts, "max": int(counts.max()), "active": active},
        "floor_microseconds": 1e6 * work.seconds(peak),
        "bytes": work.bytes,
        "flops": work.flops,
        "arms": {
            name: details[name] | {"microseconds": asdict(median_interval([1e6 * value for value in values]))}
            for name, values in seconds.items()
        },
        "speedup_over": {
            name: asdict(median_interval([theirs / ours for theirs, ours in zip(values, seconds[OURS])]))
            for name, values in seconds.items()
            if name != OURS
        },
        "not_measured": failed,
    }


def _inputs(cell: Cell, model: Model, device: str, dtype: torch.dtype, training: bool) -> tuple:
    generator = torch.Generator(device).manual_seed(0)

    def draw_normal(*shape: int, scale: float, dtype: torch.dtype) -> nn.Parameter:
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)
        return nn.Parameter(values, requires_grad=training)

    x = draw_normal(cell.tokens, model.hidden, scale=1.0, dtype=torch.bfloat16)
    gate_up = draw_normal(model.experts, 2 * model.inner, model.hidden, scale=model.hidden**-0.5, dtype=dtype)
    down = draw_normal(model.experts, model.hidden, model.inner, scale=model.inner**-0.5, dtype=dtype)
    index = route(cell.routing, cell.tokens, model.slots, model.experts).to(device)
    scores = torch.rand(index.shape, generator=generator, device=device).softmax(-1)
    # In the dtype of the activations, as the routers of transformers give them: fp32 would slow the baseline.
    weights = nn.Parameter(scores.to(torch.bfloat16), requires_grad=training)
    return x, gate_up, down, index, weights


def _in(context: Callable[[], contextlib.AbstractContextManager], layer: Layer) -> Layer:
    def inside(x, index, weights):
        with context():
            return layer(x, index, weights)

    return inside


def _arm(name: str, layer: Layer, mode: str, inputs: tuple, masters: bool) -> Arm:
    x, gate_up, down, index, weights = inputs
    learned = [x, gate_up, down, weights]
    grad = torch.randn_like(x)

    def forward(_=None):
        return layer(x, index, weights)

    def new_step() -> None:
        if masters and mode in ("forward", "both"):
            # One forward per optimizer step, the worst case: our cast of the weights is within the time.
            clear_casts()

    def backward(out):
        return torch.autograd.grad(out, learned, grad)

    if mode in ("inference", "decode"):
        step = torch.no_grad()(forward)
        return Arm(name, lambda: None, captured(step) if mode == "decode" and x.is_cuda else step)
    if mode == "forward":
        return Arm(name, new_step, forward)
    if mode == "backward":
        return Arm(name, forward, backward)
    return Arm(name, new_step, lambda _: backward(forward()))


def captured(step: Callable[[object], object]) -> Callable[[object], object]:
    """The step as a CUDA graph, as decoding loops replay it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = step(None)
    return lambda _: (graph.replay(), kept)


def _memory(arm: Arm, layer: Layer, training: bool, inputs: tuple) -> dict:
    x, gate_up, down, index, weights = inputs
    found = {"peak_bytes": None, "saved_bytes": None}
    arm.step(arm.prepare())  # compiles, or fails
    if x.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        arm.step(arm.prepare())
        torch.cuda.synchronize()
        found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
    if training:
        found["saved_bytes"] = saved_bytes(layer, x, index, weights, [gate_up, down])
    return found


def _check_equal(arms: list[tuple[str, Layer]], x, index, weights) -> None:
    with torch.no_grad():
        results = {name: layer(x, index, weights).float() for name, layer in arms}
    reference = results[BASELINE]
    difference = (results[OURS] - reference).square().mean().sqrt() / reference.square().mean().sqrt()
    if not difference <= MAX_DIFFERENCE:
        raise RuntimeError(f"{OURS} differs from {BASELINE} by {difference:.1e}: there is no speed to measure.")
