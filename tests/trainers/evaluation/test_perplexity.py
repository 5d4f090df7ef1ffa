import math

import pytest
import torch
from datasets import Dataset
from transformers import Qwen3Config, Qwen3ForCausalLM

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.data import train_tokenizer
from trainers.evaluation import held_out_loss


TEXT = "def add(left, right):\n    return left + right  # größer\n" * 20
SIZES = {
    "vocab_size": 320,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "initializer_range": 0.3,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=290, show_progress=False)


@pytest.fixture(scope="module")
def blocks(tokenizer):
    ids = tokenizer(TEXT).input_ids
    ids[5] = ids[20] = tokenizer.eos_token_id
    return Dataset.from_dict({"input_ids": [ids[i : i + 16] for i in range(0, 16 * 7, 16)]})


def make_sigma(**options):
    torch.manual_seed(0)
    shape = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "router_aux_loss_coef": 10.0}
    return SigmaMoeForCausalLM(SigmaMoeConfig(**SIZES, **shape, **options))


def make_dense():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, intermediate_size=24, attention_dropout=0.5))


def by_hand(model, blocks, tokenizer):
    """One block, one token at a time, in float64."""
    model.eval()
    nats, characters = [], 0
    for block in blocks["input_ids"]:
        with torch.no_grad():
            log_probs = model(torch.tensor([block])).logits[0].double().log_softmax(-1)
        nats += [-log_probs[i, token].item() for i, token in enumerate(block[1:])]
        characters += len(tokenizer.decode([t for t in block[1:] if t != tokenizer.eos_token_id]))
    return sum(nats), len(nats), characters


@pytest.mark.parametrize("make", [make_sigma, make_dense])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_equals_a_computation_by_hand(blocks, tokenizer, make, batch_size):
    model = make()
    nats, tokens, characters = by_hand(model, blocks, tokenizer)
    result = held_out_loss(model, blocks, tokenizer, batch_size=batch_size)
    assert (result.tokens, result.characters) == (tokens, characters) == (7 * 15, characters)
    assert result.nats_per_token == pytest.approx(nats / tokens, rel=1e-5)
    assert result.bits_per_character == pytest.approx(nats / math.log(2) / characters, rel=1e-5)


def test_no_auxiliary_loss(blocks, tokenizer):
    """The loss that transformers reports, where the model adds nothing to it."""
    model = make_sigma().eval()
    ids = torch.tensor(blocks["input_ids"][:])
    expected = model(input_ids=ids, labels=ids, output_router_logits=False).loss.item()
    assert held_out_loss(model, blocks, tokenizer).nats_per_token == pytest.approx(expected, rel=1e-5)
    model.config.output_router_logits = True
    assert held_out_loss(model, blocks, tokenizer).nats_per_token == pytest.approx(expected, rel=1e-5)


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary(blocks, tokenizer):
    model = make_dense()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert held_out_loss(model, blocks, tokenizer).nats_per_token == pytest.approx(math.log(320), rel=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(blocks, tokenizer, training):
    model = make_dense().train(training)
    state = torch.get_rng_state()
    first = held_out_loss(model, blocks, tokenizer)
    assert model.training is training and held_out_loss(model, blocks, tokenizer) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_characters_do_not_depend_on_the_tokenizer(tokenizer):
    """Another tokenizer, other tokens, and for a given text nearly the same characters."""
    other = train_tokenizer([TEXT], vocab_size=262, show_progress=False)
    text = TEXT[:200]
    counted = []
    for each in (tokenizer, other):
        ids = [each.eos_token_id, *each(text).input_ids]
        result = held_out_loss(make_dense(), Dataset.from_dict({"input_ids": [ids]}), each)
        counted.append(result.characters)
        assert result.tokens == len(ids) - 1
    assert counted == [200, 200]
