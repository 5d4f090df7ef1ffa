"""What every image classifier of ours gives to transformers' common tests."""

import unittest

from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_fsdp_mixin import FSDPTesterMixin
from hf_tests.test_modeling_common import ModelTesterMixin, floats_tensor
from hf_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from torch import nn


BACKBONE_SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 30,
    "patch_size": 6,
}


class VisionTester:
    """A tiny model and its inputs, as the mixins ask for them; families set the classes and `get_config`."""

    model_classes: tuple = ()
    config_fields: dict = {}

    batch_size = 13
    is_training = True
    # The mixins read these off the tester, not off the config.
    num_labels = 3
    num_channels = 3
    hidden_size = BACKBONE_SHAPE["hidden_size"]
    num_hidden_layers = BACKBONE_SHAPE["num_hidden_layers"]
    num_attention_heads = BACKBONE_SHAPE["num_attention_heads"]
    image_size = BACKBONE_SHAPE["image_size"]
    patch_size = BACKBONE_SHAPE["patch_size"]
    mask_length = (image_size // patch_size) ** 2  # of bool_masked_pos
    num_masks = 2
    seq_length = mask_length + 1  # and CLS

    @property
    def config_class(self):
        return self.model_classes[0].config_class

    def get_config(self):
        return self.config_class(**BACKBONE_SHAPE | {"num_labels": self.num_labels} | self.config_fields)

    def prepare_config_and_inputs_for_common(self):
        size = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(size)}


class VisionSuite(ModelTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin):
    """All common tests; subclass together with `unittest.TestCase` and set `model_tester_class`."""

    model_tester_class = None
    model_tester = None  # abstract in the mixins
    test_resize_embeddings = False  # of tokens, which there are none of

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.all_model_classes = self.model_tester.model_classes
        self.config_tester = ConfigTester(self, config_class=self.model_tester.config_class, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("an image has no inputs_embeds")
    def test_inputs_embeds(self):
        pass

    def test_model_get_set_embeddings(self):
        # transformers asks for an nn.Embedding; patches are embedded by a convolution.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config())
            self.assertTrue(any(isinstance(module, nn.Conv2d) for module in model.get_input_embeddings().modules()))
            new = nn.Conv2d(3, 32, 6, 6)
            model.set_input_embeddings(new)
            self.assertIs(model.get_input_embeddings(), new)
            self.assertTrue(isinstance(model.get_output_embeddings(), nn.Linear | None))
