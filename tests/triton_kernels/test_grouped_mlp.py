"""The fused layer against the reference in float64, beside transformers' own backend, in Triton's interpreter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from transformers.integrations.moe import use_experts_implementation
from triton.runtime.interpreter import InterpretedFunction

import sigma_kernels
from sigma_kernels import grouped_mlp, grouped_mlp_kernels, moe_mlp, reference, weight_casts
from sigma_kernels.autotune import Tile, forced_tile


pytestmark = pytest.mark.interpreter

# Relative root-mean-square errors: those of kernels.md for a GPU, and what the interpreter, which truncates instead of
# rounding when it stores bf16, can keep.
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
NAMES = ("output", "hidden_states", "gate_up_proj", "down_proj", "top_k_weights")
SMALL = Tile(16, 16, 16)


def routing(tokens, slots, experts, kind="uniform"):
    """Indices `(tokens, slots)`, distinct in a row."""
    choices = {
        "uniform": lambda: torch.randperm(experts),
        "one expert": lambda: torch.arange(experts),  # the same for every token
        "half of the experts": lambda: torch.randperm(max(experts // 2, slots)),
        "sentinels": lambda: torch.randperm(2 * experts).clamp(max=experts),
    }
    rows = [choices[kind]()[:slots] for _ in range(tokens)]
    return torch.stack(rows) if rows else torch.zeros(0, slots, dtype=torch.int64)


def layer(tokens, slots, experts, hidden, inner, *, dtype=torch.float32, kind="uniform"):
    """Inputs of the layer, leaves that learn, and the gradient of its output."""
    tensors = {
        "hidden_states": torch.randn(tokens, hidden),
        "gate_up_proj": torch.randn(experts, 2 * inner, hidden) / hidden**0.5,
        "down_proj": torch.randn(experts, hidden, inner) / inner**0.5,
        "top_k_weights": torch.rand(tokens, slots) + 0.1,
    }
    inputs = {
        name: tensor.to(dtype if name != "top_k_weights" else torch.float32).requires_grad_()
        for name, tensor in tensors.items()
    }
    return inputs | {"top_k_index": routing(tokens, slots, experts, kind)}, torch.randn(tokens, hidden).to(dtype)


def run(function, inputs, gradient, **options):
    """Output and the four gradients."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if name != "top_k_index"}
    out = function(**leaves, top_k_index=inputs["top_k_index"], **options)
    out.backward(gradient)
    return dict(zip(NAMES, [out.detach(), *(leaves[name].grad for name in NAMES[1:])]))


def in_float64(inputs, gradient):
    def exact(**tensors):
        # Zero times everything: what contributes nothing, as beside sentinels only, has a gradient of zeros too.
        nothing = sum(t.sum() for t in tensors.values() if t.is_floating_point())
        return reference.moe_mlp(**tensors) + 0 * nothing

    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    return run(exact, wide, gradient.double())


@use_experts_implementation
class Experts(nn.Module):
    """transformers' interface around given weights; `grouped_mm` is its own."""

    def __init__(self, config, gate_up_proj, down_proj):
        super().__init__()
        self.gate_up_proj, self.down_proj = gate_up_proj, down_proj  # tensors: whoever calls has their gradients
        self.num_experts, self.act_fn = gate_up_proj.shape[0], nn.SiLU()

    def forward(self, *_):
        raise AssertionError("the eager path is not meant")


def stock(hidden_states, gate_up_proj, down_proj, top_k_index, top_k_weights):
    config = type("Config", (), {"_experts_implementation": "grouped_mm"})
    return Experts(config, gate_up_proj, down_proj)(hidden_states, top_k_index, top_k_weights)


def errors(got, expected):
    """Relative root-mean-square error of each tensor."""
    return {
        name: ((got[name].double() - expected[name]).pow(2).mean() / expected[name].pow(2).mean()).sqrt().item()
        for name in NAMES
    }


SHAPES = [
    pytest.param((24, 1, 4, 32, 16), id="top-1"),
    pytest.param((24, 2, 4, 48, 24), id="top-2"),
    pytest.param((9, 3, 16, 40, 8), id="more experts than rows"),
    pytest.param((37, 2, 2, 32, 32), id="many rows"),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_all_gradients_are_as_exact_as_the_stock_backends(shape, dtype):
    inputs, gradient = layer(*shape, dtype=dtype)
    expected = in_float64(inputs, gradient)
    with forced_tile(SMALL):
        ours = errors(run(moe_mlp, inputs, gradient), expected)
    theirs = errors(run(stock, inputs, gradient), expected)
    for name in NAMES:
        assert ours[name] < LIMITS[dtype], name
        assert theirs[name] < LIMITS[dtype], name


@pytest.mark.parametrize("kind", ["one expert", "half of the experts"])
def test_any_load_of_the_experts_gives_the_same_sums(kind):
    inputs, gradient = layer(41, 2, 6, 32, 16, kind=kind)
    with forced_tile(SMALL):
        got = run(moe_mlp, inputs, gradient)
    assert max(errors(got, in_float64(inputs, gradient)).values()) < LIMITS[torch.float32]
    idle = set(range(6)) - set(inputs["top_k_index"].flatten().tolist())
    assert idle and all((got["gate_up_proj"][e] == 0).all() and (got["down_proj"][e] == 0).all() for e in idle)


@pytest.mark.parametrize("slots", [1, 2])
def test_sentinels_contribute_nothing_and_get_nothing(slots):
    inputs, gradient = layer(20, slots, 4, 32, 16, kind="sentinels")
    sentinel = inputs["top_k_index"] >= 4
    assert sentinel.any() and not sentinel.all()
    with forced_tile(SMALL):
        got = run(moe_mlp, inputs, gradient, sentinels=True)
    assert max(errors(got, in_float64(inputs, gradient)).values()) < LIMITS[torch.float32]
    assert (got["top_k_weights"][sentinel] == 0).all()


def test_no_tokens_are_no_rows_and_zero_gradients():
    inputs, gradient = layer(0, 2, 4, 32, 16)
    got = run(moe_mlp, inputs, gradient)
    assert got["output"].shape == (0, 32)
    assert (got["gate_up_proj"] == 0).all() and (got["down_proj"] == 0).all()


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 20),
    st.integers(1, 3),
    st.integers(3, 7),
    st.integers(1, 40),
    st.integers(1, 24),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_every_shape(tokens, slots, experts, hidden, inner, sentinels, seed):
    torch.manual_seed(seed)
    inputs, gradient = layer(tokens, slots, experts, hidden, inner, kind="sentinels" if sentinels else "uniform")
    expected = in_float64(inputs, gradient)
    with forced_tile(Tile(16, 32, 16)):
        got = run(moe_mlp, inputs, gradient, sentinels=sentinels)
    for name in NAMES:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def poisoned():
    """Memory that nobody wrote holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["uniform", "one expert", "sentinels"])
@pytest.mark.parametrize("slots", [1, 2])
def test_everything_that_is_returned_was_written(poisoned, slots, kind):
    inputs, gradient = layer(21, slots, 5, 24, 12, kind=kind)
    with forced_tile(SMALL):
        got = run(moe_mlp, inputs, gradient, sentinels=kind == "sentinels")
        with torch.no_grad():
            few = {name: t[:3] if name.startswith(("hidden", "top_k")) else t for name, t in inputs.items()}
            assert moe_mlp(**few, sentinels=kind == "sentinels").isfinite().all()
    assert all(tensor.isfinite().all() for tensor in got.values())


def test_equal_inputs_give_equal_bits():
    inputs, gradient = layer(33, 2, 4, 32, 16)
    with forced_tile(SMALL):
        first, second = run(moe_mlp, inputs, gradient), run(moe_mlp, inputs, gradient)
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_strides_do_not_matter():
    inputs, gradient = layer(17, 2, 4, 32, 16)
    with forced_tile(SMALL):
        expected = run(moe_mlp, inputs, torch.ones_like(gradient))
        strided = {
            name: t.transpose(-1, -2).contiguous().transpose(-1, -2).detach().requires_grad_(t.requires_grad)
            for name, t in inputs.items()
        }
        assert not strided["hidden_states"].is_contiguous()
        got = run(moe_mlp, strided, torch.ones(()).expand(17, 32))  # the gradient of a sum has no strides
    assert all(torch.equal(got[name], expected[name]) for name in NAMES)


# --- few tokens


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("slots", [1, 3])
def test_few_tokens_without_gradient_multiply_vectors(slots, dtype, monkeypatch):
    inputs, _ = layer(5, slots, 8, 40, 24, dtype=dtype)
    expected = reference.moe_mlp(**{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    monkeypatch.setattr(grouped_mlp, "sort_rows", None)  # nothing is sorted
    with torch.no_grad():
        got = moe_mlp(**inputs)
    assert ((got.double() - expected).pow(2).mean() / expected.pow(2).mean()).sqrt() < LIMITS[dtype]


def test_more_pairs_take_tiles_and_give_the_same(monkeypatch):
    inputs, _ = layer(20, 2, 4, 32, 16)
    with torch.no_grad(), forced_tile(SMALL):
        few = moe_mlp(**inputs)
        monkeypatch.setattr(grouped_mlp, "DECODE_PAIRS", 0)
        many = moe_mlp(**inputs)
    torch.testing.assert_close(few, many, rtol=1e-5, atol=1e-5)


# --- autograd, compilation, memory


def test_frozen_parts_get_no_gradient_and_cost_no_kernel(monkeypatch):
    inputs, gradient = layer(17, 2, 4, 32, 16)
    for name in ("gate_up_proj", "down_proj"):
        inputs[name] = inputs[name].detach()
    monkeypatch.setattr(grouped_mlp, "_weight_grad", None)
    with forced_tile(SMALL):
        moe_mlp(**inputs).backward(gradient)
    assert inputs["gate_up_proj"].grad is None and inputs["hidden_states"].grad is not None


def test_a_second_backward_is_an_error_and_no_wrong_result():
    inputs, _ = layer(7, 2, 4, 32, 16)
    loss = moe_mlp(**inputs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_nor_under_hooks_for_saved_tensors():
    inputs, _ = layer(7, 2, 4, 32, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        loss = moe_mlp(**inputs).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_operator_is_registered_as_torch_wants_it():
    inputs, _ = layer(7, 2, 4, 32, 16)
    arguments = [inputs[n] for n in ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")]
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    strided = [torch.randn(32, 7).T.requires_grad_(), *arguments[1:]]
    without_tokens = [t[:0] if t.shape[0] == 7 else t for t in arguments]
    operator = torch.ops.sigma_kernels.moe_mlp.default
    for tensors in (arguments, strided, without_tokens):
        for learning in (True, False):
            torch.library.opcheck(operator, (*tensors, torch.float32, False, learning), test_utils=checks)


@pytest.mark.slow
def test_a_compiled_graph_holds_the_layer_whole_for_any_number_of_tokens():
    def block(**inputs):
        return torch.tanh(moe_mlp(**inputs | {"hidden_states": inputs["hidden_states"] * 2}))

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for tokens in (13, 22):
        inputs, gradient = layer(tokens, 2, 4, 32, 16)
        eager, traced = run(block, inputs, gradient), run(compiled, inputs, gradient)
        for name in NAMES:
            torch.testing.assert_close(traced[name], eager[name], rtol=1e-5, atol=1e-5)


def kept(function, inputs):
    """Floating-point numbers kept for the backward, without what the caller holds anyway."""
    held = {t.untyped_storage().data_ptr() for t in inputs.values()}
    storages = {}

    def note(tensor):
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in held:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = function(**inputs)
    return sum(storages.values()), out


def test_two_numbers_of_the_expert_width_are_kept_for_each_pair():
    tokens, slots, hidden, inner = 24, 2, 64, 32
    inputs, _ = layer(tokens, slots, 4, hidden, inner)
    pairs = tokens * slots
    assert kept(moe_mlp, inputs)[0] == 2 * inner * pairs
    # and what the stock backend keeps, which is the point: at least 2 H + 4 I
    assert kept(stock, inputs)[0] >= (2 * hidden + 4 * inner) * pairs


def test_wrong_arguments_are_refused_by_name():
    inputs, _ = layer(4, 2, 4, 32, 16)
    for name, wrong, message in (
        ("hidden_states", torch.randn(4, 31), r"hidden_states \(4, 31\)"),
        ("down_proj", torch.randn(4, 16, 32), r"down_proj \(4, 16, 32\)"),
        ("top_k_index", torch.zeros(3, 2, dtype=torch.int64), r"top_k_index \(3, 2\)"),
        ("top_k_index", torch.zeros(4, 2), "top_k_index must be int64 or int32"),
    ):
        with pytest.raises(ValueError, match=message):
            moe_mlp(**inputs | {name: wrong})
    with pytest.raises(ValueError, match="compute_dtype is torch.float64"):
        moe_mlp(**inputs, compute_dtype=torch.float64)


# --- weights in another dtype


def cast(weight, *, learning=True):
    return weight_casts.cast_weight(weight, torch.bfloat16, learning=learning)


def test_weights_are_cast_once_for_each_optimizer_step():
    weight = nn.Parameter(torch.randn(2, 8, 8))
    optimizer = SGD([weight], lr=0.1)
    first = cast(weight)
    assert cast(weight) is first
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    second = cast(weight)
    assert second is not first and torch.equal(second, weight.detach().bfloat16())


def test_changed_weights_are_cast_anew():
    weight = nn.Parameter(torch.randn(2, 8, 8))
    cast(weight)
    with torch.no_grad():
        weight.mul_(2)  # a loaded checkpoint, say
    assert torch.equal(cast(weight), weight.detach().bfloat16())
    weight.data = torch.randn(2, 8, 8)
    assert torch.equal(cast(weight), weight.detach().bfloat16())
    weight.data.mul_(3)  # which no counter sees
    assert torch.equal(cast(weight, learning=False), weight.detach().bfloat16())
    sigma_kernels.clear_casts()
    assert torch.equal(cast(weight), weight.detach().bfloat16())


def test_a_copy_goes_with_its_weight_and_none_is_kept_beside_sharded_parameters(monkeypatch):
    weight = nn.Parameter(torch.randn(2, 8, 8))
    cast(weight)
    before = len(weight_casts._casts)
    del weight
    assert len(weight_casts._casts) == before - 1
    sharded = type("Sharded", (), {"__subclasses__": staticmethod(lambda: [nn.Linear])})
    monkeypatch.setattr(weight_casts, "FSDPModule", sharded)
    weight = nn.Parameter(torch.randn(2, 8, 8))
    assert cast(weight) is not cast(weight)


def test_weights_of_a_quantised_dtype_are_refused():
    inputs, _ = layer(4, 2, 4, 32, 16)
    inputs["gate_up_proj"] = torch.zeros(4, 32, 32, dtype=torch.int8)
    with pytest.raises(ValueError, match="gate_up_proj is torch.int8"):
        moe_mlp(**inputs, compute_dtype=torch.bfloat16)


def test_fp32_weights_under_bf16_compute_get_fp32_gradients():
    inputs, gradient = layer(24, 2, 4, 32, 16)
    with forced_tile(SMALL):
        got = run(moe_mlp, inputs, gradient, compute_dtype=torch.bfloat16)
    assert all(tensor.dtype == torch.float32 for tensor in got.values())
    assert max(errors(got, in_float64(inputs, gradient)).values()) < LIMITS[torch.bfloat16]


def test_the_kernels_are_really_interpreted():
    assert isinstance(grouped_mlp_kernels.up_kernel, InterpretedFunction)
    assert sigma_kernels.can_run(torch.device("cpu"))
