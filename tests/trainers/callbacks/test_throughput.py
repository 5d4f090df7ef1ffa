import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from hf_models.moe import SIGMA_MOE_TINY_INITIAL_TOP_K, SigmaMoeConfig
from tests.trainers.callbacks.test_installation import SEQUENCE, make_model, train
from trainers.callbacks import ThroughputCallback
from trainers.callbacks.throughput import flops_per_token, gemm_flops_per_token


def make_dense(tied: bool) -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            intermediate_size=24,
            tie_word_embeddings=tied,
        )
    )


class Slow(TrainerCallback):
    """Takes its time where a step does not."""

    def __init__(self, seconds=0.2):
        self.seconds = seconds

    def on_evaluate(self, args, state, control, **kwargs):
        time.sleep(self.seconds)

    def on_save(self, args, state, control, **kwargs):
        time.sleep(self.seconds)


class SlowStart(TrainerCallback):
    """What compilation does to the first step."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            time.sleep(0.3)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_tokens(tmp_path, accumulation):
    callback = ThroughputCallback(warmup_steps=2)
    options = {"max_steps": 5, "gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 1}
    trainer = train(make_model(), tmp_path, callback, **options)

    per_step = accumulation * 2 * SEQUENCE
    assert callback.steady_tokens == 3 * per_step
    assert callback.tokens_per_second == pytest.approx(callback.steady_tokens / callback.steady_seconds)
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in history if "throughput/step_seconds" in row] == [3, 4, 5]
    for row in history[2:]:
        tokens = row["throughput/tokens_per_second"] * row["throughput/step_seconds"]
        assert tokens == pytest.approx(per_step, rel=0.02)
        assert "throughput/mfu" not in row
    seconds = sum(row["throughput/step_seconds"] for row in history[2:])
    assert seconds == pytest.approx(callback.steady_seconds, abs=1e-4)


def test_start_up_evaluation_and_saving_are_apart(tmp_path):
    callback = ThroughputCallback(warmup_steps=1)
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    start = time.perf_counter()
    train(make_model(), tmp_path, SlowStart(), callback, Slow(), **options)
    whole = time.perf_counter() - start
    assert callback.startup_seconds > 0.3
    assert 0 < callback.steady_seconds < whole - 0.3 - 4 * 2 * 0.2


def test_a_resumed_run_starts_up_again(tmp_path):
    train(make_model(), tmp_path, ThroughputCallback(), max_steps=6, save_strategy="steps", save_steps=3)
    callback = ThroughputCallback(warmup_steps=2)
    train(make_model(), tmp_path, callback, max_steps=6, resume=tmp_path / "checkpoint-3")
    assert callback.steady_tokens == 1 * 2 * SEQUENCE


def test_nothing_before_steady_state(tmp_path):
    callback = ThroughputCallback(warmup_steps=5)
    trainer = train(make_model(), tmp_path, callback)
    assert callback.tokens_per_second is None and callback.startup_seconds > 0
    assert not any("throughput" in name for row in trainer.state.log_history for name in row)


def test_the_model_is_left_without_hooks(tmp_path):
    model = make_model()
    train(model, tmp_path, ThroughputCallback())
    assert not model._forward_pre_hooks


def test_utilisation(tmp_path):
    model = make_model()
    trainer = train(model, tmp_path, ThroughputCallback(warmup_steps=1, peak_flops=1e9))
    row = [row for row in trainer.state.log_history if "loss" in row][-1]
    expected = row["throughput/tokens_per_second"] * flops_per_token(model, SEQUENCE) / 1e9
    assert row["throughput/mfu"] == pytest.approx(expected, abs=1e-4)


# hidden 16, 2 heads of 8 and 1 key-value head, 4 experts of 8, vocabulary 40
ATTENTION = 16 * 16 + 2 * 16 * 8 + 16 * 16 + 2 * 8  # q, k and v, output, the norms of q and k
BLOCK = ATTENTION + 2 * 16  # two norms of the residual stream


@pytest.mark.parametrize("top_k", [1, 4, [3, 2]])
@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_sigma_moe_count_the_experts_in_force(top_k, tied):
    model = make_model(tie_word_embeddings=tied)
    model.set_experts_per_token(top_k)
    experts = sum(top_k) if isinstance(top_k, list) else 2 * top_k
    products = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 4 * 16)  # q, k and v, output, routers; norms multiply nothing
    products += experts * 3 * 16 * 8 + 40 * 16  # the head, tied or not
    scores = 2 * 100 * 16  # layers, half of 2 * sequence, width of the heads together
    assert flops_per_token(model, 100) == 6 * (products + scores)


def test_flops_are_those_that_torch_counts():
    """Every matrix product of forward and backward of a model with another k in each layer. Attention that is computed
    as two whole products counts twice its causal half."""
    rows, sequence, layers = 3, 16, 3
    model = make_model(num_hidden_layers=layers, num_experts_per_tok_per_layer=[4, 2, 1], attn_implementation="eager")
    model.set_experts_implementation("eager")
    ids = torch.randint(0, 40, (rows, sequence))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    acausal_half = 3 * 2 * layers * sequence * 16
    assert counter.get_total_flops() == rows * sequence * (flops_per_token(model, sequence) + acausal_half)


def test_published_flops_of_sigma_moe_tiny():
    """Check numbers of the digest, at 4096 tokens: without the routers' product, with it, and with the first stage."""
    config = SigmaMoeConfig()
    one = gemm_flops_per_token(config, 4096, [1] * config.num_hidden_layers)
    routers = 6 * config.num_hidden_layers * config.hidden_size * config.num_experts
    assert (one - routers) / 1e9 == pytest.approx(7.1286, abs=5e-5)
    assert one / 1e9 == pytest.approx(7.1781, abs=1e-4)  # cut off there, not rounded
    assert gemm_flops_per_token(config, 4096, SIGMA_MOE_TINY_INITIAL_TOP_K) / 1e9 == pytest.approx(7.8577, abs=1e-4)
    assert gemm_flops_per_token(config, 4096) == gemm_flops_per_token(config, 4096, config.top_k_per_layer)


def test_a_second_training_counts_once(tmp_path):
    """After an exception, as a rollback is one, the hook of the first training is still there."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                raise KeyboardInterrupt

    callback, model = ThroughputCallback(warmup_steps=1), make_model()
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path, callback, Stop())
    train(model, tmp_path, callback)
    assert callback.steady_tokens == 3 * 2 * SEQUENCE and not model._forward_pre_hooks


@pytest.mark.parametrize("tied", [False, True])
def test_flops_of_a_dense_model(tied):
    parameters = 3 * (BLOCK + 3 * 16 * 24) + 16 + 40 * 16
    assert flops_per_token(make_dense(tied), 100) == 6 * parameters + 12 * 3 * 16 * 100


def test_a_dense_model_trains_with_it(tmp_path):
    callback = ThroughputCallback(warmup_steps=1)
    train(make_dense(tied=True), tmp_path, callback)
    assert callback.steady_tokens == 3 * 2 * SEQUENCE
