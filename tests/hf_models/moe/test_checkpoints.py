# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""What a user of `from_pretrained` and `save_pretrained` meets: damaged files, and everything that has to survive."""

import dataclasses
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from hf_models.moe import (
    SigmaMoeConfig,
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
)


TOKENS = torch.tensor([[1, 7, 30, 2, 2, 19, 11, 5], [4, 4, 9, 0, 28, 3, 17, 6]])


def config(**overrides) -> SigmaMoeConfig:
    fields = {
        "vocab_size": 31,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "moe_intermediate_size": 16,  # grouped_mm wants rows of a multiple of 16 bytes, in half precision too
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    return SigmaMoeConfig(**{**fields, **overrides})


@pytest.fixture
def saved(tmp_path):
    """A model and the folder that holds it; the bias is in use."""
    model = SigmaMoeForCausalLM(config()).eval()
    for router in model.routers:
        torch.nn.init.normal_(router.e_score_correction_bias)
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


@pytest.fixture
def saved_per_expert(saved):
    """The same with one tensor per expert matrix, as Sigma-V2 and Qwen3-MoE write it."""
    model, folder = saved
    model.save_pretrained(folder, save_original_format=True)
    return model, folder


def test_both_layouts_load_alike(saved, tmp_path):
    model, fused = saved
    model.save_pretrained(tmp_path / "split", save_original_format=True)
    names = [set(load_file(folder / "model.safetensors")) for folder in (fused, tmp_path / "split")]
    assert names[0] == set(model.state_dict()) and any(".experts.0.gate_proj" in name for name in names[1])
    for folder in (fused, tmp_path / "split"):
        assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(folder)), logits_of(model))


@torch.no_grad()
def logits_of(model):
    return model.eval()(TOKENS).logits


def rewrite(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture
def load_report():
    """Lines of the table that transformers logs when a checkpoint and its model disagree."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.extend(record.getMessage().splitlines())
    logging.getLogger("transformers").addHandler(handler)
    yield lambda: lines
    logging.getLogger("transformers").removeHandler(handler)


# --- damaged checkpoints: in each case transformers' or safetensors' own words, which name the remedy or the culprit


def test_truncated_weights_raise(saved):
    path = saved[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(SafetensorError, match="incomplete metadata"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_missing_shard_raises_with_its_name(tmp_path, saved):
    saved[0].save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    shard = sorted((tmp_path / "sharded").glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        AutoModelForCausalLM.from_pretrained(tmp_path / "sharded")


def test_missing_weights_raise_with_the_name_that_was_sought(saved):
    (saved[1] / "model.safetensors").unlink()
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_missing_config_raises_with_its_name(saved):
    (saved[1] / "config.json").unlink()
    with pytest.raises((OSError, ValueError), match="config.json"):
        AutoModelForCausalLM.from_pretrained(saved[1])


def test_a_config_that_is_no_json_raises_with_its_path(saved):
    (saved[1] / "config.json").write_text('{"model_type": "sigma_')
    with pytest.raises(OSError, match="config.json.*not a valid JSON"):
        AutoConfig.from_pretrained(saved[1])


def test_a_config_with_a_wrong_type_raises_with_the_field(saved):
    path = saved[1] / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_experts": "five"}))
    with pytest.raises(Exception, match="num_experts"):
        AutoConfig.from_pretrained(saved[1])


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.gate.weight", "model.layers.1.mlp.gate.e_score_correction_bias", "lm_head.weight"]
)
def test_a_tensor_of_another_shape_raises(saved, load_report, name):
    shape = load_file(saved[1] / "model.safetensors")[name].shape
    found = torch.Size((shape[0] - 1, *shape[1:]))
    rewrite(saved[1], lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(RuntimeError, match="look at the above report"):
        AutoModelForCausalLM.from_pretrained(saved[1])
    line = next(line for line in load_report() if line.startswith(name))
    assert "MISMATCH" in line and f"{found}" in line and f"{shape}" in line


def test_an_expert_matrix_of_another_shape_raises(saved_per_expert, load_report):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    rewrite(saved_per_expert[1], lambda tensors: tensors.update({name: tensors[name][:, :-1].clone()}))
    with pytest.raises(RuntimeError, match="look at the `CONVERSION` entries of the above report"):
        AutoModelForCausalLM.from_pretrained(saved_per_expert[1])
    # The fused tensor, both shapes and the expert's number, but not the name in the file.
    report = "\n".join(load_report())
    assert "model.layers.1.mlp.experts.down_proj" in report
    assert "got [16, 16] at entry 0 and [16, 15] at entry 3" in report


@pytest.mark.parametrize("projections", [["up"], ["down"], ["gate", "up"], ["gate", "up", "down"]])
@pytest.mark.parametrize("expert", [0, 2, 4])
def test_an_incomplete_expert_raises(saved_per_expert, load_report, expert, projections):
    for proj in projections:
        name = f"model.layers.1.mlp.experts.{expert}.{proj}_proj.weight"
        rewrite(saved_per_expert[1], lambda tensors, name=name: tensors.pop(name))
    with pytest.raises(RuntimeError, match="above report"):
        AutoModelForCausalLM.from_pretrained(saved_per_expert[1])
    assert any(line.startswith("model.layers.1.mlp.experts.") for line in load_report())


@pytest.mark.parametrize("name", ["model.layers.1.mlp.gate.weight", "model.layers.2.self_attn.q_norm.weight"])
def test_a_missing_tensor_is_reported_and_initialised(saved, load_report, name):
    rewrite(saved[1], lambda tensors: tensors.pop(name))
    model, report = AutoModelForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert report["missing_keys"] == {name}
    assert any(line.startswith(name) and "MISSING" in line for line in load_report())
    assert model.get_parameter(name).isfinite().all()


def test_missing_expert_biases_are_zeros_without_a_report(saved):
    def drop_biases(tensors):
        for name in [name for name in tensors if name.endswith("e_score_correction_bias")]:
            del tensors[name]

    rewrite(saved[1], drop_biases)
    model, report = AutoModelForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(router.e_score_correction_bias.eq(0).all() for router in model.routers)


# --- what survives


CHANGED = {
    "vocab_size": 77,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "hidden_act": "gelu",
    "max_position_embeddings": 99,
    "initializer_range": 0.5,
    "rms_norm_eps": 1e-3,
    "use_cache": False,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 77.0, "factor": 3.0},
    "use_sliding_window": True,
    "sliding_window": 33,
    "attention_bias": True,
    "attention_dropout": 0.25,
    "moe_intermediate_size": 20,
    "num_experts": 9,
    "num_experts_per_tok": 4,
    "num_experts_per_tok_per_layer": [4, 2, 1],
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "norm_top1_prob": True,
    "routed_scaling_factor": 2.5,
    "router_aux_loss_type": "top1",
    "router_aux_loss_coef": 0.125,
    "aux_scoring_func": "sigmoid",
    "top1_lbl_temperature": 0.75,
    "router_z_loss_coef": 0.375,
    "expert_bias_update_rate": 0.0625,
    "expert_bias_cap": 0.875,
    "output_router_logits": True,
    "neuron_top_k": None,
    "neuron_ratio": [0.5, 0.25, 1.0],
    "neuron_select_on": "abs_gate",
    "neuron_aux_loss_coef": 0.15625,
    "neuron_aux_mode": "literal",
    "k_sampling": "layer",
    "k_min": 2,
    "k_max": 5,
    "k_distribution": "capacity",
    "k_tau": 1.5,
    "k_budget": 1.25,
    "k_seed": 17,
    "aux_k": "max",
    "pad_token_id": 5,
    "bos_token_id": 6,
    "eos_token_id": [7, 8],
}


@pytest.mark.parametrize("other", [{}, {"neuron_ratio": None, "neuron_top_k": [7, 8, 9]}])  # one of the two at most
def test_every_config_field_survives(tmp_path, other):
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = {field.name for field in dataclasses.fields(SigmaMoeConfig)} - inherited
    assert CHANGED.keys() == own, "a new field needs a value here"
    default, changed = SigmaMoeConfig(), CHANGED | other
    same = {name for name in own if getattr(default, name) == changed[name]}
    assert same == {"neuron_ratio" if other else "neuron_top_k"}

    SigmaMoeConfig(**changed).save_pretrained(tmp_path)
    for loaded in (SigmaMoeConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is SigmaMoeConfig
        assert {name: getattr(loaded, name) for name in own} == changed


@pytest.mark.parametrize("max_shard_size", ["5GB", "8KB"])
def test_weights_survive_bitwise(tmp_path, saved, max_shard_size):
    model = saved[0]
    model.save_pretrained(tmp_path / "again", max_shard_size=max_shard_size)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_fused_experts_load_too(tmp_path, saved):
    saved[0].save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "fused" / "model.safetensors")
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "fused")), logits_of(saved[0]))


@pytest.mark.parametrize("top_k", [[4, 2, 1], 1])
def test_experts_per_token_in_force_survive(tmp_path, top_k):
    model = SigmaMoeForCausalLM(config(num_experts_per_tok_per_layer=[3, 3, 2]))
    model.set_experts_per_token(top_k)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    in_force = top_k if isinstance(top_k, list) else [top_k] * 3
    assert [router.top_k for router in loaded.routers] == loaded.config.top_k_per_layer == in_force
    assert loaded.config.num_experts_per_tok == max(in_force)
    assert loaded.config.num_experts_per_tok_per_layer == model.config.num_experts_per_tok_per_layer
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_tied_embeddings_are_stored_once_and_stay_tied(tmp_path):
    model = SigmaMoeForCausalLM(config(tie_word_embeddings=True))
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_router_in_fp32(tmp_path, saved, dtype):
    model = AutoModelForCausalLM.from_pretrained(saved[1], dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert loaded.config.dtype == loaded.dtype == dtype
    for router, original in zip(loaded.routers, saved[0].routers, strict=True):
        for name in ("weight", "e_score_correction_bias"):
            assert getattr(router, name).dtype == torch.float32
            assert torch.equal(getattr(router, name), getattr(original, name))
    in_fp32 = {name for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert in_fp32 == {name for name in stored if ".mlp.gate." in name}
    assert {tensor.dtype for name, tensor in stored.items() if name not in in_fp32} == {dtype}
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [40, 20])
def test_resized_embeddings_survive(tmp_path, tied, size):
    model = SigmaMoeForCausalLM(config(tie_word_embeddings=tied))
    before, weights = logits_of_ids_below(model, 20), {n: p.clone() for n, p in model.state_dict().items()}
    model.resize_token_embeddings(size, mean_resizing=False)
    assert model.config.vocab_size == model.vocab_size == size
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(model.state_dict()[name][:20], weights[name][:20])
    # a product of another width adds up in another order
    torch.testing.assert_close(logits_of_ids_below(model, 20)[..., :20], before[..., :20], rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight.shape == loaded.model.embed_tokens.weight.shape == (size, 16)
    assert torch.equal(logits_of_ids_below(loaded, 20), logits_of_ids_below(model, 20))
    tokens = TOKENS % 20
    assert loaded(tokens, labels=tokens).loss.isfinite()


@torch.no_grad()
def logits_of_ids_below(model, size):
    return model.eval()(TOKENS % size).logits


def test_the_body_of_a_causal_model_loads_alone(saved):
    body, report = SigmaMoeModel.from_pretrained(saved[1], output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        expected = saved[0].model(TOKENS).last_hidden_state
        assert torch.equal(body.eval()(TOKENS).last_hidden_state, expected)


# --- a Hub repository in an environment without this package


HEADS = {
    "AutoModelForSequenceClassification": SigmaMoeForSequenceClassification,
    "AutoModelForTokenClassification": SigmaMoeForTokenClassification,
    "AutoModelForCausalLM": SigmaMoeForCausalLM,
    "AutoModel": SigmaMoeModel,
}

WITHOUT_THE_PACKAGE = """
import json, sys, traceback
sys.modules["hf_models"] = None  # importing it raises, installed or not
import torch
import transformers

tokens, reports = torch.tensor(json.loads(sys.argv[1])), {}
for auto_class in sys.argv[2:]:
    report = reports[auto_class] = {}
    load = getattr(transformers, auto_class).from_pretrained
    try:
        load(auto_class)
    except ValueError as error:
        report["untrusted"] = str(error)
    try:
        model = load(auto_class, trust_remote_code=True).eval()
    except Exception:
        report["error"] = traceback.format_exc()
        continue
    with torch.no_grad():
        torch.save(model(tokens)[0], auto_class + ".pt")
    model.save_pretrained(auto_class + "-again")
    report["class"] = f"{type(model).__module__.partition('.')[0]}.{type(model).__name__}"
    report["experts"] = model.config._experts_implementation
    report["top_k"] = [router.top_k for router in model.routers]
    report["router_dtypes"] = sorted({str(router.weight.dtype) for router in model.routers})
with open("reports.json", "w") as file:
    json.dump(reports, file)
"""


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """A folder with one repository per head, named by its auto class; the models; another process' reports."""
    root = tmp_path_factory.mktemp("repositories")
    models = {}
    for auto_class, model_class in HEADS.items():
        models[auto_class] = model_class(config(num_experts_per_tok_per_layer=[3, 1, 2])).eval()
        for router in models[auto_class].routers:
            torch.nn.init.normal_(router.e_score_correction_bias)
        models[auto_class].save_pretrained(root / auto_class)
    # -I drops the working directory, the user's packages and PYTHONPATH.
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, json.dumps(TOKENS.tolist()), *HEADS],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=root,
        env={**os.environ, "HF_HOME": str(root / "hf_home"), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root, models, json.loads((root / "reports.json").read_text())


@pytest.mark.parametrize("auto_class", HEADS)
@pytest.mark.compatibility("Remote code, without this package", method="sigma_moe")
def test_a_repository_loads_without_the_package(repositories, auto_class):
    root, models, reports = repositories
    model, report = models[auto_class], reports[auto_class]
    assert "error" not in report, report["error"]
    assert report["class"] == f"transformers_modules.{type(model).__name__}"
    assert report["experts"] == model.config._experts_implementation == "grouped_mm"
    assert report["top_k"] == [3, 1, 2]
    assert report["router_dtypes"] == ["torch.float32"]
    with torch.no_grad():
        expected = model(TOKENS)[0]
    torch.testing.assert_close(torch.load(root / f"{auto_class}.pt", weights_only=True), expected, rtol=0, atol=0)


@pytest.mark.parametrize("auto_class", HEADS)
def test_a_repository_asks_before_its_code_runs(repositories, auto_class):
    assert "trust_remote_code=True" in repositories[2][auto_class]["untrusted"]


@pytest.mark.parametrize("auto_class", HEADS)
def test_saved_without_the_package_it_is_a_complete_repository_again(repositories, auto_class):
    first, again = repositories[0] / auto_class, repositories[0] / f"{auto_class}-again"
    assert set(os.listdir(again)) == set(os.listdir(first))
    tensors, tensors_again = (load_file(folder / "model.safetensors") for folder in (first, again))
    assert tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors_again[name], tensors[name]) for name in tensors)
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, again)]
    assert configs[0]["auto_map"].keys() == configs[1]["auto_map"].keys()
    assert {k: v for k, v in configs[0].items() if k != "auto_map"} == {
        k: v for k, v in configs[1].items() if k != "auto_map"
    }


@strict
class SisterConfig(SigmaMoeConfig):
    """With a field of its own, as other methods on this trunk have."""

    model_type = "sister_of_sigma_moe"
    cap: int = 3


def test_own_fields_of_a_sister_are_checked_when_they_are_given_at_load(tmp_path):
    SisterConfig(**{name: value for name, value in config().own_fields().items()}).save_pretrained(tmp_path)
    assert SisterConfig.from_pretrained(tmp_path, cap=2).cap == 2
    with pytest.raises(StrictDataclassFieldValidationError, match="cap"):
        SisterConfig.from_pretrained(tmp_path, cap="many")
