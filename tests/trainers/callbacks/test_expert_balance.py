import json
import os
import shutil
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainerCallback

from hf_models.moe import SigmaMoeForSequenceClassification
from tests.trainers.callbacks.test_installation import EXPERTS, LAYERS, SEQUENCE, make_model, train
from trainers.callbacks import ExpertBalanceCallback, ProgressiveSparsificationCallback
from trainers.reliability.events import read_events


RATE = 0.01
LOSS_FREE = {"router_aux_loss_type": "none", "expert_bias_update_rate": RATE}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "logs" / "balance.jsonl").read_text().splitlines()]


class Routing(TrainerCallback):
    """Logits and bias of every training forward, by optimizer step and layer."""

    def __init__(self, model):
        self.steps, self.routers = [], model.routers
        for layer, router in enumerate(self.routers):
            router.register_forward_hook(lambda module, _, output, layer=layer: self.note(module, output[0], layer))

    def note(self, router, logits, layer):
        if router.training:
            record = (logits.detach().clone(), router.e_score_correction_bias.clone(), router.top_k)
            self.steps[-1][layer].append(record)

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append([[] for _ in self.routers])

    def summary(self, step, layer):
        """From the definitions."""
        records = self.steps[step - 1][layer]
        counts = torch.zeros(EXPERTS)
        for logits, bias, top_k in records:
            for row in logits:
                for expert in sorted(range(EXPERTS), key=lambda e: -(row[e].sigmoid() + bias[e]))[:top_k]:
                    counts[expert] += 1
        logits = torch.cat([record[0] for record in records]).double()
        probs = logits.softmax(-1)
        f, p = counts / counts.sum(), probs.mean(0)
        deviation = counts / counts.mean() - 1
        return {
            "top_k": records[0][2],
            "f": f,
            "p": p,
            "max_deviation": deviation.max(),
            "min_deviation": deviation.min(),
            "max_violation": deviation.max(),
            "starved_experts": (counts < 0.1 * counts.mean()).sum(),
            "entropy": -(probs * probs.log()).sum(-1).mean(),
            "logit_std": logits.std(correction=0),
            "load_balancing_loss": EXPERTS * (f * p).sum(),
        }


def expected_bias(routing, layer, steps):
    bias = torch.zeros(EXPERTS)
    for step in range(1, steps + 1):
        f = routing.summary(step, layer)["f"]
        bias += RATE * torch.sign(1 / EXPERTS - f.round(decimals=6))
    return bias


# --- rows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_are_what_the_routers_did(tmp_path, accumulation):
    model = make_model(**LOSS_FREE)
    routing = Routing(model)
    schedule = ProgressiveSparsificationCallback([(0, [3, 2]), (2, 1)])
    callback = ExpertBalanceCallback(record_vectors=True)
    train(model, tmp_path, routing, schedule, callback, gradient_accumulation_steps=accumulation)

    rows = rows_of(tmp_path)
    assert [(row["step"], row["layer"]) for row in rows] == [(s, l) for s in range(1, 5) for l in range(LAYERS)]
    for row in rows:
        expected = routing.summary(row["step"], row["layer"])
        for name, value in expected.items():
            value = value if isinstance(value, int) else value.tolist()
            assert row[name] == pytest.approx(value, abs=2e-6), (row["step"], row["layer"], name)
        bias = expected_bias(routing, row["layer"], row["step"])
        assert row["bias_spread"] == pytest.approx((bias.max() - bias.min()).item(), abs=1e-6)


def test_how_often_and_where(tmp_path):
    path = tmp_path / "elsewhere" / "b.jsonl"
    train(make_model(), tmp_path, ExpertBalanceCallback(path, every=2), max_steps=5)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 2, 4, 4]
    assert not {"f", "p"} & set(rows[0])
    train(make_model(), tmp_path, ExpertBalanceCallback(), max_steps=5, logging_steps=5)
    assert {row["step"] for row in rows_of(tmp_path)} == {5}


def test_evaluation_does_not_count(tmp_path):
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    train(make_model(**LOSS_FREE), plain, ExpertBalanceCallback())
    train(make_model(**LOSS_FREE), evaluated, ExpertBalanceCallback(), eval_strategy="steps", eval_steps=1)
    assert rows_of(plain) == rows_of(evaluated)


def test_a_head_that_keeps_no_routing(tmp_path):
    model = SigmaMoeForSequenceClassification(make_model().config)
    with pytest.raises(TypeError, match="use a SigmaMoeForCausalLM"):
        train(model, tmp_path, ExpertBalanceCallback())


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run of 6 steps with the loss-free bias and a checkpoint after each; its learning rate is 0, so that the
    routing depends on the bias alone."""
    folder, model = tmp_path_factory.mktemp("finished"), make_model(**LOSS_FREE)
    options = {"max_steps": 6, "learning_rate": 0.0, "save_strategy": "steps", "save_steps": 1}
    train(model, folder, ExpertBalanceCallback(), **options)
    return folder, [router.e_score_correction_bias.clone() for router in model.routers]


@pytest.mark.parametrize("step", [1, 3, 5])
@pytest.mark.parametrize("tail", ["", '{"step": 6, "layer": 0, "top'])
def test_resume_drops_what_the_checkpoint_does_not_have(finished, tmp_path, step, tail):
    folder, biases = finished
    whole = (folder / "logs" / "balance.jsonl").read_text()
    (tmp_path / "logs").mkdir()
    # What a run killed after step 6 leaves, half a line of it perhaps: all rows, but the checkpoint is an older one.
    (tmp_path / "logs" / "balance.jsonl").write_text(whole + tail)
    shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")

    model = make_model(**LOSS_FREE)
    options = {"max_steps": 6, "learning_rate": 0.0, "resume": tmp_path / f"checkpoint-{step}"}
    train(model, tmp_path, ExpertBalanceCallback(), **options)
    assert (tmp_path / "logs" / "balance.jsonl").read_text() == whole
    for router, bias in zip(model.routers, biases):
        assert torch.equal(router.e_score_correction_bias, bias)


def test_a_new_run_starts_a_new_file(finished, tmp_path):
    shutil.copytree(finished[0] / "logs", tmp_path / "logs")
    train(make_model(), tmp_path, ExpertBalanceCallback(), max_steps=1)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 1]


def test_checkpoints_hold_the_bias(finished):
    folder, biases = finished
    for step in range(1, 7):
        tensors = load_file(folder / f"checkpoint-{step}" / "model.safetensors")
        model = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}")
        for layer, router in enumerate(model.routers):
            saved = tensors[f"model.layers.{layer}.mlp.gate.e_score_correction_bias"]
            assert torch.equal(saved, router.e_score_correction_bias)
            assert 0 < saved.abs().max() <= step * RATE + 1e-6
    assert all(torch.equal(r.e_score_correction_bias, b) for r, b in zip(model.routers, biases))


# --- bias ------------------------------------------------------------------------------------------------------------


def test_bias_moves_once_per_optimizer_step(tmp_path):
    biases = {}
    for accumulation in (1, 4):
        model = make_model(**LOSS_FREE)
        routing = Routing(model)
        options = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 8 // accumulation}
        train(model, tmp_path / str(accumulation), routing, ExpertBalanceCallback(), learning_rate=0.0, **options)
        biases[accumulation] = torch.stack([router.e_score_correction_bias for router in model.routers])
        for layer in range(LAYERS):
            torch.testing.assert_close(biases[accumulation][layer], expected_bias(routing, layer, 4))
    assert torch.equal(biases[1], biases[4]) and biases[1].abs().max() > RATE


def test_no_rate_no_bias(tmp_path):
    model = make_model()
    train(model, tmp_path, ExpertBalanceCallback())
    assert all(not router.e_score_correction_bias.any() for router in model.routers)


# --- alarms ----------------------------------------------------------------------------------------------------------


def warnings_of(model, folder, **options):
    train(model, folder, ExpertBalanceCallback(), learning_rate=0.0, **options)
    events = read_events(folder, component="expert_balance")
    assert {event.severity for event in events} <= {"warning"}
    return [event.message for event in events]


def test_shortcut_alarm_on_a_flat_router(tmp_path):
    model = make_model()
    torch.nn.init.zeros_(model.routers[1].weight)  # equal scores: every token takes the same expert
    messages = warnings_of(model, tmp_path, max_steps=3)
    assert [row["load_balancing_loss"] for row in rows_of(tmp_path) if row["layer"] == 1] == [1.0] * 3
    [message] = [m for m in messages if "layer 1" in m]  # once, not at every step
    assert "the busiest expert has 4.0 times the mean load" in message and "progressive sparsification" in message


def test_no_alarm_on_a_balanced_router(tmp_path):
    model = make_model(num_experts_per_tok=EXPERTS)  # every expert, every token
    assert warnings_of(model, tmp_path) == []
    assert {row["load_balancing_loss"] for row in rows_of(tmp_path)} == {1.0}


def test_no_shortcut_alarm_where_the_loss_tells(tmp_path):
    model = make_model()
    for router in model.routers:
        # One expert takes all tokens with certainty, which the loss shows.
        torch.nn.init.zeros_(router.weight)
        router.register_forward_pre_hook(lambda module, args: (args[0].abs(),))
        router.weight.data[0] = 100.0
    assert warnings_of(model, tmp_path) == []
    assert min(row["load_balancing_loss"] for row in rows_of(tmp_path)) > EXPERTS - 0.01


def test_bias_alarm(tmp_path):
    model = make_model(num_experts_per_tok=EXPERTS, expert_bias_update_rate=RATE)
    model.routers[0].e_score_correction_bias[0] = 0.6
    model.routers[1].e_score_correction_bias[0] = 0.4
    [message] = warnings_of(model, tmp_path)
    assert "layer 0" in message and "expert_bias_cap" in message


# --- ranks -----------------------------------------------------------------------------------------------------------


def run_rank(rank, port, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    model = make_model(**LOSS_FREE)
    trainer = train(model, folder, ExpertBalanceCallback(record_vectors=True), learning_rate=0.0)
    assert dist.get_world_size() == trainer.args.world_size == 2 and dist.get_backend() == "gloo"
    torch.save([router.e_score_correction_bias for router in model.routers], f"{folder}/bias-{rank}.pt")


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "two").mkdir()
    mp.start_processes(run_rank, args=(port, str(tmp_path / "two")), nprocs=2, start_method="spawn")

    model = make_model(**LOSS_FREE)
    options = {"per_device_train_batch_size": 4, "learning_rate": 0.0}
    train(model, tmp_path / "one", ExpertBalanceCallback(record_vectors=True), **options)
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert len(one) == len(two) == 4 * LAYERS  # written once, not by each rank
    for a, b in zip(one, two):
        assert a.keys() == b.keys()
        assert a["f"] == b["f"]  # counts of 4 * SEQUENCE tokens, to the unit
        for name in a:
            assert a[name] == pytest.approx(b[name], abs=2e-6), name
    assert all(round(f * 4 * SEQUENCE, 9) == round(f * 4 * SEQUENCE) for row in two for f in row["f"])
    first, second = (torch.load(tmp_path / "two" / f"bias-{rank}.pt", weights_only=True) for rank in (0, 1))
    for router, *both in zip(model.routers, first, second):
        assert torch.equal(both[0], both[1]) and torch.equal(both[0], router.e_score_correction_bias)
        assert both[0].any()
