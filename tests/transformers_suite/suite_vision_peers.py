"""The yardstick of our image classifiers: what a built-in one runs and skips in this harness."""

import unittest

from transformers import ViTForImageClassification, ViTModel

from tests.transformers_suite.vision import VisionSuite, VisionTester


class ViTTester(VisionTester):
    model_classes = (ViTModel, ViTForImageClassification)
    config_fields = {"intermediate_size": 37}


class ViTTest(VisionSuite, unittest.TestCase):
    model_tester_class = ViTTester
