"""Neuron experts where only a GPU can answer: rounding, races, graphs, synchronisation, wide selections."""

import pytest
import torch

from sigma_kernels import moe_mlp, neuron_topk_mlp, reference
from sigma_kernels.neuron_topk import SELECT_ON
from tests.triton_kernels.neuron_layers import error, exact, layer, transposed


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative root-mean-square errors of kernels that round as they should.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 7e-3}
SHAPES = [
    pytest.param((1, 1, 96, 1536, 768), id="Sigma-MoE-Tiny"),
    pytest.param((4, 8, 64, 2048, 1024), id="OLMoE-1B-7B"),
    pytest.param((3, 2, 5, 321, 203), id="odd sizes"),
]


@pytest.fixture(autouse=True)
def exact_references():
    """No TF32 in what we compare with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(inputs):
    return {name: tensor.cuda() for name, tensor in inputs.items()}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference_with_and_without_the_copy(shape, dtype):
    inputs = on_gpu(layer(*shape, dtype=dtype))
    for share in (0.125, 0.5):
        neuron_top_k = int(share * shape[4])
        # Products in another order may round a gate to its neighbour, and another neuron may be kept for it.
        limit = LIMITS[dtype] if dtype == torch.float32 else 2e-2
        expected = exact(inputs, neuron_top_k)
        for down_proj_t in (None, transposed(inputs)):
            got = neuron_topk_mlp(**inputs, neuron_top_k=neuron_top_k, down_proj_t=down_proj_t)
            assert error(got, expected) < limit


@pytest.mark.parametrize("select_on", SELECT_ON)
def test_every_score_and_sentinels(select_on):
    inputs = on_gpu(layer(5, 3, 8, 256, 128, sentinels=True))
    expected = exact(inputs, 40, select_on=select_on)
    got = neuron_topk_mlp(**inputs, neuron_top_k=40, select_on=select_on, sentinels=True)
    assert error(got, expected) < LIMITS[torch.float32]


@pytest.mark.parametrize("inner", [768, 1000, 4096, 14336])
def test_ties_take_the_first_neurons(inner):
    # One hidden unit, x = 1: a gate is its weight, one of a few values. Neuron j writes 1 to output j of as many.
    gate = torch.randint(-2, 3, (inner,)).float() + 0.5
    gate_up = torch.zeros(1, 2 * inner, inner, dtype=torch.bfloat16, device="cuda")
    gate_up[0, :inner, 0], gate_up[0, inner:, 0] = gate.cuda(), 1.0
    x = torch.zeros(1, inner, dtype=torch.bfloat16, device="cuda")
    x[0, 0] = 1.0
    down = torch.eye(inner, dtype=torch.bfloat16, device="cuda")[None]
    index, weights = torch.zeros(1, 1, dtype=torch.int64, device="cuda"), torch.ones(1, 1, device="cuda")
    activated = torch.nn.functional.silu(gate.bfloat16()).float()
    for neuron_top_k in (1, inner // 3, inner - 1):
        got = neuron_topk_mlp(x, gate_up, down, index, weights, neuron_top_k)
        expected = reference.neuron_mask(gate, activated, neuron_top_k)
        assert torch.equal(got[0].cpu() != 0, expected)


def test_all_neurons_are_the_dense_layer_bit_for_bit():
    inputs = on_gpu(layer(4, 2, 16, 512, 256, dtype=torch.bfloat16))
    assert torch.equal(neuron_topk_mlp(**inputs, neuron_top_k=256), moe_mlp(**inputs))


def test_equal_inputs_give_equal_bits():
    inputs = on_gpu(layer(8, 8, 64, 2048, 1024, dtype=torch.bfloat16))
    first = neuron_topk_mlp(**inputs, neuron_top_k=256)
    for _ in range(5):
        assert torch.equal(neuron_topk_mlp(**inputs, neuron_top_k=256), first)


def test_nothing_waits_for_the_gpu():
    inputs = on_gpu(layer(4, 2, 16, 256, 128, dtype=torch.bfloat16, sentinels=True))
    neuron_topk_mlp(**inputs, neuron_top_k=32, sentinels=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        neuron_topk_mlp(**inputs, neuron_top_k=32, sentinels=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_other_tokens_and_other_routings():
    inputs = on_gpu(layer(2, 2, 16, 256, 128, dtype=torch.bfloat16))
    neuron_topk_mlp(**inputs, neuron_top_k=32)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = neuron_topk_mlp(**inputs, neuron_top_k=32)
    other = on_gpu(layer(2, 2, 16, 256, 128, dtype=torch.bfloat16))
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        inputs[name].copy_(other[name])
    graph.replay()
    torch.testing.assert_close(out, neuron_topk_mlp(**inputs, neuron_top_k=32), rtol=0, atol=0)


def test_a_compiled_graph_holds_the_layer_whole():
    inputs = on_gpu(layer(2, 2, 16, 256, 128, dtype=torch.bfloat16))
    compiled = torch.compile(lambda **tensors: neuron_topk_mlp(**tensors, neuron_top_k=32) * 2, fullgraph=True)
    assert torch.equal(compiled(**inputs), neuron_topk_mlp(**inputs, neuron_top_k=32) * 2)
