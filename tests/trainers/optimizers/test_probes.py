"""Alignment and Jacobians against dense ones."""

import pytest
import torch
from torch.func import jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.optimizers import align, jacobian_alignment, layer_functions


IDS = torch.randint(0, 50, (1, 6), generator=torch.Generator().manual_seed(1))
SMALL = {
    "vocab_size": 50,
    "hidden_size": 8,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def llama():
    model = LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, initializer_range=0.3)).double()
    return model.eval(), model.model.layers


def sigma_moe():
    options = {"moe_intermediate_size": 8, "num_experts": 4, "head_dim": 4, "initializer_range": 0.3}
    config = SigmaMoeConfig(**SMALL, **options, num_experts_per_tok=2)
    config._experts_implementation = "eager"
    model = SigmaMoeForCausalLM(config).double().eval()
    return model, model.model.layers


def test_alignment_is_the_cosine_of_the_directions_that_meet():
    first, second = torch.randn(4, 5, 6, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    found = align(first, second)
    for a, b, value in zip(first, second, found):
        u = torch.linalg.svd(b).U[:, 0]
        v = torch.linalg.svd(a).Vh[0]
        assert value.item() == pytest.approx(abs((u @ v).item()))
        # What the definition is for: ||AB|| >= ||A|| ||B|| Align(A, B).
        norm = torch.linalg.matrix_norm
        assert norm(a @ b, 2) >= norm(a, 2) * norm(b, 2) * value - 1e-12
    u, s, vt = torch.linalg.svd(first[0], full_matrices=False)
    assert align(first[0], vt.mT @ torch.diag(s)).item() == pytest.approx(1)


@pytest.mark.parametrize("build", [llama, sigma_moe])
def test_power_iteration_finds_what_dense_jacobians_say(build):
    model, layers = build()
    functions = layer_functions(model, layers, input_ids=IDS, use_cache=False)
    found = jacobian_alignment(functions, iterations=40)
    tops = []
    with sdpa_kernel(SDPBackend.MATH):
        for function, hidden in functions:
            size = hidden.numel()
            tops.append(torch.linalg.svd(jacrev(function)(hidden).reshape(size, size)))
    for norm, top in zip(found.norms, tops, strict=True):
        assert norm == pytest.approx(top.S[0].item(), rel=0.02)
    expected = [abs((later.Vh[0] @ earlier.U[:, 0]).item()) for earlier, later in zip(tops, tops[1:])]
    assert found.pairs == pytest.approx(expected, abs=0.05)
    assert found.mean == pytest.approx(sum(expected) / 2, abs=0.05)


def test_the_functions_are_the_layers_of_the_model():
    model, layers = llama()
    functions = layer_functions(model, layers, input_ids=IDS, use_cache=False)
    states = model(IDS, output_hidden_states=True).hidden_states
    for i, (function, hidden) in enumerate(functions):
        torch.testing.assert_close(hidden, states[i].detach())
        if i < 2:  # the last of them is normalised
            torch.testing.assert_close(function(hidden), states[i + 1])
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_what_cannot_be_measured_is_refused():
    model, layers = llama()
    with pytest.raises(ValueError, match="did not run"):
        layer_functions(model, [*layers, torch.nn.Linear(2, 2)], input_ids=IDS, use_cache=False)
    with pytest.raises(ValueError, match="model.eval"):
        layer_functions(model.train(), layers, input_ids=IDS)
