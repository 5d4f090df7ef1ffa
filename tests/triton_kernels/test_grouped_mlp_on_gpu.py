"""The same claims as in the interpreter, where only a GPU can answer: rounding, races, graphs, synchronisation."""

import pytest
import torch

from sigma_kernels import grouped_mlp, moe_mlp
from sigma_kernels.autotune import tiles_for
from tests.triton_kernels.test_grouped_mlp import NAMES, errors, layer, run, stock


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Relative root-mean-square errors of kernels that round as they should: the output, and the gradients.
LIMITS = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3), torch.bfloat16: (7e-3, 1e-2)}
SHAPES = [
    pytest.param((512, 1, 96, 1536, 768), id="Sigma-MoE-Tiny, few rows"),
    pytest.param((4096, 1, 16, 512, 256), id="top-1, many rows"),
    pytest.param((777, 3, 32, 320, 200), id="odd sizes"),
]


@pytest.fixture(autouse=True)
def exact_references():
    """No TF32 in what we compare with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def on_gpu(inputs, gradient):
    return {name: t.detach().cuda().requires_grad_(t.requires_grad) for name, t in inputs.items()}, gradient.cuda()


def grouped_reference(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    """`reference.moe_mlp` an expert at a time: a token at a time would take minutes at these sizes."""
    out = torch.zeros_like(hidden_states)
    for expert in range(gate_up_proj.shape[0]):
        token, slot = (top_k_index == expert).nonzero(as_tuple=True)
        gate, up = (hidden_states[token] @ gate_up_proj[expert].T).chunk(2, dim=-1)
        rows = (torch.nn.functional.silu(gate) * up) @ down_proj[expert].T
        out = out.index_add(0, token, rows * top_k_weights[token, slot, None].to(rows.dtype))
    return out


def in_float64(inputs, gradient):
    wide = {name: t.detach().double() if t.is_floating_point() else t for name, t in inputs.items()}
    return run(grouped_reference, wide, gradient.double())


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_all_gradients_are_as_exact_as_the_stock_backends(shape, dtype):
    inputs, gradient = on_gpu(*layer(*shape, dtype=dtype))
    expected = in_float64(inputs, gradient)
    ours, theirs = errors(run(moe_mlp, inputs, gradient), expected), errors(run(stock, inputs, gradient), expected)
    for name in NAMES:
        limit = LIMITS[dtype][name != "output"]
        assert ours[name] < limit and theirs[name] < limit, (name, ours[name], theirs[name])


@pytest.mark.parametrize("kind", ["one expert", "half of the experts", "sentinels"])
def test_any_load_of_the_experts(kind):
    inputs, gradient = on_gpu(*layer(1000, 2, 16, 256, 128, dtype=torch.bfloat16, kind=kind))
    got = run(moe_mlp, inputs, gradient, sentinels=kind == "sentinels")
    assert max(errors(got, in_float64(inputs, gradient)).values()) < 1e-2


@pytest.mark.parametrize("slots", [1, 4])
def test_equal_inputs_give_equal_bits(slots):
    inputs, gradient = on_gpu(*layer(2048, slots, 32, 512, 256, dtype=torch.bfloat16))
    first = run(moe_mlp, inputs, gradient)
    for _ in range(3):
        again = run(moe_mlp, inputs, gradient)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_nothing_waits_for_the_gpu():
    inputs, gradient = on_gpu(*layer(512, 2, 16, 256, 128, dtype=torch.bfloat16))
    run(moe_mlp, inputs, gradient)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(moe_mlp, inputs, gradient)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", [1, 512])
def test_a_cuda_graph_replays_other_tokens_and_other_routings(tokens):
    inputs, _ = on_gpu(*layer(tokens, 2, 16, 256, 128, dtype=torch.bfloat16))
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    moe_mlp(**inputs)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_mlp(**inputs)
    other, _ = on_gpu(*layer(tokens, 2, 16, 256, 128, dtype=torch.bfloat16))
    for name in ("hidden_states", "top_k_index", "top_k_weights"):
        inputs[name].copy_(other[name].detach())
    graph.replay()
    torch.testing.assert_close(out, moe_mlp(**inputs), rtol=0, atol=0)


def test_a_compiled_graph_holds_the_layer_whole():
    inputs, gradient = on_gpu(*layer(512, 2, 16, 256, 128, dtype=torch.bfloat16))
    compiled = torch.compile(lambda **tensors: moe_mlp(**tensors) * 2, fullgraph=True)
    eager = run(lambda **tensors: moe_mlp(**tensors) * 2, inputs, gradient)
    traced = run(compiled, inputs, gradient)
    assert all(torch.equal(eager[name], traced[name]) for name in NAMES)


@pytest.mark.parametrize("slots", [1, 8])
def test_few_tokens_multiply_vectors_as_exactly(slots):
    inputs, _ = on_gpu(*layer(8, slots, 64, 2048, 1024, dtype=torch.bfloat16))
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    expected = grouped_reference(**{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    assert 8 * slots <= grouped_mlp.DECODE_PAIRS
    got = moe_mlp(**inputs)
    assert ((got.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt() < LIMITS[torch.bfloat16][0]


def test_the_device_has_tiles_for_every_kernel():
    device = torch.device("cuda", torch.cuda.current_device())
    assert tiles_for(96, 1536, 768, torch.bfloat16, 4096, device)


@pytest.mark.parametrize("slots", [1, 2])
def test_autocast_with_fp32_weights_computes_in_bf16(slots):
    inputs, gradient = on_gpu(*layer(512, slots, 16, 256, 128))
    expected = in_float64(inputs, gradient)
    with torch.autocast("cuda", torch.bfloat16):
        got = run(lambda **tensors: moe_mlp(**tensors, compute_dtype=torch.bfloat16), inputs, gradient)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert max(errors(got, expected).values()) < LIMITS[torch.bfloat16][1]


def test_a_cuda_graph_of_cast_weights_follows_the_weights():
    inputs, _ = on_gpu(*layer(512, 2, 16, 256, 128))
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    moe_mlp(**inputs, compute_dtype=torch.bfloat16)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = moe_mlp(**inputs, compute_dtype=torch.bfloat16)
    inputs["down_proj"].mul_(2)
    graph.replay()
    torch.testing.assert_close(out, moe_mlp(**inputs, compute_dtype=torch.bfloat16), rtol=0, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_layer_runs_on_its_own_device_and_not_on_the_current_one():
    inputs, gradient = layer(512, 2, 16, 256, 128, dtype=torch.bfloat16)
    there = {name: t.detach().to("cuda:1").requires_grad_(t.requires_grad) for name, t in inputs.items()}
    with torch.cuda.device(0):
        got = run(moe_mlp, there, gradient.to("cuda:1"))
    assert max(errors(got, in_float64(there, gradient.to("cuda:1"))).values()) < 1e-2
