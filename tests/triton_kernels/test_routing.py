"""The order of rows and the tiles over them: every pair once, whatever the routing."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sigma_kernels.routing import max_tiles, sort_rows, tile_rows


@st.composite
def routings(draw):
    experts, slots = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    tokens = draw(st.integers(0, 30))
    index = draw(st.lists(st.integers(0, experts), min_size=tokens * slots, max_size=tokens * slots))
    return torch.tensor(index, dtype=torch.int64).view(tokens, slots), experts


@given(routings())
def test_rows_are_the_pairs_of_each_expert_in_their_order(routing):
    index, experts = routing
    rows = sort_rows(index, experts)
    assert rows.expert_start.dtype == rows.row_pair.dtype == torch.int32
    pairs = index.flatten().tolist()
    for expert in range(experts):
        first, last = rows.expert_start[expert], rows.expert_start[expert + 1]
        assert rows.row_pair[first:last].tolist() == [pair for pair, e in enumerate(pairs) if e == expert]
    # What is left are sentinels.
    assert sorted(rows.row_pair.tolist()) == list(range(len(pairs)))
    assert len(pairs) - rows.expert_start[-1] == pairs.count(experts)


@given(routings(), st.integers(1, 17))
def test_tiles_cover_every_row_of_an_expert_once(routing, block):
    index, experts = routing
    rows = sort_rows(index, experts)
    tiles = tile_rows(rows.expert_start, index.numel(), block)
    assert len(tiles.tile_row) == len(tiles.tile_expert) == max_tiles(index.numel(), experts, block)
    covered = []
    for expert, first in zip(tiles.tile_expert.tolist(), tiles.tile_row.tolist()):
        if expert < experts:
            last = int(rows.expert_start[expert + 1])
            assert int(rows.expert_start[expert]) <= first < last
            covered += range(first, min(first + block, last))
    assert covered == list(range(int(rows.expert_start[-1])))
