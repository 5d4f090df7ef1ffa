"""Curves over the share of neurons, and how evenly they are used: against the host, closed forms, counts by hand."""

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_models.moe import MoneConfig, MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.neurons import neuron_networks, top_neurons
from trainers.data import train_tokenizer
from trainers.evaluation import evaluate_neuron_ratios, held_out_loss, neuron_use, unused_share


TEXT = "def add(left, right):\n    return left + right\n" * 12
LAYERS, EXPERTS, WIDTH = 2, 4, 16
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}
SPARSE = SHAPE | {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": WIDTH}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=290, show_progress=False)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    ids = tokenizer(TEXT).input_ids
    return Dataset.from_dict({"input_ids": [ids[i : i + 16] for i in range(0, 16 * 5, 16)]})


def make_host(name):
    torch.manual_seed(0)
    if name == "sigma_moe":
        return SigmaMoeForCausalLM(SigmaMoeConfig(**SPARSE, scoring_func="softmax")).eval()
    if name == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SPARSE)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, intermediate_size=WIDTH)).eval()


def make_mone(**fields):
    torch.manual_seed(0)
    return MoneForCausalLM(MoneConfig(**SPARSE | {"scoring_func": "softmax"} | fields)).eval()


def state_of(model):
    """Everything that a measurement might leave behind."""
    return {
        "ratio": (model.config.neuron_ratio, model.config.neuron_top_k),
        "kept": [network.neuron_top_k for network in neuron_networks(model)],
        "statistics": [network.neuron_statistics for network in neuron_networks(model)],
        "training": [module.training for module in model.modules()],
        "backend": [network.config._experts_implementation for network in neuron_networks(model)]
        if hasattr(neuron_networks(model)[0], "num_experts")
        else model.config._experts_implementation,
        "names": sorted(model.state_dict()),
    }


# --- the curve -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe", "qwen3"])
def test_with_all_neurons_the_loss_is_the_hosts(name, blocks, tokenizer):
    host = make_host(name)
    expected = held_out_loss(host, blocks, tokenizer)
    mone = MoneForCausalLM.from_moe(host, neuron_ratio=0.5)
    before = state_of(mone)
    half, whole = evaluate_neuron_ratios(mone, blocks, tokenizer, [0.5, 1.0])
    assert whole.loss == expected and (whole.ratio, whole.active_expert_share) == (1.0, 1.0)
    assert half.loss.nats_per_token != expected.nats_per_token
    assert half.active_expert_share == pytest.approx(2 / 3)
    assert half.loss == held_out_loss(mone, blocks, tokenizer), "the ratio in force"
    assert state_of(mone) == before


def test_each_point_is_the_model_built_with_that_share(blocks, tokenizer):
    points = evaluate_neuron_ratios(make_mone(neuron_ratio=0.5), blocks, tokenizer, [0.25, 0.75, 1 - 0.95])
    for point in points:
        assert point.loss == held_out_loss(make_mone(neuron_ratio=point.ratio), blocks, tokenizer)
    assert [point.active_expert_share for point in points] == pytest.approx([0.5, 2.5 / 3, (1 + 2 / 16) / 3])


def test_shares_of_layers_come_back(blocks, tokenizer):
    mone = make_mone(neuron_ratio=[0.25, 1.0], neuron_aux_loss_coef=0.1).train()
    before = state_of(mone)
    evaluate_neuron_ratios(mone, blocks, tokenizer, [0.5])
    after = state_of(mone)
    # the statistics are other objects of the same kind, where a loss asks for them
    assert [type(s) for s in after.pop("statistics")] == [type(s) for s in before.pop("statistics")]
    assert after == before


def test_an_impossible_share_is_refused_and_changes_nothing(blocks, tokenizer):
    mone = make_mone(neuron_ratio=0.5)
    before = state_of(mone)
    with pytest.raises(ValueError, match=r"neuron_ratio=0.0 must be in \(0, 1\]"):
        evaluate_neuron_ratios(mone, blocks, tokenizer, [0.0])
    assert state_of(mone) == before


# --- the use of neurons ----------------------------------------------------------------------------------------------


def counted_by_hand(mone, blocks):
    """Kept neurons and tokens of each expert, from what goes into the experts of each layer."""
    counts = [torch.zeros(EXPERTS, WIDTH) for _ in range(LAYERS)]
    tokens = [torch.zeros(EXPERTS, 1) for _ in range(LAYERS)]

    def hook(network, inputs):
        hidden, chosen = inputs[0], inputs[1]
        for pair in range(chosen.numel()):
            expert = chosen.flatten()[pair]
            gate = (network.gate_up_proj[expert] @ hidden[pair // chosen.shape[-1]])[:WIDTH]
            keep = top_neurons(torch.nn.functional.silu(gate).abs()[None], network.neuron_top_k)[0]
            layer = networks.index(network)
            counts[layer][expert] += keep
            tokens[layer][expert] += 1

    networks = neuron_networks(mone)
    handles = [network.register_forward_pre_hook(hook) for network in networks]
    with torch.no_grad():
        mone.eval()(input_ids=torch.tensor(blocks["input_ids"][:]))
    for handle in handles:
        handle.remove()
    return [c / t.clamp_min(1) for c, t in zip(counts, tokens)]


@pytest.mark.parametrize("backend", ["grouped_mm", "eager", "sigma_neurons"])
@pytest.mark.parametrize("batch_size", [2, 16])
def test_use_is_what_was_counted_by_hand(blocks, backend, batch_size):
    mone = make_mone(neuron_ratio=0.25)
    mone.set_experts_implementation(backend)
    before = state_of(mone)
    use = neuron_use(mone, blocks, batch_size=batch_size)
    assert state_of(mone) == before
    torch.testing.assert_close(use, counted_by_hand(mone, blocks), atol=1e-6, rtol=0)
    for layer in use:
        sums = layer.sum(dim=-1)
        seen = sums > 0
        assert seen.any() and torch.allclose(sums[seen], torch.full_like(sums[seen], 0.25 * WIDTH), atol=1e-4)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe", "qwen3"])
def test_every_host_is_counted_without_dropout_and_left_as_it_was(name, training, blocks):
    host = make_host(name)
    host.config.attention_dropout = 0.5
    for module in host.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    mone = MoneForCausalLM.from_moe(host, neuron_ratio=0.5).train(training)
    before, random = state_of(mone), torch.get_rng_state()
    use = neuron_use(mone, blocks)
    assert state_of(mone) == before and torch.equal(torch.get_rng_state(), random)
    assert [layer.shape for layer in use] == [(1 if name == "qwen3" else EXPERTS, WIDTH)] * LAYERS
    torch.testing.assert_close(neuron_use(mone, blocks), use, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in mone.parameters())


def test_layers_that_leave_nothing_out_are_not_counted(blocks):
    mone = make_mone(neuron_ratio=[1.0, 0.5], neuron_aux_loss_coef=0.1)
    before = state_of(mone)
    (use,) = neuron_use(mone, blocks)
    assert state_of(mone) == before
    assert use[use.sum(-1) > 0].sum(-1).tolist() == pytest.approx([0.5 * WIDTH] * int((use.sum(-1) > 0).sum()))
    whole = make_mone(neuron_ratio=1.0)
    assert neuron_use(whole, blocks) == [] and unused_share([]) == 0.0


def test_the_loss_of_a_forward_after_counting_is_that_of_one_before(blocks):
    """Sums that were counted for the measurement do not join the balance loss of the next training step."""
    mone = make_mone(neuron_ratio=0.5, neuron_aux_loss_coef=0.5).train()
    ids = torch.tensor(blocks["input_ids"][:])
    expected = mone(input_ids=ids, labels=ids).loss
    neuron_use(mone, blocks)
    torch.testing.assert_close(mone(input_ids=ids, labels=ids).loss, expected)


def test_unused_share_by_hand():
    layers = [
        torch.tensor([[0.5, 0.009, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]),  # the second expert saw no token
        torch.tensor([[0.01, 0.25, 0.25, 0.0]]),
    ]
    assert unused_share(layers) == pytest.approx(3 / 8)
    assert unused_share(layers, threshold=0.3) == pytest.approx(6 / 8)
    assert unused_share(layers[:1], threshold=0.0) == 0.0
    assert unused_share([torch.zeros(2, 4)]) == 0.0
