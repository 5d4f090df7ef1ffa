# Copyright 2026 The hf-sigma authors. Licensed under the Apache License, Version 2.0.
"""MoNE on its own trunk and inside other models: what a checkpoint becomes, and what training adds."""

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

import sigma_kernels
from hf_models.moe import MoneConfig, MoneForCausalLM, MoneModel, SigmaMoeConfig
from hf_models.moe.modeling_mone import HOSTS
from hf_models.moe.neurons import neuron_networks


SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = SHAPE | {"intermediate_size": 24}
SPARSE = DENSE | {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = SPARSE | {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
CONFIGS = {
    "sigma_moe": SigmaMoeConfig(
        **SHAPE, moe_intermediate_size=16, num_experts=6, num_experts_per_tok_per_layer=[2, 1]
    ),
    "qwen2_moe": Qwen2MoeConfig(**SPARSE, num_experts=6, shared_expert_intermediate_size=16, decoder_sparse_step=1),
    "qwen3_moe": Qwen3MoeConfig(**SPARSE, num_experts=6, mlp_only_layers=[1]),
    "olmoe": OlmoeConfig(**SPARSE, num_experts=6),
    "mixtral": MixtralConfig(**SPARSE, num_local_experts=6, sliding_window=4),
    "deepseek_v2": DeepseekV2Config(**LATENT),
    "deepseek_v3": DeepseekV3Config(**LATENT),
    "llama": LlamaConfig(**DENSE),
    "mistral": MistralConfig(**DENSE, sliding_window=4),
    "qwen2": Qwen2Config(**DENSE),
    "qwen3": Qwen3Config(**DENSE, tie_word_embeddings=True),
}
MOES = list(CONFIGS)[:7]
IDS = torch.tensor([[5, 9, 13, 7, 21, 40, 3, 11], [0, 0, 17, 33, 8, 2, 60, 19]])
MASK = (IDS != 0).long()


def host(name, **overrides):
    torch.manual_seed(0)
    config = type(CONFIGS[name]).from_dict(CONFIGS[name].to_dict() | overrides)
    return AutoModelForCausalLM.from_config(config).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK).logits


def test_every_host_is_tried_here():
    assert set(HOSTS) | {"sigma_moe"} == set(CONFIGS)


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", MOES)
def test_with_all_neurons_a_moe_stays_what_it_was_bit_for_bit(name, backend):
    model = host(name)
    mone = MoneForCausalLM.from_moe(model, neuron_ratio=1.0)
    for each in (model, mone):
        each.set_experts_implementation(backend)
    assert torch.equal(logits(mone), logits(model))
    mone.set_active_neurons(ratio=0.5)
    assert not torch.allclose(logits(mone), logits(model))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MOES])
def test_with_all_neurons_a_dense_model_stays_what_it_was(name):
    model = host(name)
    mone = MoneForCausalLM.from_moe(model, neuron_ratio=1.0)
    assert torch.equal(logits(mone), logits(model))
    mone.set_active_neurons(top_k=3)
    assert len(neuron_networks(mone)) == 2 and not torch.allclose(logits(mone), logits(model))


@pytest.mark.parametrize("name", CONFIGS)
def test_no_weight_is_touched_or_copied_and_the_result_is_saved_and_loaded(name, tmp_path):
    model = host(name)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    mone = MoneForCausalLM.from_moe(model, neuron_ratio=0.25)
    after = mone.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert after["model.embed_tokens.weight"].data_ptr() == model.model.embed_tokens.weight.data_ptr()
    mone.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(loaded) is MoneForCausalLM and loaded.config.neuron_ratio == 0.25
    assert torch.equal(logits(loaded), logits(mone))


@pytest.mark.parametrize("name", MOES)
def test_a_folder_of_the_host_becomes_a_mone_whatever_its_file_layout(name, tmp_path):
    model = host(name)
    model.save_pretrained(tmp_path, save_original_format=True)  # one tensor per expert matrix
    mone = MoneForCausalLM.from_moe(tmp_path, neuron_top_k=5)
    assert torch.equal(logits(mone), logits(MoneForCausalLM.from_moe(model, neuron_top_k=5)))


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache_equals_generation_without(name):
    mone = MoneForCausalLM.from_moe(host(name), neuron_ratio=0.5)
    options = {"attention_mask": MASK, "max_new_tokens": 6, "do_sample": False, "eos_token_id": -1}
    with_cache = mone.generate(IDS, **options)
    assert with_cache.shape == (2, 14)
    assert torch.equal(with_cache, mone.generate(IDS, use_cache=False, **options))


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "sigma_moe"])
def test_bf16_is_the_hosts_bf16(name):
    model = host(name).to(torch.bfloat16)
    if name == "sigma_moe":  # its routers stay in fp32 when it is loaded
        for router in model.routers:
            router.float()
    mone = MoneForCausalLM.from_moe(model, neuron_ratio=1.0)
    assert mone.dtype == torch.bfloat16 and torch.equal(logits(mone), logits(model))


def test_shared_experts_are_whole_unless_asked_for():
    model = host("qwen2_moe")
    plain = MoneForCausalLM.from_moe(model, neuron_ratio=0.5)
    shared = MoneForCausalLM.from_moe(model, neuron_ratio=0.5, config_overrides={"neuron_shared_expert": True})
    assert len(neuron_networks(plain)) == 2 and len(neuron_networks(shared)) == 4
    assert not torch.allclose(logits(plain), logits(shared))


def test_lists_mean_decoder_layers_also_where_some_have_no_experts():
    mone = MoneForCausalLM.from_moe(host("deepseek_v3"), neuron_ratio=[1.0, 0.25])
    (experts,) = neuron_networks(mone)  # layer 0 is dense
    assert experts.neuron_top_k == 4
    mone.set_active_neurons(ratio=[0.25, 1.0])
    assert experts.neuron_top_k is None


def test_refusals_name_the_reason():
    with pytest.raises(ValueError, match="model_type='gpt_oss' is not known as a host"):
        MoneForCausalLM.from_moe(AutoModelForCausalLM.from_config(GptOssConfig(**SPARSE, num_local_experts=4)))
    with pytest.raises(ValueError, match="model_type='gemma2'"):
        MoneForCausalLM.from_moe(AutoModelForCausalLM.from_config(Gemma2Config(**DENSE)))
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        MoneForCausalLM.from_moe(host("llama", hidden_act="gelu"))
    adapted = get_peft_model(host("olmoe"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="merge_and_unload"):
        MoneForCausalLM.from_moe(adapted)
    with pytest.raises(TypeError, match="loaded already"):
        MoneForCausalLM.from_moe(host("olmoe"), revision="main")
    with pytest.raises(StrictDataclassError, match="say the same thing"):
        MoneForCausalLM.from_moe(host("olmoe"), neuron_ratio=0.5, neuron_top_k=3)
    with pytest.raises(ValueError, match="Use AutoModelForCausalLM"):
        AutoModel.from_config(MoneForCausalLM.from_moe(host("olmoe")).config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"neuron_ratio": 0.0}, "neuron_ratio=0.0 must be in"),
        ({"neuron_ratio": 1.5}, "neuron_ratio=1.5"),
        ({"neuron_ratio": [0.5]}, "neuron_ratio has 1 entries but num_hidden_layers=2"),
        ({"neuron_top_k": 0}, "neuron_top_k=0 must be >= 1"),
        ({"neuron_select_on": "loudness"}, "neuron_select_on='loudness'"),
        ({"neuron_aux_mode": "softmax"}, "neuron_aux_mode='softmax'"),
        ({"neuron_aux_loss_coef": -1.0}, "neuron_aux_loss_coef=-1.0"),
    ],
)
def test_impossible_fields_are_refused_by_name(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        MoneConfig(**SHAPE, moe_intermediate_size=16, num_experts=4, **fields)


def own(**overrides):
    torch.manual_seed(0)
    fields = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0}
    return MoneForCausalLM(MoneConfig(**{**SHAPE, **fields, **overrides}))


def test_the_default_is_half_of_the_neurons_and_what_is_in_force_is_saved(tmp_path):
    model = own().eval()
    assert model.config.neuron_ratio == 0.5 and {n.neuron_top_k for n in neuron_networks(model)} == {8}
    half = logits(model)
    with model.active_neurons(ratio=[0.25, 1.0]):
        inside = logits(model)
        model.save_pretrained(tmp_path)
    assert torch.equal(logits(model), half) and not torch.equal(inside, half)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.neuron_ratio == [0.25, 1.0] and torch.equal(logits(loaded), inside)
    overridden = AutoModelForCausalLM.from_pretrained(tmp_path, neuron_top_k=8)
    assert overridden.config.neuron_ratio is None and torch.equal(logits(overridden), half)
    with pytest.raises(ValueError, match="neuron_ratio=2.0"):
        model.set_active_neurons(ratio=2.0)
    assert torch.equal(logits(model), half) and model.config.neuron_ratio == 0.5


def test_all_neurons_stay_all_when_saved_and_a_refusal_changes_nothing(tmp_path):
    model = own(neuron_ratio=0.25).eval()
    quarter = logits(model)
    for wrong in ({"top_k": 2.5}, {"ratio": "half"}, {"ratio": 0.5, "top_k": 3}):
        with pytest.raises(ValueError, match="is not possible"):
            model.set_active_neurons(**wrong)
        assert model.config.neuron_ratio == 0.25 and torch.equal(logits(model), quarter)
    model.set_active_neurons()
    model.save_pretrained(tmp_path)
    assert not torch.equal(logits(model), quarter)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_what_acts_in_our_routers_is_refused_for_a_host():
    model = host("qwen3_moe")
    for field, value in (("aux_k", "max"), ("expert_bias_update_rate", 0.1)):
        with pytest.raises(StrictDataclassError, match="act inside Sigma-MoE's routers"):
            MoneForCausalLM.from_moe(model, config_overrides={field: value})
    with pytest.raises(ValueError, match="num_experts_per_tok.*which the host decides"):
        MoneForCausalLM.from_moe(model, config_overrides={"num_experts_per_tok": 1})
    model.set_experts_implementation("batched_mm")
    assert MoneForCausalLM.from_moe(model).model.config._experts_implementation == "batched_mm"


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_active_parameters_count_the_whole_gate(ratio):
    model = own(neuron_ratio=ratio)
    everything = own(neuron_ratio=1.0).num_active_parameters()
    idle = 2 * 2 * 2 * 32 * (16 - round(16 * ratio))  # layers, experts, up and down, hidden, neurons left out
    assert model.num_active_parameters() == everything - idle


@pytest.mark.parametrize("name", CONFIGS)
def test_active_parameters_of_a_host_are_those_that_a_token_multiplies_with(name):
    model = host(name)
    whole, half = (MoneForCausalLM.from_moe(model, neuron_ratio=r).num_active_parameters() for r in (1, 0.5))
    tables = (1 if name == "qwen3" else 2) * 64 * 32
    if name in MOES:
        width = 24 if name in ("olmoe", "mixtral") else 16
        active = {"sigma_moe": 3, "qwen3_moe": 2, "deepseek_v2": 2, "deepseek_v3": 2}.get(name, 4)  # of all layers
        layers = 1 if active == 2 else 2
        assert whole == model.num_parameters() - tables - (6 * layers - active) * 3 * 32 * width
        assert whole - half == active * 2 * 32 * width // 2
    else:
        assert whole == model.num_parameters() - tables
        assert whole - half == 2 * 2 * 32 * 24 // 2


@pytest.mark.parametrize("mode", ["normalized", "literal"])
def test_the_neuron_loss_joins_the_training_loss_only(mode):
    plain, balanced = own(), own(neuron_aux_loss_coef=0.3, neuron_aux_mode=mode)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    expected, out = plain.train()(**inputs), balanced.train()(**inputs)
    assert expected.neuron_aux_loss is None and out.neuron_aux_loss > 0
    torch.testing.assert_close(out.loss, expected.loss + 0.3 * out.neuron_aux_loss)
    out.loss.backward()
    expected.loss.backward()
    gates = [m.model.layers[0].mlp.experts.gate_up_proj.grad for m in (plain, balanced)]
    assert not torch.allclose(*gates)
    torch.testing.assert_close(balanced.eval()(**inputs).loss, plain.eval()(**inputs).loss)


def test_descending_the_neuron_loss_spreads_the_use_of_neurons():
    model = own(neuron_aux_loss_coef=1.0, neuron_ratio=0.25).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (8, 32), generator=generator)
    optimizer = torch.optim.SGD(model.model.layers.parameters(), lr=3.0)
    losses = []
    for _ in range(30):
        loss = model(input_ids=ids, labels=ids).neuron_aux_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_gradient_checkpointing_changes_no_gradient(backend):
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    gradients = []
    for checkpointing in (False, True):
        model = own(neuron_aux_loss_coef=0.3, router_aux_loss_coef=0.1).train()
        model.set_experts_implementation(backend)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-5, atol=1e-7)


def test_a_backend_that_cannot_count_neurons_is_refused_in_training_only():
    model = own(neuron_aux_loss_coef=0.3)
    model.set_experts_implementation("deepgemm")
    with pytest.raises(ValueError, match="deepgemm.*and count them"):
        model.train()(input_ids=IDS, labels=IDS)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v2"])
def test_a_host_trains_with_its_balance_loss_at_the_weight_that_it_had(name):
    model = host(name, router_aux_loss_coef=0.5, output_router_logits=True)
    mone = MoneForCausalLM.from_moe(model, neuron_ratio=1.0).train()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    out = mone(**inputs)
    layers = 1 if name in ("qwen3_moe", "deepseek_v2") else 2
    assert out.load_balancing_losses.shape == (layers,)
    coefficient = 0.5 * 2 / 2  # c K / layers
    plain = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(out.loss, plain + coefficient * out.load_balancing_losses.sum())
    out.loss.backward()
    assert all(router.weight.grad.abs().max() > 0 for router in mone.routers)


def test_a_host_without_a_balance_loss_gets_none():
    mone = MoneForCausalLM.from_moe(host("olmoe"), neuron_ratio=0.5).train()
    assert mone.config.router_aux_loss_coef == 0
    dense = MoneForCausalLM.from_moe(host("llama"), config_overrides={"neuron_aux_loss_coef": 0.1}).train()
    out = dense(input_ids=IDS, labels=IDS)
    assert out.aux_loss is None and out.neuron_aux_loss > 0
    out.loss.backward()


def test_embeddings_of_a_host_are_resized_and_come_back(tmp_path):
    mone = MoneForCausalLM.from_moe(host("qwen3"), neuron_ratio=0.5)
    mone.resize_token_embeddings(70)
    mone.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.vocab_size == config.host_config.vocab_size == 70
    assert AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits.shape[-1] == 70


def test_what_a_host_decides_can_be_overridden_at_load_time(tmp_path):
    mone = MoneForCausalLM.from_moe(host("olmoe"), neuron_ratio=0.5)
    mone.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=1, use_cache=False)
    assert [router.top_k for router in loaded.routers] == [1, 1]
    assert loaded.config.num_experts_per_tok == 1 and loaded.config.host_config.use_cache is False
    mone.set_active_experts(1)
    assert torch.equal(logits(loaded), logits(mone))


def test_a_model_on_no_device_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIGS["olmoe"])
    with pytest.raises(ValueError, match="Load it unquantised on one"):
        MoneForCausalLM.from_moe(model)


@pytest.mark.parametrize("name", ["sigma_moe", "olmoe"])
def test_lora_on_the_3d_experts_trains(name):
    mone = MoneForCausalLM.from_moe(host(name), neuron_ratio=0.5)
    targets = [n for n, _ in mone.named_parameters() if n.endswith(("gate_up_proj", "down_proj"))]
    model = get_peft_model(mone, LoraConfig(r=2, target_modules=[], target_parameters=targets)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert sum(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters()) > 0


@pytest.mark.compatibility("Auto classes", method="mone")
def test_every_auto_class_finds_its_model_with_grouped_experts():
    config = own().config
    assert type(AutoModel.from_config(config)) is MoneModel
    assert type(AutoModelForCausalLM.from_config(config)) is MoneForCausalLM
    assert AutoModelForCausalLM.from_config(config).config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v3"])
def test_decoding_by_neurons_computes_what_the_mask_computes(name, monkeypatch):
    mone = MoneForCausalLM.from_moe(host(name), neuron_ratio=0.25)
    expected = mone.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    called = []
    real = sigma_kernels.neuron_topk_mlp
    monkeypatch.setattr(sigma_kernels, "neuron_topk_mlp", lambda *a, **k: called.append(a[0].shape) or real(*a, **k))
    mone.set_experts_implementation("sigma_neurons")
    got = mone.generate(IDS, attention_mask=MASK, max_new_tokens=6, do_sample=False, eos_token_id=-1)
    assert torch.equal(got, expected)
    layers = len(neuron_networks(mone))
    assert len(called) == 6 * layers and (2, 32) in called
    torch.testing.assert_close(logits(mone), reference_logits(mone), rtol=1e-4, atol=1e-5)


def test_decoding_leaves_other_activations_to_the_mask():
    model = own(hidden_act="gelu", neuron_ratio=0.25).eval()
    expected = logits(model)
    model.set_experts_implementation("sigma_neurons")
    with torch.no_grad():
        assert torch.equal(model(IDS, attention_mask=MASK).logits, expected)
    shard = model.model.layers[0].mlp.experts
    shard.gate_up_proj = torch.nn.Parameter(shard.gate_up_proj[:, :16])
    shard.down_proj = torch.nn.Parameter(shard.down_proj[:, :, :8])
    with torch.no_grad(), pytest.raises(ValueError, match="must leave the experts whole"):
        model(IDS)


def reference_logits(mone):
    mone.set_experts_implementation("grouped_mm")
    expected = logits(mone)
    mone.set_experts_implementation("sigma_neurons")
    return expected


def test_the_neurons_backend_trains_as_grouped_mm_does():
    inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.masked_fill(MASK == 0, -100)}
    losses = []
    for backend in ("grouped_mm", "sigma_neurons"):
        model = own(neuron_aux_loss_coef=0.3).train()
        model.set_experts_implementation(backend)
        losses.append(model(**inputs).loss)
    assert torch.equal(*losses)
