"""Tile sizes as data: what `python -m sigma_kernels.tune` found fastest, by kernel, shape, load and device.

Nothing is measured while a model runs. A device or shape without tuned tiles gets those of `default_tile`, which were
chosen from compile reports, and on a GPU one warning that says how to tune.
"""

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch


logger = logging.getLogger(__name__)

TUNED = Path(__file__).parent / "tuned"
KERNELS = ("up", "down", "dz", "dx", "dw1", "dw2", "decode")
# Of `neuron_topk_mlp`: with the tiles of `default_tile`, which nothing tunes.
NEURON_KERNELS = ("neuron_gate", "neuron_select", "neuron_up_down", "neuron_sum")
# Of `linear_cross_entropy`: with the tiles of `head_tiles`, which nothing tunes.
HEAD_KERNELS = ("head_lse", "head_dlogits", "head_dhidden", "head_dweight")
# Of `sinkhorn`: with the tile of `transport_tile`, which nothing tunes.
TRANSPORT_KERNELS = ("sinkhorn",)
_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_forced: "Tile | None" = None


@dataclass(frozen=True)
class Tile:
    """Rows, columns and depth of the product of one program, and how it is compiled."""

    rows: int
    columns: int
    depth: int
    num_warps: int = 4
    num_stages: int = 3

    @property
    def launch(self) -> dict[str, int]:
        """Options of the launch."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@dataclass(frozen=True)
class Shape:
    """What tiles are tuned for: experts, hidden size, expert width, dtype (`"bf16"`), and a load bucket, the mean rows
    per expert rounded to a power of two. Tokens, K and routing are not part of it: they change from step to step."""

    experts: int
    hidden: int
    inner: int
    dtype: str
    rows: int


def bucket(pairs: int, experts: int) -> int:
    """The power of two nearest, in log space, to the mean rows per expert; at least 1."""
    return 2 ** max(0, round(math.log2(max(pairs, 1) / experts)))


def tiles_for(
    experts: int, hidden: int, inner: int, dtype: torch.dtype, pairs: int, device: torch.device
) -> dict[str, Tile]:
    """The tile of each kernel of the layer, by name."""
    if _forced is not None:
        return dict.fromkeys(KERNELS + NEURON_KERNELS, _forced)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return _tiles_for(Shape(experts, hidden, inner, _DTYPES[dtype], bucket(pairs, experts)), name)


@cache
def _tiles_for(shape: Shape, device: str) -> dict[str, Tile]:
    tuned = read_tuned(device)
    tiles = {}
    for kernel in KERNELS + NEURON_KERNELS:
        same = [
            (known.rows, tile)
            for (name, known), tile in tuned.items()
            if name == kernel and known == Shape(**(asdict(shape) | {"rows": known.rows}))
        ]
        nearest = min(same, key=lambda entry: abs(math.log2(entry[0] / shape.rows)), default=None)
        tiles[kernel] = nearest[1] if nearest else default_tile(kernel, shape)
    if not tuned and device != "cpu":
        logger.warning(
            f"sigma_kernels has no tuned tiles for {device} and uses defaults. Tune once with `python -m "
            f"sigma_kernels.tune --experts {shape.experts} --hidden {shape.hidden} --inner {shape.inner}`."
        )
    return tiles


def default_tile(kernel: str, shape: Shape) -> Tile:
    """A tile that compiles without spills on sm_80, sm_90 and sm_100 (the compile report holds it to that).

    Few rows per expert: narrow tiles of rows, deep in the reduction, since the weights' bytes are what costs. Many:
    square tiles; `up` multiplies two blocks of columns and has half of them. fp32 operands take twice the shared
    memory and three products: smaller again.
    """
    wide = shape.dtype == "fp32"
    if kernel in ("decode", "neuron_gate"):
        return Tile(1, 8 if wide else 16, 256, num_warps=4, num_stages=2)
    if kernel == "neuron_select":  # one program searches all neurons of a pair, and lists so many at a time
        return Tile(1, 512, 1, num_warps=8, num_stages=2)
    if kernel == "neuron_up_down":
        return Tile(8 if wide else 16, 1, 256, num_warps=4, num_stages=2)
    if kernel == "neuron_sum":
        return Tile(16, 64, 1, num_warps=4, num_stages=2)
    if kernel in ("dw1", "dw2"):
        if wide:
            return Tile(64, 64, 16, num_warps=4, num_stages=2)
        if shape.rows > 128:
            return Tile(128, 128, 64, num_warps=8, num_stages=3)
        return Tile(64, 128, 16 if shape.rows <= 16 else 32, num_warps=4, num_stages=3)
    rows = 16 if shape.rows <= 16 else 32 if shape.rows <= 32 else 64
    if wide and rows == 64:
        columns, depth, stages = (32, 32, 2) if kernel == "up" else (64, 16, 3)
        return Tile(rows, columns, depth, num_warps=4, num_stages=stages)
    if wide:
        return Tile(rows, 64, 32, num_warps=4, num_stages=2)
    if rows < 64:
        return Tile(rows, 64, 128, num_warps=4, num_stages=3)
    if shape.rows <= 128:
        return Tile(64, 64, 64, num_warps=4, num_stages=4)
    return Tile(128, 64 if kernel == "up" else 128, 64, num_warps=8, num_stages=3)


def head_tiles(width: int, tokens: int, dtype: torch.dtype) -> dict[str, Tile]:
    """The tile of each kernel of `linear_cross_entropy`, by name, for a head that is `width` wide.

    Rows and columns are tokens and classes; in `head_dhidden` tokens and width, in `head_dweight` classes and width.
    """
    if _forced is not None:
        return dict.fromkeys(HEAD_KERNELS, _forced)
    wide = dtype == torch.float32
    across = min(max(16, 1 << (width - 1).bit_length()), 64 if wide else 128)
    few = wide or tokens <= 64
    rows, warps = (64, 4) if few else (128, 8)
    logits = Tile(rows, 64 if wide else 128, min(across, 32 if few else 64), num_warps=warps, num_stages=3)
    return {
        "head_lse": logits,
        "head_dlogits": logits,
        "head_dhidden": Tile(rows, across, 16 if wide else 64, num_warps=warps, num_stages=3),
        "head_dweight": Tile(64, across, 32, num_warps=4, num_stages=3),
    }


def transport_tile(columns: int) -> Tile:
    """The tile of `sinkhorn`, which has all columns of some rows; its depth says nothing."""
    across = max(16, 1 << (columns - 1).bit_length())
    if _forced is not None:
        return replace(_forced, columns=across)
    return Tile(max(1, 4096 // across), across, 1, num_warps=8, num_stages=3)


@contextmanager
def forced_tile(tile: Tile) -> Iterator[None]:
    """One tile for every kernel: for the tuner, and for tests at sizes where the defaults would be one program."""
    global _forced
    before, _forced = _forced, tile
    try:
        yield
    finally:
        _forced = before


def tuned_file(device: str) -> Path:
    """Where the tiles of a device are kept."""
    return TUNED / f"{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def read_tuned(device: str) -> dict[tuple[str, Shape], Tile]:
    """`{(kernel, shape): tile}` of a device; empty if it was never tuned. `ValueError` for a malformed file."""
    path = tuned_file(device)
    if not path.exists():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["tiles"]
        return {(e["kernel"], Shape(**e["shape"])): Tile(**e["tile"]) for e in entries}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of tuned tiles ({error!r}): tune again, or delete it.") from error
