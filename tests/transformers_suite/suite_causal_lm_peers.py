"""The yardstick of our dense language models: what a built-in one runs and skips in this harness."""

import unittest

from transformers import LlamaForCausalLM, LlamaModel

from tests.transformers_suite.causal_lm import CausalLMSuite, CausalLMTester


class LlamaTester(CausalLMTester):
    base_model_class = LlamaModel
    causal_lm_class = LlamaForCausalLM
    config_fields = {"intermediate_size": 37, "max_position_embeddings": 512}


class LlamaTest(CausalLMSuite, unittest.TestCase):
    model_tester_class = LlamaTester
