# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Two real gloo processes against one: losses, statistics and gradients, bare and through transformers' Trainer.

One pair of processes runs every job below once and writes what it saw to files; the tests compare that with one
process and with references written here from the definitions.
"""

import tempfile

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.balance import (
    RoutingWindow,
    global_batch_load_balancing_loss,
    router_z_loss,
    sequence_load_balancing_loss,
    sum_over_ranks,
    switch_load_balancing_loss,
    top1_load_balancing_loss,
)
from tests.gloo_ranks import results_of_ranks


WORLD = 2
KINDS = ("switch", "sequence", "global_batch", "top1")
EXPERTS = 6
COEF, Z_COEF = 0.5, 0.1  # large: an error in the auxiliary part must not hide behind the language model's


def make_model(kind="global_batch", **overrides):
    torch.manual_seed(0)
    config = SigmaMoeConfig(
        **{
            "vocab_size": 30,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "moe_intermediate_size": 8,
            "num_experts": EXPERTS,
            "num_experts_per_tok_per_layer": [2, 1],
            "max_position_embeddings": 32,
            "initializer_range": 0.2,
            "router_aux_loss_type": kind,
            "router_aux_loss_coef": COEF,
            "router_z_loss_coef": Z_COEF,
            "top1_lbl_temperature": 1.0,
            **overrides,
        }
    )
    return SigmaMoeForCausalLM(config)


def make_rows(lengths, *, targets=None, size=10, seed=0):
    """Right-padded rows; `targets`: predicted tokens per row, by default all real ones."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i, length in enumerate(lengths):
        ids = torch.randint(0, 30, (size,), generator=generator)
        mask = (torch.arange(size) < length).long()
        known = length if targets is None else targets[i] + 1
        rows.append(
            {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(torch.arange(size) >= known, -100)}
        )
    return rows


def stacked(rows):
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


UNEQUAL = make_rows([10, 9, 4, 3])  # rank 0 has 19 real tokens, rank 1 has 7
SAME_TARGETS = make_rows(
    [10, 9, 4, 6], targets=[3, 4, 2, 5], seed=1
)  # 7 predicted tokens on each rank, 19 and 10 real ones
IDENTICAL = make_rows([7], seed=2) * 4
STREAM = make_rows([10, 4, 6, 9], seed=3)  # two micro-batches of a row on each of two ranks


def gradients(model):
    return {n: p.grad.detach().clone() for n, p in model.named_parameters()}


def assert_same(actual, expected, rtol=1e-4, atol=1e-6):
    assert actual.keys() == expected.keys() and actual
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=rtol, atol=atol, check_dtype=False, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- references, from the definitions --------------------------------------------------------------------------------


def balance_of(kind, parts, top_k, previous):
    """One layer; `parts`: per rank and row `(logits of real tokens)`. Returns the loss and the counts of all ranks."""

    def conventional(z, before=0.0):
        counts = F.one_hot(z.topk(top_k).indices, EXPERTS).sum((0, 1)) + before
        return EXPERTS * (counts / counts.sum() * z.softmax(-1).mean(0)).sum()

    rows = [z for rank in parts for z in rank]
    everything = torch.cat(rows)
    counts = F.one_hot(everything.topk(top_k).indices, EXPERTS).sum((0, 1)).float()
    if kind == "global_batch":
        return conventional(everything, previous), counts
    if kind == "top1":
        q = everything.softmax(-1)
        return EXPERTS * (q.mean(0) ** 2).sum() / q.gather(-1, everything.topk(top_k).indices).sum(-1).mean(), counts
    if kind == "sequence":
        return torch.stack([conventional(z) for z in rows]).mean(), counts
    ranks = [torch.cat(rank) for rank in parts]
    return sum(len(z) / len(everything) * conventional(z) for z in ranks), counts


def expected_gradients(kind, micro_batches, *, running=False, tokens_averaged_across_ranks=True, **overrides):
    """Gradients and loss of one optimizer step, from `micro_batches[m][rank] -> rows`.

    Each micro-batch weighs its cross-entropy, and with it its auxiliary losses, by its share of the predicted tokens.
    """
    model = make_model(kind, **overrides).eval()
    ranks = len(micro_batches[0])
    targets = [
        [sum(int((row["labels"][1:] != -100).sum()) for row in rows) for rows in micro] for micro in micro_batches
    ]
    of_step = sum(map(sum, targets))
    of_rank = [sum(micro[rank] for micro in targets) for rank in range(ranks)]
    previous = [0.0] * model.config.num_hidden_layers
    loss = reported = 0.0
    for micro, number in zip(micro_batches, targets, strict=True):
        parts = [[[] for _ in range(ranks)] for _ in previous]
        for rank, rows in enumerate(micro):
            out = model(
                **stacked([{k: v for k, v in row.items() if k != "labels"} for row in rows]), output_router_logits=True
            )
            labels = stacked(rows)["labels"][:, 1:]
            cross_entropy = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum")
            share, aux_share = 1 / of_step, sum(number) / of_step
            if not tokens_averaged_across_ranks:  # each rank divides by its own count, DDP then takes the mean
                share, aux_share = 1 / of_rank[rank] / ranks, sum(number) / ranks / of_rank[rank]
            loss = loss + share * cross_entropy
            for layer, z in enumerate(out.router_logits):
                z = z.detach() + aux_share * (z - z.detach())
                per_row = z.view(len(rows), -1, EXPERTS)
                real = [r["attention_mask"].bool() for r in rows]
                parts[layer][rank] = [per_row[i][m] for i, m in enumerate(real)]
        for layer, top_k in enumerate(model.config.top_k_per_layer):
            balance, counts = balance_of(kind, parts[layer], top_k, previous[layer] if running else 0.0)
            previous[layer] = previous[layer] + counts
            z_loss = torch.cat([z for rank in parts[layer] for z in rank]).logsumexp(-1).square().mean()
            aux = COEF * balance + Z_COEF * z_loss
            loss = loss + aux
            reported = reported + aux.detach() * (sum(number) / of_step - 1)
    loss.backward()
    return gradients(model), (loss + reported).item()


# --- jobs ------------------------------------------------------------------------------------------------------------


def mine(rows):
    """This rank's contiguous part; everything without a process group."""
    if not dist.is_initialized():
        return rows
    size = len(rows) // WORLD
    return rows[dist.get_rank() * size : (dist.get_rank() + 1) * size]


def routing():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 10, EXPERTS, generator=generator, dtype=torch.float64)
    mask = torch.stack([row["attention_mask"] for row in UNEQUAL])
    return logits, logits.topk(2).indices, mask


def job_world():
    return {"size": dist.get_world_size(), "rank": dist.get_rank()}


def job_losses():
    results = {}
    for name, loss in {
        "switch": switch_load_balancing_loss,
        "sequence": sequence_load_balancing_loss,
        "global_batch": global_batch_load_balancing_loss,
        "running": lambda z, s, m: global_batch_load_balancing_loss(z, s, m, previous_counts=torch.arange(EXPERTS)),
        "sigmoid": lambda z, s, m: global_batch_load_balancing_loss(z, s, m, score_func="sigmoid"),
        "top1": top1_load_balancing_loss,
        "z": lambda z, s, m: router_z_loss(z, m),
    }.items():
        logits, selected, mask = map(mine, routing())
        if name != "sequence":
            logits, selected, mask = logits.flatten(0, 1), selected.flatten(0, 1), mask.flatten()
        logits.requires_grad_()
        value = loss(logits, selected, mask)
        value.backward()
        results[name] = value.detach(), logits.grad.view(-1, 10, EXPERTS)
    return results


def job_summary():
    logits, selected, mask = map(mine, routing())
    window = RoutingWindow()
    for rows in (slice(0, 1), slice(1, None)):
        z, s = logits[rows].flatten(0, 1).float(), selected[rows].flatten(0, 1)
        window.add([z, 2 * z], [s, s[:, :1]], mask[rows].flatten())
    return window.summary()


def job_empty_rank():
    """A rank on which every token is padding takes part and changes nothing."""
    rows = make_rows([10, 8, 0, 0])
    logits, selected, _ = map(mine, routing())
    mask = torch.stack([row["attention_mask"] for row in mine(rows)])
    z, s, m = logits.flatten(0, 1), selected.flatten(0, 1), mask.flatten()
    return {
        "switch": switch_load_balancing_loss(z, s, m),
        "sequence": sequence_load_balancing_loss(logits, selected, mask),
        "global_batch": global_batch_load_balancing_loss(z, s, m),
        "top1": top1_load_balancing_loss(z, s, m),
        "z": router_z_loss(z, m),
    }


def job_sum_over_ranks():
    tensor = torch.tensor([1.0, 10.0]).requires_grad_()
    total = sum_over_ranks(tensor)
    (total * torch.tensor([2.0, 3.0])).sum().backward()
    return {"total": total.detach(), "gradient": tensor.grad}


def job_plain_ddp():
    results = {}
    for kind in KINDS:
        model = make_model(kind).train()
        wrapped = DistributedDataParallel(model) if dist.is_initialized() else model
        out = wrapped(**stacked(mine(SAME_TARGETS)))
        out.loss.backward()
        results[kind] = {
            "gradients": gradients(model),
            "aux_loss": out.aux_loss.detach(),
            "z_loss": out.z_loss.detach(),
        }
        results[kind]["summary"] = model.routing_window.summary()
    return results


def job_expert_bias():
    model = make_model(expert_bias_update_rate=0.125).train()
    for _ in range(3):
        model(**stacked(mine(UNEQUAL)))
        model.update_expert_bias()
    return [router.e_score_correction_bias.clone() for router in model.routers]


def job_evaluation_on_one_rank():
    """Evaluation with auxiliary losses on rank 0 only must not wait for rank 1."""
    if dist.get_rank() == 0:
        return make_model().eval()(**stacked(UNEQUAL), output_router_logits=True).loss.detach()


def job_fsdp2():
    results = {}
    for kind in KINDS:
        model = make_model(kind).train()
        if dist.is_initialized():
            mesh = dist.device_mesh.init_device_mesh("cpu", (WORLD,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        model(**stacked(mine(SAME_TARGETS))).loss.backward()
        whole = {
            n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for n, p in model.named_parameters()
        }
        local = sum(p.to_local().numel() if hasattr(p, "to_local") else p.numel() for p in model.parameters())
        results[kind] = {"gradients": whole, "local": local, "total": sum(p.numel() for p in model.parameters())}
    return results


class GradientsBeforeTheStep(TrainerCallback):
    def __init__(self):
        self.gradients = None

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model.routing_window.reset()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


def train_one_step(kind, rows, batch_size, accumulation=1, *, managed=False, average=True, **overrides):
    """Gradients before the optimizer step and the logged loss of one step of the real Trainer."""
    model, callback = make_model(kind, **overrides), GradientsBeforeTheStep()
    model.routing_window.managed = managed
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            use_cpu=True,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            average_tokens_across_devices=average,
            max_steps=1,
            learning_rate=0.0,
            optim="sgd",
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = InOrder(model, args, train_dataset=rows, callbacks=[callback])
        trainer.train()
    world = dist.get_world_size() if dist.is_initialized() else 1
    assert trainer.accelerator.num_processes == world and trainer.state.global_step == 1
    return {"gradients": callback.gradients, "loss": trainer.state.log_history[0]["loss"]}


def job_trainer():
    results = {}
    for kind in KINDS:
        results["identical", kind] = train_one_step(kind, IDENTICAL, 2)
        results["unequal", kind] = train_one_step(kind, UNEQUAL, 2)
    for kind in ("switch", "top1"):
        results["accumulated", kind] = train_one_step(kind, STREAM, 1, 2)
    for kind in ("switch", "global_batch"):
        results["own tokens", kind] = train_one_step(kind, UNEQUAL, 2, average=False)
    results["running"] = train_one_step("global_batch", STREAM, 1, 2, managed=True)
    results["own tokens, same number"] = train_one_step("global_batch", SAME_TARGETS, 2, average=False)
    return results


JOBS = {name.removeprefix("job_"): job for name, job in list(globals().items()) if name.startswith("job_")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """`ranks(job)` -> what each rank returned."""
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


def test_there_really_are_two_processes(ranks):
    assert ranks("world") == [{"size": 2, "rank": 0}, {"size": 2, "rank": 1}]


# --- (a) losses and statistics by themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sequence", "global_batch", "running", "sigmoid", "top1", "z"])
def test_losses_of_two_ranks_equal_one_process_on_all_rows(ranks, name):
    value, gradient = job_losses()[name]
    both = [result[name] for result in ranks("losses")]
    for on_rank, _ in both:
        torch.testing.assert_close(on_rank, value, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in both]), gradient, rtol=1e-9, atol=1e-12)


def test_switch_loss_of_two_ranks_is_the_token_weighted_mean_of_their_own_losses(ranks):
    logits, selected, mask = routing()
    logits.requires_grad_()
    parts = []
    for rows in (slice(0, 2), slice(2, 4)):
        real = mask[rows].flatten().bool()
        parts.append(
            (
                real.sum(),
                switch_load_balancing_loss(logits[rows].flatten(0, 1)[real], selected[rows].flatten(0, 1)[real]),
            )
        )
    expected = sum(n * loss for n, loss in parts) / sum(n for n, _ in parts)
    expected.backward()
    both = [result["switch"] for result in ranks("losses")]
    for on_rank, _ in both:
        torch.testing.assert_close(on_rank, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in both]), logits.grad, rtol=1e-9, atol=1e-12)


def test_routing_window_of_two_ranks_equals_one_process(ranks):
    expected = job_summary()
    for summary in ranks("summary"):
        assert_same(summary, expected, rtol=1e-6, atol=1e-7)
    assert expected["tokens"].tolist() == [26.0, 26.0]


def test_a_rank_of_padding_changes_nothing(ranks):
    expected = job_empty_rank()
    for result in ranks("empty_rank"):
        assert_same(result, expected, rtol=1e-12, atol=1e-12)


def test_sum_over_ranks_has_the_global_value_and_the_local_gradient(ranks):
    for result in ranks("sum_over_ranks"):
        assert result["total"].tolist() == [2.0, 20.0] and result["gradient"].tolist() == [2.0, 3.0]


def test_expert_bias_is_that_of_one_process_and_the_same_on_all_ranks(ranks):
    expected = job_expert_bias()
    assert expected[0].abs().max() > 0
    for biases in ranks("expert_bias"):
        assert all(torch.equal(a, b) for a, b in zip(biases, expected, strict=True))


def test_evaluation_is_not_collective(ranks):
    """It took part in no collective: otherwise rank 0 had waited for rank 1, or had read numbers of the next job."""
    expected = make_model().eval()(**stacked(UNEQUAL), output_router_logits=True).loss
    torch.testing.assert_close(ranks("evaluation_on_one_rank")[0], expected.detach())


# --- (d), (f) DDP and FSDP2 without a Trainer ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_plain_ddp_averages_to_the_gradients_of_one_process(ranks, kind):
    expected, _ = expected_gradients(kind, [[SAME_TARGETS[:2], SAME_TARGETS[2:]]])
    one = job_plain_ddp()[kind]
    for result in ranks("plain_ddp"):
        assert_same(result[kind]["gradients"], expected)
        assert_same(result[kind]["summary"], one["summary"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(result[kind]["z_loss"], one["z_loss"])
        if kind != "switch":
            assert_same(result[kind]["gradients"], one["gradients"])
            torch.testing.assert_close(result[kind]["aux_loss"], one["aux_loss"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.compatibility("FSDP2", method="sigma_moe", library="torch", gloo=True)
def test_fsdp2_gives_the_gradients_of_one_process(ranks, kind):
    expected, _ = expected_gradients(kind, [[SAME_TARGETS[:2], SAME_TARGETS[2:]]])
    for result in ranks("fsdp2"):
        assert result[kind]["local"] < 0.6 * result[kind]["total"]
        assert_same(result[kind]["gradients"], expected)


# --- (b) through the Trainer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_router_gradient_does_not_depend_on_accumulation_or_world_size(ranks, kind):
    expected, loss = expected_gradients(kind, [[IDENTICAL]])
    runs = [
        train_one_step(kind, IDENTICAL, 4, 1),
        train_one_step(kind, IDENTICAL, 1, 4),
        train_one_step(kind, IDENTICAL, 2, 2),
    ]
    runs += [result["identical", kind] for result in ranks("trainer")]
    for run in runs:
        assert_same(run["gradients"], expected)
        assert run["loss"] == pytest.approx(loss, rel=1e-4)
    routers = [name for name in expected if "gate.weight" in name]
    assert len(routers) == 2 and all(expected[name].abs().max() > 1e-2 for name in routers)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_unequal_padding_equal_the_definition(ranks, kind):
    expected, loss = expected_gradients(kind, [[UNEQUAL[:2], UNEQUAL[2:]]])
    for result in ranks("trainer"):
        assert_same(result["unequal", kind]["gradients"], expected)
        assert result["unequal", kind]["loss"] == pytest.approx(loss, rel=1e-4)
    if kind != "switch":  # the others are defined on the batch of all ranks
        assert_same(train_one_step(kind, UNEQUAL, 4)["gradients"], expected)


@pytest.mark.parametrize("kind", ["switch", "top1"])
def test_different_micro_batches_weigh_by_their_predicted_tokens(ranks, kind):
    expected, loss = expected_gradients(kind, [[[STREAM[0]], [STREAM[1]]], [[STREAM[2]], [STREAM[3]]]])
    for result in ranks("trainer"):
        assert_same(result["accumulated", kind]["gradients"], expected)
        assert result["accumulated", kind]["loss"] == pytest.approx(loss, rel=1e-4)
    if kind != "switch":
        assert_same(train_one_step(kind, STREAM, 2, 2)["gradients"], expected)


# --- (c) running counts ----------------------------------------------------------------------------------------------


def test_running_counts_over_an_accumulation_window_follow_their_definition(ranks):
    micro_batches = [[[STREAM[0]], [STREAM[1]]], [[STREAM[2]], [STREAM[3]]]]
    expected, loss = expected_gradients("global_batch", micro_batches, running=True)
    for run in [train_one_step("global_batch", STREAM, 2, 2, managed=True), *(r["running"] for r in ranks("trainer"))]:
        assert_same(run["gradients"], expected)
        assert run["loss"] == pytest.approx(loss, rel=1e-4)
    for other in (
        expected_gradients("global_batch", micro_batches)[0],  # each micro-batch by itself
        expected_gradients("global_batch", [[STREAM[:2], STREAM[2:]]])[0],  # one big batch
    ):
        name = "model.layers.0.mlp.gate.weight"
        assert not torch.allclose(other[name], expected[name], rtol=1e-3, atol=1e-5)


# --- (e) average_tokens_across_devices=False -------------------------------------------------------------------------


def test_without_averaging_tokens_equal_numbers_of_targets_are_exact(ranks):
    expected, _ = expected_gradients("global_batch", [[SAME_TARGETS[:2], SAME_TARGETS[2:]]])
    for result in ranks("trainer"):
        assert_same(result["own tokens, same number"]["gradients"], expected)


@pytest.mark.parametrize("kind", ["switch", "global_batch"])
def test_without_averaging_tokens_each_rank_weighs_by_its_own_targets(ranks, kind):
    """The Trainer's approximation: a rank's cross-entropy is its own mean, and so its part of the auxiliary gradient
    is multiplied by (mean targets of all ranks) / (its own targets)."""
    micro_batches = [[UNEQUAL[:2], UNEQUAL[2:]]]
    expected, _ = expected_gradients(kind, micro_batches, tokens_averaged_across_ranks=False)
    exact, _ = expected_gradients(kind, micro_batches)
    name = "model.layers.0.mlp.gate.weight"
    assert not torch.allclose(exact[name], expected[name], rtol=1e-2, atol=1e-4)
    for result in ranks("trainer"):
        assert_same(result["own tokens", kind]["gradients"], expected)
