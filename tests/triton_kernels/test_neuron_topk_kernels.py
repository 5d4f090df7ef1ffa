"""The kernels of neuron experts against the reference in float64, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpretedFunction

from sigma_kernels import moe_mlp, neuron_topk, neuron_topk_kernels, neuron_topk_mlp
from sigma_kernels.autotune import Tile, forced_tile
from tests.triton_kernels.neuron_layers import (
    LIMITS,
    check_against_reference,
    chosen,
    layer,
    mask_of,
    tied_layer,
    transposed,
)


pytestmark = pytest.mark.interpreter

SHAPES = [
    pytest.param((1, 1, 4, 32, 48), id="one token, top-1"),
    pytest.param((2, 2, 4, 33, 47), id="odd sizes"),
    pytest.param((1, 3, 9, 40, 24), id="idle experts"),
]


@pytest.fixture(autouse=True)
def small_tiles():
    """Several programs a vector also at these sizes."""
    with forced_tile(Tile(8, 32, 32)):
        yield


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference_for_any_share_of_neurons(shape, dtype):
    inputs = layer(*shape, dtype=dtype)
    for neuron_top_k in (1, shape[4] // 3):
        check_against_reference(inputs, neuron_top_k)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_all_neurons_are_the_dense_layer_bit_for_bit(dtype):
    inputs = layer(3, 2, 4, 32, 24, dtype=dtype)
    for neuron_top_k in (24, 30):
        assert torch.equal(neuron_topk_mlp(**inputs, neuron_top_k=neuron_top_k), moe_mlp(**inputs))


@pytest.mark.parametrize("select_on", neuron_topk.SELECT_ON)
def test_every_score_chooses_as_the_reference(select_on):
    check_against_reference(layer(2, 2, 4, 32, 48), 9, select_on=select_on)
    inputs = tied_layer(tokens=1)
    gate = inputs["gate_up_proj"][0, :12, 0]
    for neuron_top_k in (1, 3, 4, 8, 11):
        expected = mask_of(gate, neuron_top_k, select_on=select_on) & (gate != 0)
        assert torch.equal(chosen(inputs, neuron_top_k, select_on=select_on), expected)


GATES = {
    "random": lambda n: torch.randn(n),
    "few values": lambda n: torch.randint(-2, 3, (n,)).float(),
    "zeros": torch.zeros,
    "zeros of both signs": lambda n: torch.zeros(n) * torch.randn(n).sign(),
    "a bit apart": lambda n: (torch.ones(n).view(torch.int32) + torch.randperm(n).int()).view(torch.float32),
    "tiny and huge": lambda n: torch.randn(n) * 10.0 ** torch.randint(-37, 38, (n,)),
    "infinite": lambda n: torch.where(torch.rand(n) < 0.3, torch.inf, torch.randn(n)),
}


def selected(gate, neuron_top_k, select_on="abs_gate"):
    """What `neuron_select_kernel` lists, into memory that holds something else."""
    kept = torch.full((1, neuron_top_k + 1), -7, dtype=torch.int32)
    act = torch.full((1, neuron_top_k + 1), torch.nan)
    block = 1 << (gate.numel() - 1).bit_length()
    neuron_topk_kernels.neuron_select_kernel[(1,)](
        *(gate, torch.zeros(1, dtype=torch.int64), kept, act, neuron_top_k, gate.numel(), 1),
        SCORE=select_on,
        BLOCK=block,
        BN=32,
    )
    assert kept[0, -1] == -7 and act[0, -1].isnan()  # nothing beyond the list
    kept = kept[0, :-1].long()
    torch.testing.assert_close(act[0, :-1], torch.nn.functional.silu(gate[kept]), rtol=1e-6, atol=0, equal_nan=True)
    return kept


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("inner", [2, 31, 64, 300])
def test_the_selection_is_exact_and_ascending_and_takes_the_first_of_equal_ones(kind, inner):
    gate = GATES[kind](inner)
    for neuron_top_k in sorted({1, inner // 2, inner - 1}):
        expected = mask_of(gate, neuron_top_k, select_on="abs_gate").nonzero().squeeze(1)
        assert torch.equal(selected(gate, neuron_top_k), expected)


def test_numbers_that_are_not_numbers_are_kept_and_nothing_is_written_elsewhere():
    gate = torch.randn(50)
    gate[[3, 17, 41]] = torch.nan
    kept = selected(gate, 10).tolist()
    assert {3, 17, 41} <= set(kept) and len(set(kept)) == 10 and kept == sorted(kept)


def test_sentinels_contribute_nothing():
    inputs = layer(4, 2, 4, 32, 20, sentinels=True)
    assert (inputs["top_k_index"] == 4).any()
    check_against_reference(inputs, 5, sentinels=True)


def test_no_tokens_are_no_rows():
    assert neuron_topk_mlp(**layer(0, 2, 4, 32, 16), neuron_top_k=3).shape == (0, 32)


@seed(0)
@settings(max_examples=10, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(2, 5), st.integers(1, 40), st.integers(2, 40)),
    st.floats(0, 1),
    st.sampled_from(neuron_topk.SELECT_ON),
    st.booleans(),
)
def test_every_shape(shape, share, select_on, sentinels):
    inputs = layer(*shape, sentinels=sentinels)
    neuron_top_k = min(max(1, int(share * shape[4])), shape[4] - 1)
    check_against_reference(inputs, neuron_top_k, select_on=select_on, sentinels=sentinels)


@pytest.mark.parametrize("sentinels", [False, True])
def test_everything_that_is_read_was_written(sentinels):
    inputs = layer(3, 2, 4, 24, 20, sentinels=sentinels)
    torch.use_deterministic_algorithms(True)  # memory that nobody wrote holds NaN
    try:
        assert torch.empty(3).isnan().all()
        got = neuron_topk_mlp(**inputs, neuron_top_k=7, sentinels=sentinels)
    finally:
        torch.use_deterministic_algorithms(False)
    assert got.isfinite().all()


def test_equal_inputs_give_equal_bits():
    inputs = layer(2, 2, 4, 32, 40)
    results = [neuron_topk_mlp(**inputs, neuron_top_k=11, down_proj_t=transposed(inputs)) for _ in range(2)]
    assert torch.equal(*results)


def test_the_gate_is_rounded_to_nearest_even_as_torch_rounds():
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0x7F800000, 0x00000001, 0x7FC00000])
    values = torch.cat([bits.to(torch.int32).view(torch.float32), torch.randn(57)])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        # One hidden unit, x = 1: a gate is its weight, here one that `dtype` holds, times a number that it does not.
        x, weight = torch.full((1, 1), 1.0 + 2**-7, dtype=dtype), values.to(dtype)[None, :, None]
        gate = torch.empty(1, 64, dtype=dtype)
        neuron_topk_kernels.neuron_gate_kernel[(1, 4)](
            *(x, weight.repeat(1, 2, 1), torch.zeros(1, dtype=torch.int64), gate, 1, 1, 64, 1), BN=16, BK=16
        )
        expected = (weight[0, :, 0].float() * x.float()[0]).to(dtype)
        torch.testing.assert_close(gate[0], expected, rtol=0, atol=0, equal_nan=True)


def test_the_kernels_are_really_interpreted():
    assert isinstance(neuron_topk_kernels.neuron_select_kernel, InterpretedFunction)
