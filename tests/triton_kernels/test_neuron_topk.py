"""Neuron experts at decoding: what is computed on a CPU without Triton, what is refused, and how bytes are counted."""

import pytest
import torch
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from torch import nn

import sigma_kernels
from sigma_kernels import bytes_per_token, neuron_topk, neuron_topk_mlp, transposed_weight, weight_casts
from tests.triton_kernels.neuron_layers import (
    LIMITS,
    check_against_reference,
    chosen,
    error,
    exact,
    layer,
    mask_of,
    tied_layer,
    transposed,
)


SHAPES = [
    pytest.param((1, 1, 4, 32, 48), id="one token, top-1"),
    pytest.param((5, 2, 4, 33, 47), id="odd sizes"),
    pytest.param((3, 4, 9, 40, 24), id="idle experts"),
    pytest.param((20, 2, 2, 16, 20), id="many tokens of one expert"),
]


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_reference_for_any_share_of_neurons(shape, dtype):
    inputs = layer(*shape, dtype=dtype)
    for neuron_top_k in (1, shape[4] // 4, shape[4] // 2, shape[4] - 1, shape[4], shape[4] + 7):
        check_against_reference(inputs, neuron_top_k)


@pytest.mark.parametrize("select_on", neuron_topk.SELECT_ON)
def test_every_score_chooses_as_the_reference(select_on):
    check_against_reference(layer(4, 2, 4, 32, 48), 9, select_on=select_on)
    inputs = tied_layer()
    for neuron_top_k in range(1, 12):
        mask = mask_of(inputs["gate_up_proj"][0, :12, 0], neuron_top_k, select_on=select_on)
        expected = mask & (inputs["gate_up_proj"][0, :12, 0] != 0)
        assert torch.equal(chosen(inputs, neuron_top_k, select_on=select_on), expected)


def test_of_equal_scores_the_first_are_kept():
    gate, act = torch.tensor([[0.0, 1, -0.0, 1, 1, 0], [0.0] * 6]), torch.tensor([[0.0, 2, -0.0, 2, 2, 0], [0.0] * 6])
    for select_on in neuron_topk.SELECT_ON:
        for neuron_top_k, rows in (
            (2, [[0, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]]),
            (5, [[1, 1, 1, 1, 1, 0], [1] * 5 + [0]]),
        ):
            assert neuron_topk._keep(gate, act, neuron_top_k, select_on).int().tolist() == rows


def test_sentinels_contribute_nothing():
    inputs = layer(9, 3, 4, 32, 20, sentinels=True)
    assert (inputs["top_k_index"] == 4).any()
    for neuron_top_k in (5, 19, 20):
        check_against_reference(inputs, neuron_top_k, sentinels=True)
    inputs["top_k_index"].fill_(4)
    assert not neuron_topk_mlp(**inputs, neuron_top_k=5, sentinels=True).any()


def test_no_tokens_are_no_rows():
    assert neuron_topk_mlp(**layer(0, 2, 4, 32, 16), neuron_top_k=3).shape == (0, 32)


@seed(0)
@settings(max_examples=30, deadline=None, database=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(3, 5), st.integers(1, 40), st.integers(1, 40)),
    st.floats(0, 1),
    st.sampled_from(neuron_topk.SELECT_ON),
    st.booleans(),
)
def test_every_shape(shape, share, select_on, sentinels):
    inputs = layer(*shape, sentinels=sentinels)
    check_against_reference(inputs, max(1, int(share * shape[4])), select_on=select_on, sentinels=sentinels)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_sum_over_neurons_is_split_for_idle_threads(threads, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    check_against_reference(layer(1, 2, 4, 32, 40), 7)
    check_against_reference(layer(1, 1, 4, 32, 40), 2)


def test_rows_of_neurons_that_are_not_kept_are_not_read():
    inputs = layer(1, 1, 2, 32, 48)
    expert, x = int(inputs["top_k_index"]), inputs["hidden_states"][0]
    kept = mask_of(inputs["gate_up_proj"][expert, :48] @ x, 12)
    expected = neuron_topk_mlp(**inputs, neuron_top_k=12, down_proj_t=transposed(inputs))
    inputs["gate_up_proj"][expert, 48:][~kept] = torch.nan
    down_proj_t = transposed(inputs).masked_fill((~kept)[:, None], torch.nan)
    inputs["gate_up_proj"][1 - expert] = torch.nan
    assert torch.equal(neuron_topk_mlp(**inputs, neuron_top_k=12, down_proj_t=down_proj_t), expected)


def test_nan_in_a_token_stays_in_that_token():
    inputs = layer(3, 1, 2, 32, 48)
    inputs["hidden_states"][1] = torch.nan
    got = neuron_topk_mlp(**inputs, neuron_top_k=12, down_proj_t=transposed(inputs))
    assert got[1].isnan().all() and got[[0, 2]].isfinite().all()


def test_hidden_states_of_another_dtype_keep_it():
    inputs = layer(2, 2, 4, 32, 48, dtype=torch.bfloat16)
    got = neuron_topk_mlp(**inputs | {"hidden_states": inputs["hidden_states"].float()}, neuron_top_k=12)
    assert got.dtype == torch.float32 and error(got, exact(inputs, 12)) < LIMITS[torch.bfloat16]


def test_autocast_casts_no_weights():
    inputs = layer(2, 2, 4, 32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        check_against_reference(inputs, 12)


def test_strides_do_not_matter():
    inputs = layer(4, 2, 4, 32, 48)
    expected = neuron_topk_mlp(**inputs, neuron_top_k=12)
    strided = {
        "hidden_states": inputs["hidden_states"].T.contiguous().T,
        "top_k_index": inputs["top_k_index"].int().T.contiguous().T,
        "top_k_weights": inputs["top_k_weights"].T.contiguous().T,
    }
    assert torch.equal(neuron_topk_mlp(**inputs | strided, neuron_top_k=12), expected)


def test_it_is_one_node_of_a_compiled_graph():
    inputs = layer(3, 2, 4, 32, 48)
    compiled = torch.compile(lambda **t: neuron_topk_mlp(**t, neuron_top_k=12) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(**inputs), neuron_topk_mlp(**inputs, neuron_top_k=12) * 2)
    with torch.no_grad():  # a copy of the weights is not looked up in a graph, and its lack does not break it
        block = torch.compile(
            lambda **t: neuron_topk_mlp(**t, neuron_top_k=12, down_proj_t=transposed_weight(t["down_proj"])),
            backend="eager",
            fullgraph=True,
        )
        torch.testing.assert_close(block(**inputs), neuron_topk_mlp(**inputs, neuron_top_k=12))
    names = ("hidden_states", "gate_up_proj", "down_proj", "top_k_index", "top_k_weights")
    x, w1, w2, index, weights = (inputs[name] for name in names)
    arguments = (x, w1, w2, transposed(inputs), index, weights, 12, "abs_act", False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.sigma_kernels.neuron_topk_mlp.default, arguments, test_utils=checks)


# --- what is refused


def test_gradients_are_refused():
    inputs = layer(2, 2, 4, 32, 16)
    inputs["gate_up_proj"].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward"):
        neuron_topk_mlp(**inputs, neuron_top_k=3)
    with torch.no_grad():
        assert not neuron_topk_mlp(**inputs, neuron_top_k=3).requires_grad


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"neuron_top_k": 0}, "at least one neuron"),
        ({"select_on": "abs_product"}, "'abs_product' needs all of W_up"),
        ({"select_on": "largest"}, "'largest' is unknown: choose one of abs_act, abs_gate, act"),
        ({"down_proj_t": torch.zeros(4, 32, 16)}, r"down_proj_t must be contiguous, \(4, 16, 32\)"),
        ({"down_proj_t": torch.zeros(4, 32, 16).transpose(1, 2)}, "down_proj_t must be contiguous"),
        ({"down_proj": torch.zeros(4, 32, 16, dtype=torch.bfloat16)}, "must have one dtype"),
        ({"top_k_index": torch.zeros(2, 2)}, "must be int64 or int32"),
        ({"hidden_states": torch.zeros(2, 31)}, r"hidden_states \(2, 31\)"),
    ],
)
def test_wrong_arguments_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        neuron_topk_mlp(**layer(2, 2, 4, 32, 16) | {"neuron_top_k": 3} | wrong)


def test_an_expert_may_have_so_many_neurons_and_no_more():
    inner = neuron_topk.MAX_INNER + 1
    inputs = layer(1, 1, 1, 1, inner)
    with pytest.raises(ValueError, match=f"up to {inner - 1} neurons"):
        neuron_topk_mlp(**inputs, neuron_top_k=3)


# --- the transposed copy


def test_the_transposed_copy_is_made_once_and_again_when_the_weight_changes():
    weight = nn.Parameter(torch.randn(2, 3, 5))
    with torch.no_grad():
        first = transposed_weight(weight)
        assert first.is_contiguous() and torch.equal(first, weight.transpose(1, 2))
        assert transposed_weight(weight) is first
        weight.mul_(2)
        assert torch.equal(transposed_weight(weight), weight.transpose(1, 2))
        weight.data = torch.randn(2, 3, 5)
        assert torch.equal(transposed_weight(weight), weight.transpose(1, 2))
        weight.data.mul_(3)  # which no counter sees
        sigma_kernels.clear_casts()
        assert torch.equal(transposed_weight(weight), weight.transpose(1, 2))
        before = len(weight_casts._transposed)
        del weight
        assert len(weight_casts._transposed) == before - 1


def test_no_copy_is_kept_in_training_of_inference_tensors_or_beside_sharded_parameters(monkeypatch):
    weight = nn.Parameter(torch.randn(2, 3, 5))
    assert transposed_weight(weight) is None
    with torch.inference_mode():
        assert transposed_weight(torch.randn(2, 3, 5)) is None
        assert transposed_weight(weight) is not None
    sharded = type("Sharded", (), {"__subclasses__": staticmethod(lambda: [nn.Linear])})
    monkeypatch.setattr(weight_casts, "FSDPModule", sharded)
    with torch.no_grad():
        assert transposed_weight(weight) is None


# --- bytes


@pytest.mark.parametrize("share", [1, 0.5, 0.25, 0.125])
def test_the_share_of_an_experts_bytes_is_one_third_of_one_and_twice_the_ratio(share):
    hidden, inner, slots = 1024, 2816, 2
    kept, dense = int(share * inner), 2 * slots * 3 * hidden * inner
    assert bytes_per_token(hidden, inner, slots, kept) / dense == pytest.approx((1 + 2 * share) / 3)
    assert bytes_per_token(hidden, inner, slots, kept, transposed=False) / dense == pytest.approx((2 + share) / 3)
    assert bytes_per_token(hidden, inner, slots, kept, width=4) == 2 * bytes_per_token(hidden, inner, slots, kept)
    assert bytes_per_token(hidden, inner, slots, 2 * inner) == dense
