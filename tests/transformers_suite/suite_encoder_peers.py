"""The yardsticks of our encoders: what built-in ones run and skip in this harness."""

import unittest

from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    EuroBertForMaskedLM,
    EuroBertForSequenceClassification,
    EuroBertForTokenClassification,
    EuroBertModel,
)

from tests.transformers_suite.encoder import EncoderSuite, EncoderTester


class BertTester(EncoderTester):
    model_classes = (BertModel, BertForMaskedLM, BertForSequenceClassification, BertForTokenClassification)


class EuroBertTester(EncoderTester):
    model_classes = (
        EuroBertModel,
        EuroBertForMaskedLM,
        EuroBertForSequenceClassification,
        EuroBertForTokenClassification,
    )
    config_fields = {"bos_token_id": 1, "eos_token_id": 2}


class BertTest(EncoderSuite, unittest.TestCase):
    model_tester_class = BertTester


class EuroBertTest(EncoderSuite, unittest.TestCase):
    model_tester_class = EuroBertTester
