"""Drawn numbers of active experts in real runs of the Trainer: when they change, who agrees, what never sees them."""

import argparse
import inspect
import json
import os
import socket
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_models.moe.elastic import experts_in_force, experts_of_config, routers_of
from hf_models.moe.elastic_hosts import wrap_moe
from hf_models.moe.expert_sampling import ExpertSampling, phds_stages
from hf_models.moe.modeling_m_moe import MMoeForCausalLM
from tests.hf_models.moe.elastic_models import LAYERS, build
from tests.trainers.callbacks.test_installation import train
from trainers.callbacks import (
    ExpertBalanceCallback,
    MatryoshkaExpertsCallback,
    ProgressiveSparsificationCallback,
    SparsificationStage,
)


INFERENCE_K = 3
WORLD = 2


def make_model(name="m_moe", **options):
    options = {"k_max": 6, "router_aux_loss_coef": 0.01, "initializer_range": 0.1, **options}
    return build(name, **options)


class Seen(TrainerCallback):
    """k of every forward of the model, in training and otherwise, by optimizer step."""

    def __init__(self, model):
        self.training, self.evaluation = {}, []
        self.step, self.routers = 0, routers_of(model)
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(lambda module, _, output, layer=layer: self.note(module, layer, output))

    def note(self, router, layer, output):
        if torch._C._current_graph_task_id() != -1:  # checkpointing runs the layer again in the backward
            assert output[2].shape[-1] == self.training[self.step][-1][layer]
            return
        seen = self.training.setdefault(self.step, []) if router.training else self.evaluation
        if layer == 0:
            seen.append([])
        assert output[2].shape[-1] == router.top_k
        seen[-1].append(router.top_k)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step


def run(tmp_path, *others, model=None, callback=None, **options):
    model = make_model() if model is None else model
    callback = MatryoshkaExpertsCallback() if callback is None else callback
    seen = Seen(model)
    trainer = train(model, tmp_path, callback, *others, seen, **options)
    return trainer, callback, seen


# --- when it changes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["global_batch", "micro_batch", "layer"])
def test_micro_batches_run_with_the_draws_of_their_step(mode, tmp_path):
    options = {"gradient_accumulation_steps": 3, "max_steps": 6}
    _, callback, seen = run(tmp_path, model=make_model(k_sampling=mode, k_seed=2), **options)
    sampling = ExpertSampling(1, 6, k_sampling=mode, k_seed=2)
    expected = {step: [sampling.draw(step, micro, LAYERS) for micro in range(3)] for step in range(6)}
    assert seen.training == expected
    held = [len({tuple(ks) for ks in step}) == 1 for step in seen.training.values()]
    flat = [len(set(ks)) == 1 for step in seen.training.values() for ks in step]
    assert all(held) == (mode == "global_batch") and all(flat) == (mode != "layer")
    assert callback.histogram == Counter(k for step in expected.values() for ks in step for k in ks)


def test_a_window_cut_short_by_the_end_of_an_epoch(tmp_path):
    """32 micro-batches in windows of 5: the last has two."""
    options = {"gradient_accumulation_steps": 5, "max_steps": 9}
    _, callback, seen = run(tmp_path, **options)
    sampling = ExpertSampling(1, 6)
    assert [len(micros) for micros in seen.training.values()] == [5] * 6 + [2, 5, 5]
    for step, micros in seen.training.items():
        assert micros == [sampling.draw(step, micro, LAYERS) for micro in range(len(micros))]
    assert sum(callback.histogram.values()) == LAYERS * (8 * 5 + 2)


class StopsInAWindow(TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_a_draw_that_no_micro_batch_used_is_neither_left_nor_counted(tmp_path):
    trainer, callback, _ = run(tmp_path, StopsInAWindow(), gradient_accumulation_steps=4)
    assert experts_in_force(trainer.model) == [INFERENCE_K] * LAYERS
    assert callback.histogram == Counter(ExpertSampling(1, 6).draw(0, 0, LAYERS))


def test_checkpointing_gives_the_same_gradients_at_the_same_draws(tmp_path):
    states = []
    for checkpointing in (False, True):
        options = {"gradient_checkpointing": checkpointing, "gradient_accumulation_steps": 2}
        trainer, _, seen = run(tmp_path, optim="sgd", learning_rate=0.5, max_steps=3, **options)
        states.append((trainer.model.state_dict(), seen.training))
    assert states[0][1] == states[1][1]
    for name, tensor in states[0][0].items():
        torch.testing.assert_close(states[1][0][name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_stages_of_a_short_adaptation(tmp_path):
    callback = MatryoshkaExpertsCallback(phds_stages(1, 5, anchor_share=0.3, k_seed=1))
    trainer, _, seen = run(tmp_path, callback=callback, max_steps=10)
    mixed = ExpertSampling(1, 5, k_sampling="micro_batch", k_seed=1)
    assert [seen.training[step][0] for step in range(7)] == [mixed.draw(step, 0, LAYERS) for step in range(7)]
    assert [seen.training[step][0] for step in range(7, 10)] == [[1] * LAYERS] * 3
    assert (trainer.model.config.k_sampling, trainer.model.config.k_max) == ("micro_batch", 5)
    assert trainer.state.log_history[9]["moe/expected_k"] == 1 and trainer.state.log_history[0]["moe/expected_k"] == 3


def test_training_with_draws_changes_every_kind_of_weight(tmp_path):
    before = make_model().state_dict()
    trainer, _, _ = run(tmp_path, max_steps=8)
    same = [name for name, tensor in trainer.model.state_dict().items() if torch.equal(tensor, before[name])]
    assert all("e_score_correction_bias" in name for name in same)


# --- what never sees a draw ------------------------------------------------------------------------------------------


def test_evaluation_checkpoints_and_the_trained_model_use_the_number_for_inference(tmp_path):
    model = make_model(num_experts_per_tok_per_layer=[4, 2, 1])
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    trainer, _, seen = run(tmp_path, model=model, eval_on_start=True, gradient_accumulation_steps=2, **options)
    assert seen.evaluation and all(ks == [4, 2, 1] for ks in seen.evaluation)
    assert experts_in_force(model) == [4, 2, 1] == experts_of_config(model)
    for step in range(1, 6):
        config = json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text())
        assert (config["num_experts_per_tok"], config["num_experts_per_tok_per_layer"]) == (4, [4, 2, 1])
        assert (config["k_sampling"], config["k_min"], config["k_max"]) == ("layer", 1, 6)
    again = MMoeForCausalLM.from_pretrained(tmp_path / "checkpoint-5").eval()
    ids = torch.arange(2, 9)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits)


class Looks(TrainerCallback):
    """What a callback sees that comes after a step, such as one that samples text."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.seen.append(experts_in_force(model))


def test_other_callbacks_see_the_number_for_inference_at_the_end_of_a_step(tmp_path):
    looks = Looks()
    train(make_model(), tmp_path, looks, MatryoshkaExpertsCallback())
    assert looks.seen == [[INFERENCE_K] * LAYERS] * 4


def test_a_resumed_run_draws_and_learns_what_the_uninterrupted_one_did(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole, _, seen = run(tmp_path / "whole", **options)
    again, _, seen_again = run(tmp_path / "again", resume=tmp_path / "whole" / "checkpoint-3", **options)
    assert sorted(seen_again.training) == [3, 4, 5]
    assert all(seen_again.training[step] == seen.training[step] for step in (3, 4, 5))
    for name, tensor in whole.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[name], tensor, msg=lambda m, n=name: f"{n}: {m}")


# --- what it says ----------------------------------------------------------------------------------------------------


def test_logs_say_what_was_realised_since_the_last(tmp_path):
    trainer, callback, seen = run(tmp_path, max_steps=6, logging_steps=3)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    for number, entry in enumerate(logs):
        ks = [k for step in range(3 * number, 3 * number + 3) for micro in seen.training[step] for k in micro]
        assert entry["moe/mean_k"] == pytest.approx(sum(ks) / len(ks))
        assert entry["moe/expected_k"] == 3.5
        assert entry["moe/expert_flops_share"] == pytest.approx(sum(ks) / len(ks) / 6)
        shares = {k: entry.get(f"moe/k_share_{k}", 0) for k in range(1, 7)}
        assert shares == pytest.approx({k: ks.count(k) / len(ks) for k in range(1, 7)})
    assert sum(callback.histogram.values()) == 6 * LAYERS


def test_the_realised_cost_of_a_budget(tmp_path):
    callback = MatryoshkaExpertsCallback(ExpertSampling(1, 6, k_budget=1.0))
    _, _, seen = run(tmp_path, callback=callback, max_steps=12)
    sums = [sum(ks) for micros in seen.training.values() for ks in micros]
    assert max(sums) == 11 and min(sums) < 11  # ceil(3 * 3.5)


@pytest.mark.parametrize("before", [True, False])
def test_records_of_the_balance_make_sense_beside_it(before, tmp_path):
    model, balance = make_model(expert_bias_update_rate=0.01), ExpertBalanceCallback(record_vectors=True)
    callbacks = [balance, MatryoshkaExpertsCallback()] if before else [MatryoshkaExpertsCallback(), balance]
    seen = Seen(model)
    train(model, tmp_path, *callbacks, seen, gradient_accumulation_steps=2, max_steps=3)
    records = [json.loads(line) for line in (tmp_path / "logs" / "balance.jsonl").read_text().splitlines()]
    assert len(records) == 3 * LAYERS
    for record in records:
        ks = [micro[record["layer"]] for micro in seen.training[record["step"] - 1]]
        assert record["top_k"] == pytest.approx(sum(ks) / 2)
        assert sum(record["f"]) == pytest.approx(1) and record["load_balancing_loss"] > 0.5
    assert any(router.e_score_correction_bias.any() for router in model.routers)


# --- other models ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_a_wrapped_host_trains_with_draws_and_its_checkpoint_knows_the_range(name, tmp_path):
    model = wrap_moe(build(name, initializer_range=0.1), aux_loss_coef=0.01, aux_k="max")
    callback = MatryoshkaExpertsCallback(ExpertSampling(1, 4, k_seed=3))
    options = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
    trainer, _, seen = run(tmp_path, model=model, callback=callback, **options)
    expected = [[ExpertSampling(1, 4, k_seed=3).draw(step, micro, LAYERS) for micro in (0, 1)] for step in range(4)]
    assert list(seen.training.values()) == expected
    again = type(build(name)).from_pretrained(tmp_path / "checkpoint-4")
    assert type(again).__name__ == type(model).__name__ and again.config.num_experts_per_tok == INFERENCE_K
    assert ExpertSampling.from_config(again.config) == ExpertSampling(1, 4, k_seed=3)
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 4 and all(0 < loss < 20 for loss in logs)


def test_a_peft_model_trains_with_draws(tmp_path):
    model = get_peft_model(make_model(), LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer, _, seen = run(tmp_path, model=model)
    assert [micros[0] for micros in seen.training.values()] == [ExpertSampling(1, 6).draw(s, 0, 3) for s in range(4)]
    assert experts_in_force(trainer.model) == [INFERENCE_K] * LAYERS


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_host_that_is_not_wrapped_is_refused(tmp_path):
    with pytest.raises(TypeError, match="MixtralForCausalLM is not elastic"):
        train(build("mixtral"), tmp_path, MatryoshkaExpertsCallback(ExpertSampling(1, 4)))


def test_nothing_to_draw_is_refused(tmp_path):
    with pytest.raises(ValueError, match="k_sampling='none'"):
        train(make_model(k_sampling="none"), tmp_path, MatryoshkaExpertsCallback())


def test_more_experts_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"top_k=9 of layer 0 is not an integer in 1..num_experts=8"):
        train(make_model(), tmp_path, MatryoshkaExpertsCallback(ExpertSampling(1, 9)))
    with pytest.raises(ValueError, match="more than the 4 experts of the topk_group=1"):
        train(wrap_moe(build("deepseek_v3")), tmp_path, MatryoshkaExpertsCallback(ExpertSampling(1, 6)))


@pytest.mark.parametrize("starts", [[0.5], [0, 0.5, 0.5], [0, 0.6, 0.5], [0, 1.0]])
def test_impossible_stages_are_refused(starts):
    with pytest.raises(ValueError, match="stages start at"):
        MatryoshkaExpertsCallback([(start, ExpertSampling(1, 2)) for start in starts])


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("in_config", [True, False])
def test_a_schedule_beside_the_draws_is_refused_before_the_first_step(first, in_config, tmp_path):
    schedule = ProgressiveSparsificationCallback([SparsificationStage(0, 4), SparsificationStage(3, 2)])
    draws = MatryoshkaExpertsCallback(None if in_config else ExpertSampling(1, 6))
    model = make_model(k_sampling="layer" if in_config else "none")
    seen = Seen(model)
    with pytest.raises(ValueError, match="k_sampling='layer' draws the experts per token anew"):
        train(model, tmp_path, *((schedule, draws) if first else (draws, schedule)), seen)
    assert not seen.training


class Meddles(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.set_active_experts(5)


def test_somebody_else_who_changes_the_number_after_the_draw_is_noticed(tmp_path):
    with pytest.raises(RuntimeError, match="ran with .*something else sets them"):
        train(make_model(), tmp_path, MatryoshkaExpertsCallback(), Meddles())


# --- what it is good for ---------------------------------------------------------------------------------------------


def losses_after_training(tmp_path, *callbacks, **options):
    """Held-out nats per character at 1 and at 6 active experts, after learning to write a module of Python."""
    text = torch.tensor(list(inspect.getsource(argparse).encode("ascii", "ignore")))
    windows = text[: len(text) // 48 * 48].view(-1, 48)
    rows = [{"input_ids": ids, "labels": ids} for ids in windows]
    held_out = torch.stack([row["input_ids"] for row in rows[::10]])
    model = make_model(vocab_size=128, initializer_range=0.05, **options)
    args = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        max_steps=600,
        per_device_train_batch_size=16,
        learning_rate=5e-3,
        lr_scheduler_type="constant",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    Trainer(model, args, train_dataset=[r for i, r in enumerate(rows) if i % 10], callbacks=list(callbacks)).train()
    losses = []
    for k in (1, 6):
        with torch.no_grad(), model.eval().active_experts(k):
            losses.append(model(held_out, labels=held_out).loss.item())
    return losses


@pytest.mark.slow
def test_one_model_serves_both_ends_of_the_range(tmp_path):
    at_one, at_six = losses_after_training(tmp_path, MatryoshkaExpertsCallback())
    fixed_at_one, fixed_at_six = losses_after_training(tmp_path, num_experts_per_tok=6)
    assert at_one < fixed_at_one - 0.2  # a model trained at six falls off a cliff
    assert at_six < fixed_at_six + 0.1


# --- two processes ---------------------------------------------------------------------------------------------------


def rank_of_two(rank, port, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    results = {}
    for name in ("m_moe", "mixtral"):
        torch.manual_seed(rank)  # ranks share no random state
        if name == "m_moe":
            model = make_model(router_aux_loss_coef=0.5)
        else:
            model = wrap_moe(build(name, initializer_range=0.1), aux_loss_coef=0.5, aux_loss_type="global_batch")
        trainer, _, seen = run_two_ranks(model, f"{folder}/{name}", 2)
        results[name] = {"seen": seen.training, "weights": trainer.model.state_dict()}
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_two_ranks(model, folder, batch_size):
    callback = MatryoshkaExpertsCallback(ExpertSampling(1, 6, k_seed=1))
    options = {"optim": "sgd", "learning_rate": 0.1, "max_steps": 3, "gradient_accumulation_steps": 2}
    return run(folder, model=model, callback=callback, per_device_train_batch_size=batch_size, **options)


@pytest.mark.slow
def test_two_ranks_draw_the_same_and_learn_what_one_does(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(rank_of_two, args=(port, str(tmp_path)), nprocs=WORLD)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(WORLD))
    sampling = ExpertSampling(1, 6, k_seed=1)
    for name in ("m_moe", "mixtral"):
        expected = {step: [sampling.draw(step, micro, LAYERS) for micro in range(2)] for step in range(3)}
        assert first[name]["seen"] == second[name]["seen"] == expected
        if name == "m_moe":
            model = make_model(router_aux_loss_coef=0.5)
        else:
            model = wrap_moe(build(name, initializer_range=0.1), aux_loss_coef=0.5, aux_loss_type="global_batch")
        alone, _, _ = run_two_ranks(model, tmp_path / "alone" / name, 2 * WORLD)
        for key, tensor in alone.model.state_dict().items():
            for rank in (first, second):
                torch.testing.assert_close(
                    rank[name]["weights"][key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=key: f"{n}: {m}"
                )
