# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""M-MoE: Sigma-MoE with other defaults, its balance loss at any k, and the same model at every k."""

import subprocess
import sys

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_models.moe import (
    MMoeConfig,
    MMoeForCausalLM,
    MMoeForSequenceClassification,
    MMoeForTokenClassification,
    MMoeModel,
)
from hf_models.moe.elastic import experts_in_force
from tests.bare_environment import bare_python
from tests.hf_models.moe.elastic_models import EXPERTS, LAYERS, batch, build, logits_of


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


# --- configuration ---------------------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_method():
    config = MMoeConfig()
    assert config.model_type == "m_moe"
    assert (config.k_sampling, config.k_distribution, config.k_range) == ("layer", "uniform", (1, 6))
    assert (config.scoring_func, config.norm_topk_prob, config.num_experts_per_tok) == ("softmax", True, 4)
    assert MMoeConfig(num_experts=4).k_range == (1, 4)


def test_presets_have_the_shape_that_is_known():
    config = MMoeConfig.from_preset("m-moe-20b")
    assert (config.num_hidden_layers, config.num_experts, config.k_range) == (56, 96, (1, 6))
    with torch.device("meta"):
        model = MMoeForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(20e9, rel=0.05)
    assert MMoeConfig.from_preset("demo", k_max=8).k_range == (1, 8)
    with pytest.raises(
        ValueError, match=r"preset 'sigma-moe-tiny' is not known. Choose one of \['demo', 'm-moe-20b'\]"
    ):
        MMoeConfig.from_preset("sigma-moe-tiny")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"k_min": 5, "k_max": 4}, "k_min=5 and k_max=4 do not give a range"),
        ({"k_max": 97}, "k_max=97 do not give a range within 1..num_experts=96"),
        ({"k_sampling": "token"}, "k_sampling='token' is not known"),
        ({"k_distribution": "normal"}, "k_distribution='normal' is not known"),
        ({"k_tau": 0.0}, "k_tau=0.0 must be positive"),
        ({"k_budget": 0.0}, "k_budget=0.0 must be positive"),
        ({"aux_k": "mean"}, "aux_k='mean' is not known"),
    ],
)
def test_impossible_configurations_are_refused(fields, message):
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        MMoeConfig(**fields)


def test_every_field_survives_the_round_trip(tmp_path):
    given = {
        "num_experts_per_tok_per_layer": [3, 2, 1],
        "num_hidden_layers": 3,
        "k_sampling": "micro_batch",
        "k_min": 2,
        "k_max": 5,
        "k_distribution": "capacity",
        "k_tau": 1.5,
        "k_budget": 1.1,
        "k_seed": 4,
        "aux_k": "max",
    }
    MMoeConfig(**given).save_pretrained(tmp_path)
    again = MMoeConfig.from_pretrained(tmp_path)
    assert {name: getattr(again, name) for name in given} == given


# --- the model -------------------------------------------------------------------------------------------------------


def test_with_the_same_settings_it_is_sigma_moe_bit_for_bit():
    settings = {"scoring_func": "softmax", "k_sampling": "none"}
    sigma, matryoshka = build("sigma_moe", **settings), build("m_moe", **settings)
    assert sigma.state_dict().keys() == matryoshka.state_dict().keys()
    assert torch.equal(logits_of(sigma), logits_of(matryoshka))
    inputs = batch(padding=True)
    assert torch.equal(sigma.train()(**inputs).loss, matryoshka.train()(**inputs).loss)


@pytest.mark.parametrize(
    "cls", [MMoeModel, MMoeForCausalLM, MMoeForSequenceClassification, MMoeForTokenClassification]
)
def test_every_class_saves_loads_and_uses_grouped_experts(cls, tmp_path):
    model = cls(build("m_moe").config).eval()
    assert model.config._experts_implementation == "grouped_mm"
    assert isinstance(model.base_model, MMoeModel)
    model.set_active_experts([1, 4, 2])
    model.save_pretrained(tmp_path)
    again = cls.from_pretrained(tmp_path).eval()
    assert experts_in_force(again) == [1, 4, 2]
    ids = batch()["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(again(ids)[0], model(ids)[0])


def test_files_with_one_tensor_per_expert_load(tmp_path):
    model = build("m_moe")
    model.save_pretrained(tmp_path, save_original_format=True)
    torch.testing.assert_close(logits_of(MMoeForCausalLM.from_pretrained(tmp_path).eval()), logits_of(model))


def test_weights_are_the_renormalised_probabilities_of_the_kept_experts():
    """The equation of the paper, for each k, one token and one expert at a time."""
    model = build("m_moe")
    block = model.model.layers[0].mlp
    x = torch.randn(5, 32)
    for k in range(1, 7):
        model.set_active_experts(k)
        p = (x @ block.gate.weight.T).softmax(-1)
        expected = torch.zeros_like(x)
        for t in range(len(x)):
            kept = p[t].argsort(descending=True)[:k]
            for e in kept:
                gate, up = (block.experts.gate_up_proj[e] @ x[t]).chunk(2)
                expected[t] += p[t, e] / p[t, kept].sum() * (block.experts.down_proj[e] @ (F.silu(gate) * up))
        torch.testing.assert_close(block(x[None])[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["switch", "sequence", "global_batch"])
@pytest.mark.parametrize("k", range(1, EXPERTS + 1))
def test_the_balance_loss_is_one_at_balance_for_every_k(kind, k):
    model = build("m_moe", router_aux_loss_type=kind).train()
    with torch.no_grad():
        for router in model.routers:
            router.weight.zero_()
    model.set_active_experts(k)
    torch.testing.assert_close(model(**batch()).load_balancing_losses, torch.ones(LAYERS))


@pytest.mark.parametrize("aux_k", ["sampled", "max"])
def test_each_layer_is_balanced_at_its_own_k_or_at_the_largest(aux_k):
    inputs, ks, k_max = batch(padding=True), [1, 4, 2], 5
    model = build("m_moe", aux_k=aux_k, k_max=k_max).train()
    model.set_active_experts(ks)
    out = model(**inputs, output_router_logits=True)
    real = inputs["attention_mask"].flatten().bool()
    for layer, (z, k) in enumerate(zip(out.router_logits, ks)):
        top = k if aux_k == "sampled" else k_max
        f = F.one_hot(z[real].topk(top).indices, EXPERTS).sum((0, 1)) / (real.sum() * top)
        expected = EXPERTS * (f * z[real].softmax(-1).mean(0)).sum()
        torch.testing.assert_close(out.load_balancing_losses[layer], expected.detach())
    counts = model.routing_window.summary()["counts"].sum(-1)
    assert counts.tolist() == [float(real.sum() * k) for k in ks]  # what was routed, whatever is balanced


def test_evaluation_reports_the_balance_of_what_is_routed():
    model, inputs = build("m_moe", aux_k="max", k_max=6), batch()
    other = build("m_moe")
    assert torch.equal(
        model(**inputs, output_router_logits=True).aux_loss, other(**inputs, output_router_logits=True).aux_loss
    )


def test_a_schedule_over_layers_in_one_model_trains_saves_loads_and_generates(tmp_path):
    model = build("m_moe", num_experts_per_tok_per_layer=[4, 2, 1])
    assert experts_in_force(model) == [4, 2, 1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = model.train()(**batch()).loss
        losses.append(loss.item())
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    model.eval().save_pretrained(tmp_path)
    again = MMoeForCausalLM.from_pretrained(tmp_path).eval()
    ids = batch(length=4)["input_ids"]
    options = {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), model.generate(ids, **options))
    assert torch.equal(
        again.generate(ids, num_active_experts=1, **options), model.generate(ids, num_active_experts=1, **options)
    )
    assert experts_in_force(again) == [4, 2, 1]


def test_compiled_inference_follows_a_change_of_k():
    model = build("m_moe")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = batch()["input_ids"]
    with torch.no_grad():
        for k in (1, 3, [4, 1, 2]):
            model.set_active_experts(k)
            torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


# --- through the Auto classes, with and without the package ----------------------------------------------------------


@pytest.mark.parametrize(
    ("auto_class", "cls"),
    [
        (AutoModel, MMoeModel),
        (AutoModelForCausalLM, MMoeForCausalLM),
        (AutoModelForSequenceClassification, MMoeForSequenceClassification),
        (AutoModelForTokenClassification, MMoeForTokenClassification),
    ],
)
@pytest.mark.compatibility("Auto classes", method="m_moe")
def test_the_auto_classes_know_it(auto_class, cls, tmp_path):
    assert isinstance(AutoConfig.for_model("m_moe"), MMoeConfig)
    cls(build("m_moe").config).save_pretrained(tmp_path)
    assert type(auto_class.from_pretrained(tmp_path)) is cls


WITHOUT_THE_PACKAGE = """
import importlib.util, sys
import torch
from transformers import AutoModelForCausalLM
assert importlib.util.find_spec("hf_models") is None
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.arange(2, 9)[None]
with torch.no_grad(), model.active_experts([1, 4, 2]):
    torch.save(model(ids).logits, sys.argv[2])
model.set_active_experts({"schedule": "front", "mean": 3})
model.generate(ids, num_active_experts=1, max_new_tokens=2, do_sample=False)
model.train()(input_ids=ids, labels=ids).loss.backward()
print([router.top_k for router in model.routers])
"""


@pytest.mark.slow
def test_a_saved_folder_is_elastic_where_the_package_is_not_installed(tmp_path):
    model, ids = build("m_moe"), torch.arange(2, 9)[None]
    model.save_pretrained(tmp_path / "model")
    python = bare_python(tmp_path / "bare", sys.executable)
    command = [python, "-c", WITHOUT_THE_PACKAGE, tmp_path / "model", tmp_path / "logits.pt"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().splitlines()[-1] == "[5, 3, 1]"
    with model.active_experts([1, 4, 2]):
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt", weights_only=True), logits_of(model, ids))
