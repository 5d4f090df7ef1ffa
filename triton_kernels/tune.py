"""`python -m sigma_kernels.tune`: measure on this GPU which tiles are fastest for a layer, and keep them for it.

The tiles of each kernel are tried that fit the load, compile without spills and have enough shared memory; each is
timed alone, with a cold L2 cache. What is found goes into `tuned/<device>.json` of this package, where every later
process finds it. Running again continues where the time ran out; what is there is not measured again.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial

import torch
import triton

from .autotune import KERNELS, Shape, Tile, _tiles_for, default_tile, forced_tile, read_tuned, tuned_file
from .compile_report import DTYPES, LIMITS, LOADS, Compiled, compile_launch
from .grouped_mlp import DECODE_PAIRS
from .launches import Launch, layer_launches


FINALISTS = 4  # timed again, in turns
ROUNDS = 3
MAX_ACCUMULATORS = 128  # fp32 numbers a thread; there are 255 registers, and operands and addresses need some
UNFINISHED = 3  # exit status
_SORTED_BY = ("experts", "hidden", "inner", "dtype")

Timer = Callable[[list[Launch]], float]  # microseconds of the launches together


def candidates(kernel: str, shape: Shape, arch: int) -> Iterator[Tile]:
    """Tiles worth compiling: at most twice as many rows as an expert has, operands that fit in shared memory."""
    width = 4 if shape.dtype == "fp32" else 2
    within = [size for size in (16, 32, 64, 128) if size <= max(16, 2 * shape.rows)]
    if kernel == "decode":
        sizes = ((1,), (8, 16, 32, 64), (128, 256, 512), (2, 4, 8), (2, 3))
    elif kernel in ("dw1", "dw2"):  # here the reduction runs over the rows of an expert
        sizes = ((64, 128), (64, 128, 256), within[:3], (4, 8), (2, 3, 4))
    else:
        sizes = (within, (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5))
    weights = 2 if kernel == "up" else 1  # gate and up are multiplied side by side
    for rows, columns, depth, warps, stages in itertools.product(*sizes):
        tile = Tile(rows, columns, depth, num_warps=warps, num_stages=stages)
        if kernel == "decode":
            if columns * depth <= 64 * 32 * warps:
                yield tile
            continue
        accumulators = weights * rows * columns / (32 * warps)
        operands = stages * depth * (rows + weights * columns) * width
        if 4 <= accumulators <= MAX_ACCUMULATORS and operands <= LIMITS[arch].shared_per_program:
            yield tile


def kernel_launches(
    kernel: str, shape: Shape, tile: Tile, *, slots: int, device: str | torch.device = "meta"
) -> list[Launch]:
    """The launches of `kernel` with `tile`, on data that is there to be multiplied; empty where the layer has none."""
    if kernel == "decode":
        shape = shape if shape.rows > 1 else Shape(**(asdict(shape) | {"rows": 0}))  # one token
        if max(slots, shape.rows * shape.experts) > DECODE_PAIRS:
            return []
    with forced_tile(tile):
        launches = layer_launches(shape, slots, learning=kernel != "decode", device=device)
    launches = [launch for launch in launches if launch.role == kernel]
    for tensor in (a for launch in launches for a in launch.arguments if isinstance(a, torch.Tensor)):
        if tensor.is_floating_point():
            tensor.normal_()  # what another kernel would have written
    return launches


def time_on_gpu(launches: list[Launch]) -> float:
    """Median microseconds of the launches in a row, L2 flushed before."""

    def run() -> None:
        for launch in launches:
            launch()

    return 1e3 * triton.testing.do_bench(run, warmup=10, rep=40, return_mode="median")


def fastest(
    kernel: str,
    shape: Shape,
    *,
    arch: int,
    launches_of: Callable[[str, Shape, Tile], list[Launch]],
    timer: Timer,
    compiled: Callable[[Launch], Compiled],
    jobs: int = 1,
) -> dict | None:
    """The entry of `kernel` for the file of tuned tiles; `None` if the layer never launches it at this shape."""
    default = default_tile(kernel, shape)
    tiles = list(dict.fromkeys([default, *candidates(kernel, shape, arch)]))
    # On the meta device: all candidates at once would not fit on a GPU.
    by_tile = {tile: kernel_launches(kernel, shape, tile, slots=1) for tile in tiles}
    if not by_tile[default] or not launches_of(kernel, shape, default):
        return None

    def ships(tile: Tile) -> bool:
        return not any(compiled(launch).problems(multiplies=kernel != "decode") for launch in by_tile[tile])

    with ThreadPoolExecutor(jobs) as pool:
        tiles = [tile for tile, good in zip(tiles, pool.map(ships, tiles)) if good]
    if not tiles:
        raise RuntimeError(f"No tile of {kernel} compiles for {shape} on sm_{arch}.")
    times = {tile: [timer(launches_of(kernel, shape, tile))] for tile in tiles}
    finalists = sorted(tiles, key=lambda tile: times[tile][0])[:FINALISTS]
    if default in tiles and default not in finalists:
        finalists.append(default)
    for _ in range(ROUNDS):
        for tile in finalists:
            times[tile].append(timer(launches_of(kernel, shape, tile)))
    median = {tile: statistics.median(times[tile]) for tile in finalists}
    best = min(finalists, key=median.__getitem__)
    return {
        "kernel": kernel,
        "shape": asdict(shape),
        "tile": asdict(best),
        "microseconds": round(median[best], 2),
        "default_microseconds": round(median[default], 2) if default in median else None,
        "candidates": len(tiles),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }


def tune(
    work: Iterable[tuple[str, Shape]],
    device: str,
    find: Callable[[str, Shape], dict | None],
    *,
    seconds: float,
    say: Callable[[str], None] = print,
) -> bool:
    """Find the tile of each `(kernel, shape)` that the file of `device` lacks, and write it after each. False when the
    time was up before the end."""
    known = set(read_tuned(device))
    start = time.monotonic()
    for kernel, shape in work:
        if (kernel, shape) in known:
            continue
        if time.monotonic() - start > seconds:
            return False
        entry = find(kernel, shape)
        if entry is not None:
            _add(device, entry)
            say(f"{kernel:6} {shape}: {Tile(**entry['tile'])}, {entry['microseconds']} us")
    return True


def _add(device: str, entry: dict) -> None:
    path = tuned_file(device)
    content = {"device": device, "tiles": []}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
    content["tiles"].append(entry)
    content["tiles"].sort(
        key=lambda e: (*(e["shape"][name] for name in _SORTED_BY), KERNELS.index(e["kernel"]), e["shape"]["rows"])
    )
    path.parent.mkdir(exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)  # a reader sees the old file or the new one
    _tiles_for.cache_clear()


def main(arguments: list[str] | None = None) -> int:
    """The command line. Exit status: 0 all is tuned, 2 there is no GPU, 3 the time was up (run it again)."""
    parser = argparse.ArgumentParser(prog="python -m sigma_kernels.tune", description=__doc__.split("\n\n")[1])
    for name, text in (("experts", "experts"), ("hidden", "hidden size"), ("inner", "width of an expert")):
        parser.add_argument(f"--{name}", type=int, required=True, help=text)
    parser.add_argument("--slots", type=int, default=1, help="experts a token; only for the reads of its rows")
    parser.add_argument("--dtype", default="bf16", choices=[name for name in DTYPES if " " not in name])
    parser.add_argument("--loads", type=int, nargs="+", default=LOADS, help="mean rows per expert, powers of two")
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--seconds", type=float, default=420, help="start nothing new after so long")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    options = parser.parse_args(arguments)
    if any(load < 1 or load & (load - 1) for load in options.loads):
        parser.error(f"--loads {options.loads}: loads are powers of two.")
    if not torch.cuda.is_available():
        print("Tuning measures on a GPU, and there is none here. Nothing was changed.", file=sys.stderr)
        return 2
    major, minor = torch.cuda.get_device_capability()
    arch, device = 10 * major + minor, torch.cuda.get_device_name()
    if arch not in LIMITS:
        print(f"The limits of {device} (sm_{arch}) are not known; known: {sorted(LIMITS)}.", file=sys.stderr)
        return 2
    shapes = [Shape(options.experts, options.hidden, options.inner, options.dtype, load) for load in options.loads]
    find = partial(
        fastest,
        arch=arch,
        launches_of=partial(kernel_launches, slots=options.slots, device="cuda"),
        timer=time_on_gpu,
        compiled=partial(compile_launch, arch=arch),
        jobs=options.jobs,
    )
    work = ((kernel, shape) for shape in shapes for kernel in options.kernels)
    if tune(work, device, find, seconds=options.seconds):
        print(f"Tuned; {tuned_file(device).name} is complete for these loads.")
        return 0
    print("The time was up; run the same command again to continue.")
    return UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
