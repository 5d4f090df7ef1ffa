"""M-MoE under transformers' common tests."""

import unittest

from hf_models.moe.modeling_m_moe import MMoeForCausalLM, MMoeForSequenceClassification, MMoeModel
from tests.transformers_suite.suite_sigma_moe import SigmaMoeSuite, SigmaMoeTester


class MMoeTester(SigmaMoeTester):
    base_model_class = MMoeModel
    causal_lm_class = MMoeForCausalLM
    sequence_classification_class = MMoeForSequenceClassification
    config_fields = SigmaMoeTester.config_fields | {"k_max": 4}


class MMoeTest(SigmaMoeSuite, unittest.TestCase):
    model_tester_class = MMoeTester
