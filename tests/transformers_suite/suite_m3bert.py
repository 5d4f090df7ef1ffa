"""m3BERT under transformers' common tests, with learned positions and with RoPE."""

import unittest

from hf_models.m3bert.modeling_m3bert import (
    M3BertForMaskedLM,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
)
from tests.transformers_suite.encoder import EncoderSuite, EncoderTester


class M3BertTester(EncoderTester):
    model_classes = (M3BertModel, M3BertForMaskedLM, M3BertForSequenceClassification, M3BertForTokenClassification)
    hidden_size = 64  # what the FSDP tests write into the finished config, and the dims end with
    config_fields = {"mrl_dims": [32, 64]}


class M3BertRopeTester(M3BertTester):
    config_fields = M3BertTester.config_fields | {"position_embedding_type": "rope"}


class M3BertTest(EncoderSuite, unittest.TestCase):
    model_tester_class = M3BertTester

    def setUp(self):
        if "rope_scaling" in self._testMethodName:
            self.skipTest("There is nothing to scale: positions are learned")
        super().setUp()


class M3BertRopeTest(EncoderSuite, unittest.TestCase):
    model_tester_class = M3BertRopeTester
