"""MoNE, on its own trunk, under transformers' common tests."""

import re
import unittest
from unittest import mock

from hf_tests import test_modeling_common

from hf_models.moe.modeling_mone import MoneForCausalLM, MoneForSequenceClassification, MoneModel
from tests.transformers_suite.suite_sigma_moe import SigmaMoeSuite, SigmaMoeTester


class MoneTester(SigmaMoeTester):
    base_model_class = MoneModel
    causal_lm_class = MoneForCausalLM
    sequence_classification_class = MoneForSequenceClassification
    config_fields = SigmaMoeTester.config_fields | {"neuron_ratio": 0.5, "neuron_aux_loss_coef": 0.01}


class MoneTest(SigmaMoeSuite, unittest.TestCase):
    model_tester_class = MoneTester

    def setUp(self):
        super().setUp()
        if re.search("test_ep_|expert_parallel", self._testMethodName):  # where its neurons cannot be counted
            self.model_tester.config_fields = MoneTester.config_fields | {"neuron_aux_loss_coef": 0.0}
        # The tests of RoPE change every sub-configuration, and expect that there is one; this model has no host.
        change = test_modeling_common._set_config_rope_params
        tolerant = mock.patch.object(
            test_modeling_common,
            "_set_config_rope_params",
            lambda config, rope: config if config is None else change(config, rope),
        )
        self.enterContext(tolerant)

    def test_moe_parallel_plans_shard_experts(self):
        # transformers asks both plans to. Tensor parallelism would split the neurons of an expert, and the top ones
        # are chosen among all: it leaves experts whole on every rank, and expert parallelism shards them.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            experts = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in model.named_parameters() if ".experts." in name}
            self.assertEqual(len(experts), 2)
            self.assertLessEqual(experts, model._ep_plan.keys())
            self.assertFalse([name for name in model._tp_plan if ".experts" in name])
