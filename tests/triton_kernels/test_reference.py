"""The reference is right by itself: against transformers' eager experts, and its gradients by finite differences."""

import torch
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from sigma_kernels import reference


def inputs(dtype=torch.float64):
    index = torch.stack([torch.randperm(3)[:2] for _ in range(5)])
    shapes = ((5, 4), (3, 6, 4), (3, 4, 3))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes], index, torch.rand(5, 2).to(dtype)


def test_it_equals_transformers_eager_experts():
    (hidden, gate_up, down), index, weights = inputs()
    config = Qwen3MoeConfig(hidden_size=4, moe_intermediate_size=3, num_experts=3, experts_implementation="eager")
    experts = Qwen3MoeExperts(config).double()
    experts.load_state_dict({"gate_up_proj": gate_up, "down_proj": down})
    expected = experts(hidden, index, weights)
    torch.testing.assert_close(reference.moe_mlp(hidden, gate_up, down, index, weights), expected)


def test_its_gradients_are_those_of_finite_differences():
    tensors, index, weights = inputs()
    weights.requires_grad_()
    torch.autograd.gradcheck(lambda x, w1, w2, s: reference.moe_mlp(x, w1, w2, index, s), (*tensors, weights))


def test_an_index_beyond_the_experts_contributes_nothing():
    (hidden, gate_up, down), index, weights = inputs()
    out = reference.moe_mlp(hidden, gate_up, down, index.masked_fill(index == 0, 3), weights)
    silent = torch.cat([torch.zeros_like(down[:1]), down[1:]])
    torch.testing.assert_close(out, reference.moe_mlp(hidden, gate_up, silent, index, weights))
