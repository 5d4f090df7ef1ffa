"""`python -m sigma_kernels.compile_report`: what the kernels cost on GPUs that need not be there.

Every launch that the layer makes, at the shapes of real models, is specialised by Triton's own launch code and
compiled by its own compiler and assembler, which come with the wheel. The report has registers, spills, shared memory,
how many programs share a multiprocessor, and the instructions that multiply; the exit status is 1 if one of them
spills, asks for more shared memory than there is, multiplies without tensor cores or does not compile. Speed and
results are not in it. `TRITON_INTERPRET` must not be set: it leaves nothing to compile.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from .autotune import (
    HEAD_KERNELS,
    KERNELS,
    NEURON_KERNELS,
    TRANSPORT_KERNELS,
    Shape,
    Tile,
    _tiles_for,
    forced_tile,
    head_tiles,
    transport_tile,
)
from .launches import DTYPES as TORCH_DTYPES
from .launches import Launch, head_launches, layer_launches, neuron_launches, transport_launches
from .neuron_topk import SELECT_ON


@dataclass(frozen=True)
class Model:
    """Shape of the experts of a published model, and how many each token visits."""

    experts: int
    slots: int
    hidden: int
    inner: int


MODELS = {
    "Sigma-MoE-Tiny": Model(96, 1, 1536, 768),
    "Qwen3-30B-A3B": Model(128, 8, 2048, 768),
    "OLMoE-1B-7B": Model(64, 8, 2048, 1024),
    "Sigma-V2-200B": Model(96, 1, 5120, 2160),
    "Mixtral-8x7B": Model(8, 2, 4096, 14336),
    "DeepSeek-V3": Model(256, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Head:
    """A head over a vocabulary: classes, full width, and the prefixes of it that have losses of their own."""

    classes: int
    hidden: int
    widths: tuple[int, ...]


HEADS = {
    "m3BERT": Head(250002, 768, (32, 64, 128, 768)),
    "in-batch negatives": Head(32768, 384, (8, 64, 384)),  # documents; without bias
}


@dataclass(frozen=True)
class Transport:
    """Plans of a model: rows, and what its numbers of columns are."""

    rows: int
    columns: tuple[int, ...]


TRANSPORTS = {"DOT-CBM": Transport(324, (112, 312))}  # patches; concepts
LOADS = tuple(2**power for power in range(13))  # mean rows per expert; of a head, tokens; of plans, how many
# fp32 weights that are cast for the products, as under autocast: gradients of weights are fp32.
DTYPES = ("bf16", "fp16", "fp32", "bf16 of fp32")
ARCHS = (80, 90, 100)


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has."""

    shared_per_program: int
    shared: int
    registers: int = 65536
    threads: int = 2048
    programs: int = 32


_HOPPER = Limits(232448, 233472)
LIMITS = {
    80: Limits(166912, 167936),
    86: Limits(101376, 102400, threads=1536, programs=16),
    89: Limits(101376, 102400, threads=1536, programs=24),
    90: _HOPPER,
    100: _HOPPER,
    103: _HOPPER,
    120: Limits(101376, 102400, threads=1536, programs=24),
}
INSTRUCTIONS = {
    "mma": r"\bmma\.sync",
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "cp.async": r"cp\.async\.c[ag]",
    "tma": r"cp\.async\.bulk\.tensor",
    "atomic": r"\b(?:atom|red)\.",
}
# Not specialised, so that no number of tokens compiles anew.
RUN_TIME_SIZES = ("num_tiles", "K", "E", "P", "k", "splits")
RUN_TIME_SIZES += ("tokens", "classes", "tiles", "first", "each", "width")
RUN_TIME_SIZES += ("images", "rows", "columns", "steps", "kept")
TENSOR_CORES = ("mma", "wgmma", "tcgen05")
ROLES = KERNELS + NEURON_KERNELS + HEAD_KERNELS + TRANSPORT_KERNELS

_one_target = threading.Lock()  # Triton's driver is one for all threads


@dataclass(frozen=True)
class Specialisation:
    """What Triton compiles for a launch; equal ones are compiled once."""

    name: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple
    attributes: tuple
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """Resources of one compiled kernel; bytes, and `spills` counts stores and loads. `error` if there is none."""

    arch: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    programs: int = 0
    instructions: dict[str, int] = field(default_factory=dict)
    error: str = ""

    def problems(self, *, multiplies: bool) -> list[str]:
        """Why this must not be shipped; with `multiplies` it has to use tensor cores."""
        if self.error:
            return [self.error]
        problems = [f"spills {self.spills} bytes"] if self.spills else []
        limit = LIMITS[self.arch].shared_per_program
        if self.shared > limit:
            problems.append(f"needs {self.shared} bytes of shared memory and may have {limit}")
        if multiplies and not any(self.instructions[kind] for kind in TENSOR_CORES):
            problems.append("multiplies without tensor cores")
        return problems


@dataclass
class Row:
    """One line of the report: a compilation, and for which models and loads it runs."""

    role: str
    dtype: str
    tile: Tile
    variant: str
    compiled: Compiled
    models: list[str]
    loads: list[int]

    @property
    def problems(self) -> list[str]:
        """See [`Compiled.problems`]."""
        without = ("decode", *NEURON_KERNELS, *TRANSPORT_KERNELS)
        return self.compiled.problems(multiplies=self.role not in without)


# --- from a launch to machine code


@contextmanager
def _targeting(arch: int) -> Iterator[list[dict]]:
    """Launches inside stop after specialisation for `arch`; yields what Triton would compile for them."""
    captured: list[dict] = []
    previous, hook = driver._active, triton.knobs.runtime.jit_cache_hook
    device = f"offline-{arch}"  # names the specialiser that Triton keeps for a device
    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: device,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", arch, 32),
        )
    )

    def capture(*, compile, **_):
        captured.append(compile)
        return True  # "already there": neither compiled nor launched

    triton.knobs.runtime.jit_cache_hook = capture
    try:
        yield captured
    finally:
        triton.knobs.runtime.jit_cache_hook = hook
        driver.set_active(previous)


def specialise(launch: Launch, arch: int) -> Specialisation:
    """What Triton compiles for `launch`: which arguments are constants, which are multiples of 16."""
    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, and there is nothing to compile.")
    with _one_target, _targeting(arch) as captured:
        launch()
    (found,) = captured
    constants, attributes = found["constants"], found["configs"][0]
    return Specialisation(
        launch.name,
        arch,
        tuple(found["signature"].items()),
        tuple(constants.items()),
        tuple((at, tuple(map(tuple, values))) for at, values in attributes.items()),
        tuple((name, found[name]) for name in ("num_warps", "num_stages")),
    )


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Resources of `launch` on `arch` (compute capability times ten)."""
    return compile_specialisation(launch.kernel, specialise(launch, arch))


def compile_specialisation(kernel, found: Specialisation) -> Compiled:
    """Compile `kernel` as specialised; a failure is in `error`, not raised."""
    source = ASTSource(
        fn=kernel,
        signature=dict(found.signature),
        constexprs=dict(found.constants),
        attrs={at: [list(value) for value in values] for at, values in found.attributes},
    )
    try:
        binary = triton.compile(source, target=GPUTarget("cuda", found.arch, 32), options=dict(found.options))
        ptx = binary.asm["ptx"]
        log = _assembler_log(ptx)
    except Exception as error:  # Triton raises many kinds, and each is a finding
        last = (str(error).strip().splitlines() or [""])[-1]
        return Compiled(found.arch, error=f"{type(error).__name__}: {last[:160]}")
    registers = int(re.search(r"Used (\d+) registers", log).group(1))
    spills = sum(map(int, re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log).groups()))
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    limits = LIMITS[found.arch]
    programs = min(
        limits.registers // (-(-registers * 32 // 256) * 256 * warps),  # handed out to a warp in units of 256
        limits.shared // (shared + 1024),
        limits.threads // (32 * warps),
        limits.programs,
    )
    instructions = {name: len(re.findall(pattern, ptx)) for name, pattern in INSTRUCTIONS.items()}
    return Compiled(found.arch, registers, spills, shared, programs, instructions)


def _assembler_log(ptx: str) -> str:
    """Registers and spills, as the assembler that Triton calls states them."""
    target = re.search(r"\.target\s+(\w+)", ptx).group(1)
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    # The names of its assemblers, and which PTX each accepts, change with Triton.
    tools = sorted(folder.glob("ptxas*"), reverse=target.startswith("sm_1"))
    errors = []
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "kernel.ptx"
        path.write_text(ptx)
        for tool in tools:
            command = [tool, "-v", "--regAllocOptLevel=2", f"-arch={target}", path, "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stderr
            errors += done.stderr.strip().splitlines()[:1]
    raise RuntimeError("; ".join(errors))


# --- the report


def shipped_launches(
    model: Model, dtype: str, load: int, *, tile: Tile | None = None, device: str = "cpu"
) -> Iterator[tuple[Launch, Tile]]:
    """The launches of training, inference and decoding at `load` rows per expert, with the tiles that they have on
    `device` (tuned, or the defaults), or all with `tile`."""
    kind, _, masters = dtype.partition(" of ")
    shape = Shape(model.experts, model.hidden, model.inner, kind, load)
    tiles = dict.fromkeys(ROLES, tile) if tile else _tiles_for(shape, device)
    for one in dict.fromkeys(tiles.values()):
        with forced_tile(one):
            layer = partial(layer_launches, slots=model.slots, masters=bool(masters))
            launches = layer(shape, learning=True) + layer(shape, learning=False)
            launches += layer(Shape(model.experts, model.hidden, model.inner, kind, 0), learning=False)
            # Neurons are multiplied in the dtype of the weights.
            if not masters and one in [tiles[role] for role in NEURON_KERNELS]:
                launches += _neuron_launches(shape, model.slots)
        yield from ((launch, one) for launch in launches if tiles[launch.role] == one)


def _neuron_launches(shape: Shape, slots: int) -> Iterator[Launch]:
    neurons = partial(neuron_launches, shape, slots, neuron_top_k=shape.inner // 4)
    for transposed in (True, False):
        for select_on in SELECT_ON:
            yield from neurons(select_on=select_on, transposed=transposed)


def shipped_heads(name: str, dtype: str, tokens: int, *, tile: Tile | None = None) -> Iterator[tuple[Launch, Tile]]:
    """The launches of `linear_cross_entropy` and its backward, of each width alone and of all as one grid."""
    head, (kind, _, masters) = HEADS[name], dtype.partition(" of ")
    for width in head.widths:
        tiles = dict.fromkeys(HEAD_KERNELS, tile) if tile else head_tiles(width, tokens, TORCH_DTYPES[kind])
        for cells in (1, 2):
            with forced_tile(tile) if tile else nullcontext():
                launches = head_launches(
                    *(width, head.classes, tokens, kind),
                    full_width=head.hidden,
                    cells=cells,
                    bias=name == "m3BERT",
                    masters=bool(masters),
                )
            yield from ((launch, tiles[launch.role]) for launch in launches)


def shipped_transports(
    name: str, dtype: str, images: int, *, tile: Tile | None = None
) -> Iterator[tuple[Launch, Tile]]:
    """The launches of `sinkhorn` for costs in `dtype`."""
    if " of " in dtype:
        return
    for columns in TRANSPORTS[name].columns:
        with forced_tile(tile) if tile else nullcontext():
            for launch in transport_launches(images, TRANSPORTS[name].rows, columns, dtype):
                yield launch, transport_tile(columns)


def report(
    arch: int,
    models: Iterable[str] = (*MODELS, *HEADS, *TRANSPORTS),
    dtypes: Iterable[str] = DTYPES,
    loads: Iterable[int] = LOADS,
    *,
    roles: Iterable[str] = ROLES,
    tile: Tile | None = None,
    device: str = "cpu",
    jobs: int = 1,
) -> list[Row]:
    """Compile all that the layers and heads of `models` launch on `arch`, each distinct compilation once."""
    kernels, rows = {}, {}
    for name in models:
        for dtype in dtypes:
            for load in loads:
                if name in HEADS:
                    shipped = shipped_heads(name, dtype, load, tile=tile)
                elif name in TRANSPORTS:
                    shipped = shipped_transports(name, dtype, load, tile=tile)
                else:
                    shipped = shipped_launches(MODELS[name], dtype, load, tile=tile, device=device)
                for launch, used in shipped:
                    if launch.role not in roles:
                        continue
                    found = specialise(launch, arch)
                    if found not in rows:
                        kernels[found] = launch.kernel
                        rows[found] = Row(launch.role, dtype, used, _variant(found), Compiled(arch), [], [])
                    row = rows[found]
                    row.models += [name] if name not in row.models else []
                    row.loads += [load] if load not in row.loads else []
    with ThreadPoolExecutor(jobs) as pool:
        for found, compiled in zip(kernels, pool.map(lambda f: compile_specialisation(kernels[f], f), kernels)):
            rows[found].compiled = compiled
    return sorted(rows.values(), key=lambda row: (ROLES.index(row.role), row.dtype, row.loads[0], row.variant))


def _variant(found: Specialisation) -> str:
    """What the specialisation fixed beyond the tile, and the sizes that are no multiples of 16."""
    names = [name for name, _ in found.signature]
    aligned = {at[0] for at, values in found.attributes if ("tt.divisibility", 16) in values}
    constants = {names[at[0]]: value for at, value in found.constants}
    parts = [found.name.removesuffix("_kernel").replace("_", " ")] if found.name.startswith("decode") else []
    shown = ("SAVE", "stride_n", "stride_r", "SCORE", "BLOCK", "stride_h", "stride_j", "BIAS", "ADD")
    parts += [f"{name}={constants[name]}" for name in shown if name in constants]
    parts += [
        f"{name} % 16"
        for at, (name, kind) in enumerate(found.signature)
        if kind in ("i32", "i64") and at not in aligned and name not in RUN_TIME_SIZES
    ]
    return ", ".join(parts)


def _ranges(loads: list[int]) -> str:
    return f"{min(loads)}-{max(loads)}" if len(loads) > 1 else str(loads[0])


def markdown(arch: int, rows: list[Row]) -> str:
    """The table of one GPU generation."""
    lines = [
        f"## sm_{arch}",
        "",
        f"{len(rows)} compilations, Triton {triton.__version__}; at most "
        f"{LIMITS[arch].shared_per_program} bytes of shared memory a program.",
        "",
        "| kernel | dtype | tile, warps, stages | variant | rows per expert | registers | spills | shared KB "
        "| programs | instructions | models |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        tile, compiled = row.tile, row.compiled
        counts = ", ".join(f"{count} {kind}" for kind, count in compiled.instructions.items() if count)
        where = "all" if set(row.models) >= set(MODELS) else ", ".join(row.models)
        lines.append(
            f"| {row.role} | {row.dtype} | {tile.rows}x{tile.columns}x{tile.depth}, {tile.num_warps}, "
            f"{tile.num_stages} | {row.variant} | {_ranges(row.loads)} | {compiled.registers} | {compiled.spills} | "
            f"{compiled.shared / 1024:.1f} | {compiled.programs} | {counts} | {where} |"
        )
    lines += [""] + [f"- **{row.role} {row.dtype} {row.tile}**: {problem}" for row in rows for problem in row.problems]
    return "\n".join(lines).rstrip() + "\n"


def as_json(reports: dict[int, list[Row]]) -> dict:
    """The report as data."""
    return {
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "compilations": [asdict(row) | {"problems": row.problems} for rows in reports.values() for row in rows],
    }


def parse_tile(text: str) -> Tile:
    """`64x128x32,4,3`: rows, columns, depth, warps, stages."""
    sizes, warps, stages = text.split(",")
    return Tile(*map(int, sizes.split("x")), num_warps=int(warps), num_stages=int(stages))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m sigma_kernels.compile_report", description=__doc__.split("\n\n")[1]
    )
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, choices=list(LIMITS))
    every = [*MODELS, *HEADS, *TRANSPORTS]
    parser.add_argument("--models", nargs="+", default=every, choices=every)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, help="mean rows per expert, tokens or plans")
    parser.add_argument("--kernels", nargs="+", default=ROLES, choices=ROLES)
    parser.add_argument("--tile", type=parse_tile, help="64x128x32,4,3 instead of the tiles that would run")
    parser.add_argument("--device", default="cpu", help="whose tuned tiles; by default the untuned ones")
    parser.add_argument("--jobs", type=int, default=1, help="compilations at a time")
    parser.add_argument("--json", type=Path, help="also write the report as data to this file")
    options = parser.parse_args(arguments)
    reports = {}
    for arch in options.arch:
        reports[arch] = report(
            arch,
            options.models,
            options.dtypes,
            options.loads,
            roles=options.kernels,
            tile=options.tile,
            device=options.device,
            jobs=options.jobs,
        )
        print(markdown(arch, reports[arch]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(as_json(reports), indent=1) + "\n", encoding="utf-8")
    return int(any(row.problems for rows in reports.values() for row in rows))


if __name__ == "__main__":
    sys.exit(main())
