"""The backend `sigma_triton` in models of transformers: what it computes, what it refuses, when it steps aside."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.forked import run_python


COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Latent attention, one group of experts, a dense first layer and a shared expert.
LATENT = COMMON | {
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
MODELS = {
    "sigma_moe": lambda: SigmaMoeForCausalLM(
        SigmaMoeConfig(**COMMON, num_experts=6, num_experts_per_tok_per_layer=[2, 1], initializer_range=0.2)
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(**COMMON, num_experts=6, shared_expert_intermediate_size=16, decoder_sparse_step=1)
    ),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, num_experts=6)),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=6)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=6)),
    "deepseek_v2": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**LATENT)),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(**COMMON, n_routed_experts=6, n_group=1, topk_group=1, first_k_dense_replace=1)
    ),
}
IDS = torch.tensor([[5, 9, 13, 7, 21, 40, 3, 11], [0, 0, 17, 33, 8, 2, 60, 19]])


class Calls(TorchDispatchMode):
    """Counts the operators of ours that really run."""

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sigma_kernels":
            name = function.__name__.split(".")[0]
            self.counts[name] = self.counts.get(name, 0) + 1
        return function(*args, **kwargs or {})


def learn(model, implementation):
    """Logits and the gradients of all parameters that have one, and which of our operators ran."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    with Calls() as calls:
        out = model(input_ids=IDS, attention_mask=(IDS != 0).long(), labels=IDS)
        out.loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients, calls.counts


def assert_same_learning(model, forwards=None):
    expected, gradients, none = learn(model, "grouped_mm")
    logits, ours, calls = learn(model, "sigma_triton")
    layers = sum("is_transposed" in vars(module) for module in model.modules())
    assert none == {} and layers
    assert calls == {"moe_mlp": forwards or layers, "moe_mlp_backward_": layers}
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert ours.keys() == gradients.keys()
    for name in gradients:
        torch.testing.assert_close(ours[name], gradients[name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_all_gradients_are_those_of_the_default_backend(name):
    assert_same_learning(MODELS[name]().train())


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe"])
def test_gradient_checkpointing_changes_nothing(name):
    model = MODELS[name]().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_same_learning(model, forwards=4)  # two layers, twice


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe"])
def test_adapters_on_the_3d_experts_learn_the_same(name):
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(MODELS[name]().train(), LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert_same_learning(model.base_model)


@pytest.mark.interpreter
def test_experts_per_token_change_while_it_trains():
    model = MODELS["sigma_moe"]().train()
    for top_k in ([4, 1], 1, 3):
        model.set_experts_per_token(top_k)
        assert_same_learning(model)


@pytest.mark.interpreter
def test_autocast_computes_in_its_dtype_with_fp32_weights():
    model = MODELS["qwen3_moe"]().eval()
    model.set_experts_implementation("sigma_triton")
    experts = model.model.layers[0].mlp.experts
    hidden, index = torch.randn(40, 32), torch.stack([torch.randperm(6)[:2] for _ in range(40)])
    weights, seen = torch.rand(40, 2), []

    class Inputs(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "sigma_kernels":
                seen.extend(a for a in args if isinstance(a, torch.dtype))
            return function(*args, **kwargs or {})

    exact = experts(hidden, index, weights)
    with torch.autocast("cpu", torch.bfloat16), Inputs():
        out = experts(hidden, index, weights)
    out.sum().backward()
    assert seen == [torch.bfloat16] and out.dtype == torch.float32
    assert experts.gate_up_proj.dtype == experts.gate_up_proj.grad.dtype == torch.float32
    assert 1e-4 < ((out - exact).pow(2).mean() / exact.pow(2).mean()).sqrt() < 2e-2


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["sigma_moe", "qwen3_moe"])
def test_generation_decodes_with_the_kernels(name):
    model, options = MODELS[name]().eval(), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS[:1], **options)
    model.set_experts_implementation("sigma_triton")
    with Calls() as calls:
        got = model.generate(IDS[:1], **options)
    assert torch.equal(got, expected) and calls.counts == {"moe_mlp": 2 * 6}


@pytest.mark.interpreter
def test_sentinels_of_expert_parallelism_are_skipped():
    model = MODELS["qwen3_moe"]().eval()
    experts = model.model.layers[0].mlp.experts
    hidden, weights = torch.randn(20, 32), torch.rand(20, 2)
    index = torch.randint(0, 12, (20, 2)).clamp(max=6)
    weights = weights.masked_fill(index == 6, 0.0)
    experts._is_expert_parallel = True
    outputs = []
    for implementation in ("grouped_mm", "sigma_triton"):
        model.set_experts_implementation(implementation)
        outputs.append(experts(hidden, index, weights))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_experts_that_the_kernels_cannot_compute_are_refused_by_name():
    fields = {name: value for name, value in COMMON.items() if name not in ("moe_intermediate_size", "head_dim")}
    biased = GptOssForCausalLM(GptOssConfig(**fields, head_dim=8, num_local_experts=4)).eval()
    biased.set_experts_implementation("sigma_triton")
    with pytest.raises(ValueError, match="GptOssExperts has .*has_bias=True.*Choose 'grouped_mm'"):
        biased(IDS)
    other = Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, num_experts=6, hidden_act="gelu")).eval()
    other.set_experts_implementation("sigma_triton")
    with pytest.raises(ValueError, match="Qwen3MoeExperts has the activation GELU"):
        other(IDS)


STEPPING_ASIDE = """
import sys
if sys.argv[1] == "without kernels":
    sys.modules["sigma_kernels"] = None
import torch
from transformers import AutoModelForCausalLM
from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from transformers.utils import logging

torch.manual_seed(0)
shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
model = SigmaMoeForCausalLM(
    SigmaMoeConfig(**shape, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4)
).eval()
ids = torch.arange(8)[None]
expected = model.generate(ids, max_new_tokens=4, do_sample=False)
model.set_experts_implementation("sigma_triton")
assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)
model.train()(input_ids=ids, labels=ids).loss.backward()
assert model.model.layers[0].mlp.experts.gate_up_proj.grad.abs().sum() > 0
"""


@pytest.mark.parametrize("case", ["without kernels", "on the CPU"])
def test_where_the_kernels_cannot_run_the_stock_backend_does_with_one_warning(case):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if case == "on the CPU" and environment == os.environ:
        done = run_python("-c", STEPPING_ASIDE, case)
    else:
        done = subprocess.run(
            [sys.executable, "-c", STEPPING_ASIDE, case],
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": "."},
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("'grouped_mm' computes instead") == 1
