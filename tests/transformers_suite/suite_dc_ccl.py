"""DC-CCL under transformers' common tests: the vertical split of a ViT, its device package, three small Llamas."""

import json
import unittest

from transformers import ViTConfig

from hf_models.dc_ccl.modeling_dc_ccl import DcCclDeviceModel, DcCclForCausalLM, DcCclForImageClassification
from hf_models.dc_ccl.vertical_split import split_vertically
from tests.transformers_suite.causal_lm import CausalLMSuite, CausalLMTester
from tests.transformers_suite.vision import BACKBONE_SHAPE, VisionSuite, VisionTester


class DcCclTester(VisionTester):
    model_classes = (DcCclForImageClassification,)
    # Hidden states and attentions are the small submodel's, which has a quarter of the width.
    hidden_size = VisionTester.hidden_size // 4
    num_attention_heads = VisionTester.num_attention_heads // 4

    def get_config(self):
        return split_vertically(ViTConfig(**BACKBONE_SHAPE, intermediate_size=36, num_labels=self.num_labels), 0.25)


class DcCclDeviceTester(DcCclTester):
    model_classes = (DcCclDeviceModel,)

    def get_config(self):
        return super().get_config().device_config()


class DcCclLmTester(CausalLMTester):
    causal_lm_class = DcCclForCausalLM
    tied = False

    def get_config(self):
        shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        llama = {"model_type": "llama", "intermediate_size": 37, "max_position_embeddings": 512}
        llama |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": self.tied}
        llama |= {name: getattr(self, name) for name in shape}
        return self.config_class(cloud_config=llama, control_config=dict(llama), co_config=dict(llama))


class DcCclSuite:
    # The control model is distilled: the loss of what is served does not reach it.
    test_all_params_have_gradient = False

    def setUp(self):
        super().setUp()
        # transformers tells nested configurations apart by their type alone, and small models are of one.
        config_class = self.config_tester.config_class
        same = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1]}
        submodels = {name: same for name in config_class.sub_configs if name != "base_config"}
        complete = json.loads(config_class(**submodels).to_json_string())
        self.config_tester.inputs_dict = {name: complete[name] for name in submodels}


class DcCclTest(DcCclSuite, VisionSuite, unittest.TestCase):
    model_tester_class = DcCclTester


class DcCclDeviceTest(DcCclSuite, VisionSuite, unittest.TestCase):
    model_tester_class = DcCclDeviceTester


class DcCclLmTest(DcCclSuite, CausalLMSuite, unittest.TestCase):
    model_tester_class = DcCclLmTester

    def test_tied_weights_keys(self):
        self.model_tester.tied = True  # each submodel ties its own embeddings, by its own configuration
        super().test_tied_weights_keys()

    def test_model_base_model_prefix(self):
        # transformers asks for a body under a head; here the parts of the sum are models with heads of their own.
        model = DcCclForCausalLM(self.model_tester.get_config())
        self.assertIs(model.base_model, model)
