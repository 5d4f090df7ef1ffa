"""Which rows belong to which expert: all on the device, nothing read back to the host.

A *pair* is one (token, slot): `pair = token * K + slot`. A *row* is a pair's position in expert order. The sort is
stable, so that equal inputs give equal metadata, bit for bit, also when gradient checkpointing routes a second time.
"""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """`expert_start (E + 1)`: first row of each expert; `row_pair (P)`: the pair at each row. Both int32.

    Pairs with an index of E or more, the sentinels of expert parallelism, come after `expert_start[E]`.
    """

    expert_start: torch.Tensor
    row_pair: torch.Tensor


class Tiles(NamedTuple):
    """Blocks of at most `block_rows` rows of one expert: `tile_expert (N)`, `tile_row (N)` (first row), int32.

    N is a bound known on the host; the `tile_expert` of tiles beyond the real ones is E.
    """

    tile_expert: torch.Tensor
    tile_row: torch.Tensor


def sort_rows(top_k_index: torch.Tensor, num_experts: int) -> Rows:
    """Expert order of the pairs of `top_k_index (tokens, K)`."""
    experts, order = torch.sort(top_k_index.reshape(-1).to(torch.int32), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=experts.device)
    return Rows(torch.searchsorted(experts, bounds, out_int32=True), order.to(torch.int32))


def tile_rows(expert_start: torch.Tensor, num_pairs: int, block_rows: int) -> Tiles:
    """Cut the rows of each expert into tiles; an expert without rows has none."""
    num_experts = expert_start.shape[0] - 1
    bound = max_tiles(num_pairs, num_experts, block_rows)
    tiles_of = (expert_start.diff() + (block_rows - 1)) // block_rows  # (E)
    ends = tiles_of.cumsum(0, dtype=torch.int32)
    tiles = torch.arange(bound, dtype=torch.int32, device=expert_start.device)
    experts = torch.searchsorted(ends, tiles, right=True, out_int32=True)  # E beyond the last tile
    inside = experts.clamp(max=num_experts - 1)
    first = expert_start[inside] + (tiles - (ends - tiles_of)[inside]) * block_rows
    return Tiles(experts, first.to(torch.int32))


def max_tiles(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """No routing has more tiles: each expert wastes less than one, and none has a tile without a row."""
    return min(num_pairs, -(-num_pairs // block_rows) + num_experts)
