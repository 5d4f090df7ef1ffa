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


def test_the_masked_neurons_are_the_kept_ones_and_all_of_them_the_dense_layer():
    (hidden, gate_up, down), index, weights = inputs()
    for select_on in ("abs_act", "abs_gate", "act"):
        kept = reference.neuron_topk_mlp(hidden, gate_up, down, index, weights, 2, select_on=select_on)
        masked = reference.masked_neuron_mlp(hidden, gate_up, down, index, weights, 2, select_on=select_on)
        torch.testing.assert_close(kept, masked)
        assert not torch.allclose(kept, reference.moe_mlp(hidden, gate_up, down, index, weights))
    for function in (reference.neuron_topk_mlp, reference.masked_neuron_mlp):
        every = function(hidden, gate_up, down, index, weights, 3)
        torch.testing.assert_close(every, reference.moe_mlp(hidden, gate_up, down, index, weights))


def test_gradients_reach_kept_neurons_only():
    tensors, index, weights = inputs()
    torch.autograd.gradcheck(lambda x, w1, w2: reference.masked_neuron_mlp(x, w1, w2, index, weights, 2), tensors)
    hidden, gate_up, down = tensors
    one = (hidden[:1].detach(), gate_up, down, index[:1, :1], weights[:1, :1])
    grad_up, grad_down = torch.autograd.grad(reference.masked_neuron_mlp(*one, 2).sum(), (gate_up, down))
    expert = int(index[0, 0])
    assert (grad_down[expert] != 0).all(0).tolist() == (grad_up[expert, :3] != 0).all(1).tolist()
    assert (grad_down[expert] != 0).any(0).sum() == 2


def test_of_equal_neurons_the_first_are_kept():
    gate = torch.tensor([0.0, 1.0, -0.0, 1.0, 1.0, 0.0])
    assert reference.neuron_mask(gate, gate, 2).tolist() == [False, True, False, True, False, False]
    assert reference.neuron_mask(gate, gate, 5).tolist() == [True, True, True, True, True, False]


def test_the_linear_cross_entropy_is_that_of_torch_and_its_mean_of_nothing_is_zero():
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 3), (9, 3), (9,)))
    labels = torch.tensor([0, 8, -100, 3, 3, -100])
    for offset in (bias, None):
        logits = torch.nn.functional.linear(hidden, weight, offset)
        for reduction in ("mean", "sum", "none"):
            got = reference.linear_cross_entropy(hidden, weight, offset, labels, reduction=reduction)
            torch.testing.assert_close(got, torch.nn.functional.cross_entropy(logits, labels, reduction=reduction))
    torch.autograd.gradcheck(lambda *t: reference.linear_cross_entropy(*t, labels), (hidden, weight, bias))
    nothing = reference.linear_cross_entropy(hidden, weight, bias, torch.full_like(labels, -100))
    assert nothing == 0 and not any(g.any() for g in torch.autograd.grad(nothing, (hidden, weight, bias)))
