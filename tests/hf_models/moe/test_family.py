# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""Neuron sparsity, a number of active experts for each layer and draws of it, together in one model."""

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_models.moe import (
    MMoeConfig,
    MMoeForCausalLM,
    MoneConfig,
    MoneForCausalLM,
    SigmaMoeConfig,
    SigmaMoeForCausalLM,
)
from hf_models.moe.elastic import experts_in_force
from hf_models.moe.neurons import MIN_TOKENS, neuron_networks
from tests.gloo_ranks import results_of_ranks
from tests.hf_models.moe.test_distributed import WORLD, assert_same, make_model, make_rows, stacked, train_one_step
from trainers.callbacks import (
    ExpertBalanceCallback,
    MatryoshkaExpertsCallback,
    ProgressiveSparsificationCallback,
    install_callbacks,
)


KINDS = {
    "sigma_moe": (SigmaMoeConfig, SigmaMoeForCausalLM),
    "mone": (MoneConfig, MoneForCausalLM),
    "m_moe": (MMoeConfig, MMoeForCausalLM),
}
LAYERS, EXPERTS, WIDTH, HIDDEN = 3, 6, 16, 32
FIELDS = {
    "vocab_size": 40,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": WIDTH,
    "num_experts": EXPERTS,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "scoring_func": "softmax",
    "norm_top1_prob": False,
    # All three methods at once.
    "num_experts_per_tok_per_layer": [4, 2, 1],
    "neuron_ratio": [0.5, 0.25, 0.75],
    "neuron_aux_loss_coef": 0.1,
    "router_aux_loss_coef": 0.05,
    "router_z_loss_coef": 0.01,
    "k_sampling": "layer",
    "k_min": 1,
    "k_max": 4,
    "k_budget": None,
}
KEPT = [8, 4, 12]  # neurons by `neuron_ratio`
IDS = torch.randint(2, 40, (8, 20), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(20) < torch.tensor([20, 20, 17, 20, 9, 20, 13, 20])[:, None]).long()
ROWS = [
    {"input_ids": ids * mask, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    for ids, mask in zip(IDS, MASK)
]


def build(kind="mone", **overrides):
    torch.manual_seed(0)
    config, model = KINDS[kind]
    return model(config(**FIELDS | overrides)).eval()


def schedule():
    return ProgressiveSparsificationCallback([(0, [4, 4, 2]), (0.5, [4, 2, 1])], unit="fraction")


@torch.no_grad()
def logits_of(model):
    return model(input_ids=IDS[:2], attention_mask=MASK[:2]).logits


def train(model, folder, *callbacks, steps=10, **options):
    """On the same eight rows in every step, in two micro-batches."""
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model, args, train_dataset=ROWS)
    install_callbacks(trainer, *callbacks, ExpertBalanceCallback())
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


# --- one model -------------------------------------------------------------------------------------------------------


def test_with_the_same_fields_the_three_families_are_one_model():
    models = [build(kind) for kind in KINDS]
    inputs = stacked(ROWS)
    for model in models[1:]:
        assert model.state_dict().keys() == models[0].state_dict().keys()
        assert torch.equal(logits_of(model), logits_of(models[0]))
    losses = [model.train()(**inputs) for model in models]
    for field in ("loss", "aux_loss", "z_loss", "neuron_aux_loss", "load_balancing_losses"):
        values = [out[field] for out in losses]
        assert all(torch.equal(value, values[0]) and value.isfinite().all() for value in values), field


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["schedule", "draws"])
def test_it_trains_saves_loads_and_generates(kind, how, tmp_path):
    model = build(kind, k_sampling="layer" if how == "draws" else "none")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callback = MatryoshkaExpertsCallback() if how == "draws" else schedule()
    logged = train(model, tmp_path / "run", callback, gradient_checkpointing=True)
    assert all(late["loss"] < 0.8 * early["loss"] for early, late in zip(logged[:3], logged[-3:], strict=True))
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    if how == "draws":
        assert len({entry["moe/mean_k"] for entry in logged}) > 3
    else:
        assert [entry["moe/stage"] for entry in logged] == [0] * 5 + [1] * 5
        assert logged[0]["moe/active_parameters"] > logged[-1]["moe/active_parameters"]
    assert experts_in_force(model) == [4, 2, 1] == model.config.num_experts_per_tok_per_layer
    assert [network.neuron_top_k for network in neuron_networks(model)] == KEPT

    model.eval().save_pretrained(tmp_path / "model")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and type(again) is type(model)
    for field in FIELDS:
        assert getattr(again.config, field) == getattr(model.config, field), field
    assert torch.equal(logits_of(again), logits_of(model))
    options = {"attention_mask": MASK[2:5].flip(-1), "max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    prompts = ROWS[2]["input_ids"][None].repeat(3, 1) * options["attention_mask"]  # padded on the left
    with_cache = again.generate(prompts, **options)
    assert with_cache.shape == (3, 28)
    assert torch.equal(with_cache, again.generate(prompts, use_cache=False, **options))
    assert torch.equal(with_cache, model.generate(prompts, **options))


def test_one_model_goes_through_the_schedule_and_then_the_draws(tmp_path):
    model = build(k_sampling="none")
    first = train(model, tmp_path / "schedule", schedule())
    model.config.k_sampling = "layer"
    second = train(model, tmp_path / "draws", MatryoshkaExpertsCallback())
    assert first[-1]["moe/stage"] == 1 and len({entry["moe/mean_k"] for entry in second}) > 3
    assert second[-1]["loss"] < first[0]["loss"]
    assert [network.neuron_top_k for network in neuron_networks(model)] == KEPT
    model.eval().save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.num_experts_per_tok_per_layer == [4, 2, 1] and again.config.k_sampling == "layer"
    assert torch.equal(logits_of(again), logits_of(model))
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "num_active_experts": 2}
    assert torch.equal(again.generate(IDS[:2], **options), model.generate(IDS[:2], use_cache=False, **options))


@pytest.mark.parametrize("how", ["schedule", "draws"])
def test_checkpointing_changes_no_step(how, tmp_path):
    runs = []
    for checkpointing in (False, True):
        model = build(k_sampling="layer" if how == "draws" else "none")
        callback = MatryoshkaExpertsCallback() if how == "draws" else schedule()
        logged = train(model, tmp_path, callback, steps=4, gradient_checkpointing=checkpointing)
        names = ["loss", "grad_norm", "moe/max_violation", "moe/mean_k" if how == "draws" else "moe/mean_top_k"]
        runs.append(torch.tensor([[entry[name] for name in names] for entry in logged]))
    torch.testing.assert_close(*runs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["schedule", "draws"])
def test_the_schedule_and_the_draws_refuse_each_other(first, tmp_path):
    model = build()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    callbacks = [schedule(), MatryoshkaExpertsCallback()]
    with pytest.raises(ValueError, match="k_sampling='layer' draws the experts per token anew"):
        train(model, tmp_path, *callbacks if first == "schedule" else reversed(callbacks))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# --- both dials ------------------------------------------------------------------------------------------------------


def reference(block, x, k, neurons):
    """A layer by the equations, one token and one expert at a time."""
    p = (x @ block.gate.weight.T).softmax(-1)
    out = torch.zeros_like(x)
    for t in range(len(x)):
        chosen = p[t].argsort(descending=True)[:k]
        for e in chosen:
            gate, up = (block.experts.gate_up_proj[e] @ x[t]).chunk(2)
            a = F.silu(gate)
            kept = a.abs().argsort(descending=True)[:neurons]
            weight = p[t, e] / p[t, chosen].sum() if k > 1 else p[t, e]
            out[t] += weight * (block.experts.down_proj[e][:, kept] @ (a[kept] * up[kept]))
    return out


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm", "sigma_neurons"])
def test_a_layer_computes_its_experts_and_their_neurons(backend):
    model, x = build(), torch.randn(7, HIDDEN)
    model.set_experts_implementation(backend)
    for ks, ratio in (([4, 2, 1], [0.5, 0.25, 0.75]), ([1, 6, 3], [1.0, 0.5, 0.125])):
        model.set_active_experts(ks)
        model.set_active_neurons(ratio=ratio)
        for layer, k, share in zip(model.model.layers, ks, ratio):
            expected = reference(layer.mlp, x, k, round(share * WIDTH))
            torch.testing.assert_close(layer.mlp(x[None])[0], expected, rtol=1e-4, atol=1e-5)


def active(ks, neurons):
    """Parameters that a token uses in the experts."""
    return sum(k * HIDDEN * (WIDTH + 2 * number) for k, number in zip(ks, neurons))


def test_both_dials_turn_together_and_come_back(tmp_path):
    model = build()
    outside, rest = logits_of(model), model.num_active_parameters() - active([4, 2, 1], KEPT)
    with model.active_experts([1, 3, 2]), model.active_neurons(top_k=[4, 16, 2]):
        assert experts_in_force(model) == [1, 3, 2]
        assert [network.neuron_top_k for network in neuron_networks(model)] == [4, None, 2]
        assert model.num_active_parameters() == rest + active([1, 3, 2], [4, WIDTH, 2])
        inside = logits_of(model)
        with model.active_neurons(), model.active_experts(EXPERTS):
            whole = model.num_active_parameters()
        assert whole == rest + active([EXPERTS] * LAYERS, [WIDTH] * LAYERS)
        assert torch.equal(logits_of(model), inside)
        model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(model), outside) and not torch.allclose(inside, outside)
    assert (model.config.neuron_ratio, model.config.neuron_top_k) == (FIELDS["neuron_ratio"], None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), inside)
    again.set_active_experts([4, 2, 1])
    again.set_active_neurons(ratio=FIELDS["neuron_ratio"])
    assert torch.equal(logits_of(again), outside)


def test_generation_at_fewer_experts_and_neurons_is_that_of_a_model_set_so():
    model, options = build(), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    with model.active_neurons(ratio=0.25):
        got = model.generate(IDS[:2, :6], num_active_experts=2, **options)
    fixed = build(num_experts_per_tok_per_layer=None, num_experts_per_tok=2, neuron_ratio=0.25)
    assert torch.equal(got, fixed.generate(IDS[:2, :6], use_cache=False, **options))
    assert not torch.equal(got, model.generate(IDS[:2, :6], **options))


# --- the balance of neurons over ranks -------------------------------------------------------------------------------


COEF = 0.5  # large: an error in it must not hide behind the language model's loss
# Their width 8; every expert sees enough tokens of the four rows to be balanced.
NEURONS = {"neuron_top_k": 3, "neuron_aux_loss_coef": COEF, "num_experts": 3, "max_position_embeddings": 64}
NEURONS |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
UNEQUAL = make_rows([40, 37, 12, 5], size=40)  # rank 0 has 77 real tokens, rank 1 has 17
# With all experts active each sees all tokens of a micro-batch: none is left out for having few.
ALL_EXPERTS = NEURONS | {"num_experts_per_tok_per_layer": [3, 3]}
IDENTICAL = make_rows([15], size=20, seed=2) * 4


def neuron_loss_of(experts, x, indices, mode):
    """L of one layer from its definition, and the tokens of each expert; `x (tokens, hidden)` of real tokens only."""
    losses, tokens = [], []
    for e in range(experts.num_experts):
        mine = x[(indices == e).any(-1)]
        a = F.silu(mine @ experts.gate_up_proj[e].chunk(2)[0].T).abs()
        keep = torch.zeros_like(a).scatter(-1, a.topk(experts.neuron_top_k).indices, 1.0)
        q = a / a.sum(-1, keepdim=True) if mode == "normalized" else a * keep
        f = a.shape[-1] / (experts.neuron_top_k * len(mine)) * keep.sum(0)
        losses.append((f * q.mean(0)).sum())
        tokens.append(len(mine))
    assert min(tokens) >= MIN_TOKENS
    return sum(n * loss for n, loss in zip(tokens, losses)) / sum(tokens)


def expected_step(rows, mode, **fields):
    """Gradients and loss of one step on all rows, in one process and without our own loss."""
    model, seen, batch = make_model(**fields).eval(), [], stacked(rows)
    for layer in model.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda experts, args: seen.append((experts, *args)))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    real = batch["attention_mask"].flatten().bool()
    parts = [neuron_loss_of(experts, x[real], indices[real], mode) for experts, x, indices, _ in seen]
    loss = loss + COEF * torch.stack(parts).mean()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


def jobs():
    """What every rank does."""
    results = {}
    for mode in ("normalized", "literal"):
        fields = {"neuron_aux_mode": mode}
        results["unequal", mode] = train_one_step("none", UNEQUAL, 2, **NEURONS, **fields)
        results["identical", mode] = train_one_step("none", IDENTICAL, 1, 2, **ALL_EXPERTS, **fields)
    model = make_model("none", **NEURONS).train()
    rows = stacked(UNEQUAL[dist.get_rank() * 2 :][:2])
    results["reported"] = model(**rows).neuron_aux_loss.detach()
    # Evaluation is not collective: rank 1 is not asked.
    if dist.get_rank() == 0:
        model.eval()(**rows)
    return results


JOBS = {"all": jobs}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two gloo processes returned."""
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)("all")


@pytest.mark.parametrize("mode", ["normalized", "literal"])
def test_the_neuron_loss_of_two_ranks_is_that_of_all_their_tokens(ranks, mode):
    expected, loss = expected_step(UNEQUAL, mode, **NEURONS, neuron_aux_mode=mode)
    runs = [result["unequal", mode] for result in ranks]
    runs.append(train_one_step("none", UNEQUAL, 4, **NEURONS, neuron_aux_mode=mode))
    for run in runs:
        assert_same(run["gradients"], expected)
        assert run["loss"] == pytest.approx(loss, rel=1e-4)
    without = train_one_step("none", UNEQUAL, 4, **NEURONS | {"neuron_aux_loss_coef": 0.0})["gradients"]
    gates = [name for name in expected if name.endswith("gate_up_proj")]
    assert gates and all((without[name] - expected[name]).abs().max() > 1e-3 for name in gates)


@pytest.mark.parametrize("mode", ["normalized", "literal"])
def test_the_neuron_loss_does_not_depend_on_accumulation_or_world_size(ranks, mode):
    fields = ALL_EXPERTS | {"neuron_aux_mode": mode}
    expected, loss = expected_step(IDENTICAL, mode, **fields)
    runs = [train_one_step("none", IDENTICAL, *shape, **fields) for shape in ((4, 1), (1, 4))]
    for run in [*runs, *(result["identical", mode] for result in ranks)]:
        assert_same(run["gradients"], expected)
        assert run["loss"] == pytest.approx(loss, rel=1e-4)


def test_every_rank_reports_the_loss_of_all(ranks):
    expected = make_model("none", **NEURONS).train()(**stacked(UNEQUAL)).neuron_aux_loss.detach()
    for result in ranks:
        torch.testing.assert_close(result["reported"], expected)


def test_neurons_are_not_counted_under_expert_parallelism():
    model = build()
    for layer in model.model.layers:
        layer.mlp.experts._is_expert_parallel = True
    with pytest.raises(ValueError, match="under expert parallelism"):
        model.train()(**stacked(ROWS))
    logits_of(model.eval())
