"""The yardstick: what a built-in model of the same kind runs and skips in this harness."""

import unittest

from transformers import Qwen3MoeForCausalLM, Qwen3MoeForSequenceClassification, Qwen3MoeModel

from tests.transformers_suite.causal_lm import CausalLMSuite, CausalLMTester


class Qwen3MoeTester(CausalLMTester):
    base_model_class = Qwen3MoeModel
    causal_lm_class = Qwen3MoeForCausalLM
    sequence_classification_class = Qwen3MoeForSequenceClassification
    config_fields = {
        "head_dim": 16,
        "intermediate_size": 37,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 512,
    }


class Qwen3MoeTest(CausalLMSuite, unittest.TestCase):
    model_tester_class = Qwen3MoeTester
