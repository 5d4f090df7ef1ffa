"""Sigma-MoE under transformers' common tests."""

import inspect
import unittest
from unittest import mock

from transformers import PreTrainedModel

from hf_models.moe.modeling_sigma_moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeModel,
    SigmaMoePreTrainedModel,
)
from tests.transformers_suite.causal_lm import CausalLMSuite, CausalLMTester


class SigmaMoeTester(CausalLMTester):
    base_model_class = SigmaMoeModel
    causal_lm_class = SigmaMoeForCausalLM
    sequence_classification_class = SigmaMoeForSequenceClassification
    config_fields = {
        "head_dim": 16,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        # Both kinds of layer: several experts with normalised weights, and one expert with its raw score.
        "num_experts_per_tok": 2,
        "num_experts_per_tok_per_layer": [2, 1],
        "max_position_embeddings": 512,
    }


class SigmaMoeSuite(CausalLMSuite):
    """The common tests for a family on Sigma-MoE's trunk."""

    def test_reverse_loading_mapping(self):
        # The test saves with the default, which transformers has as per-expert names and we as fused tensors; what it
        # judges is the mapping to per-expert names.
        with mock.patch.object(SigmaMoePreTrainedModel, "save_pretrained", PreTrainedModel.save_pretrained):
            super().test_reverse_loading_mapping()

    def test_moe_models_record_router_logits(self):
        # The test takes a model for one with experts if its file has this decorator; ours inherit decorated experts.
        source = inspect.getsource
        decorated = mock.patch("inspect.getsource", lambda module: f"{source(module)}\n# @use_experts_implementation")
        with decorated:
            super().test_moe_models_record_router_logits()


class SigmaMoeTest(SigmaMoeSuite, unittest.TestCase):
    model_tester_class = SigmaMoeTester
