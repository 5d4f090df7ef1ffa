"""CTR models under those of transformers' common tests that have an object here.

A CTR model is tables, an MLP and a head over described features: it has no attention, hidden states of layers, tokens,
RoPE, experts, generation or plan for tensor parallelism, and what is asked of these is not asked of it.
"""

import unittest

from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_modeling_common import ModelTesterMixin

from hf_models.ctr.modeling_ctr import CtrForCtrPrediction, CtrModel
from tests.hf_models.ctr.tiny_ctr import batch, tiny_config


class CtrTester:
    """A tiny model with every kind of feature, and its rows, as the mixin asks for them."""

    architecture = "deepfm"
    batch_size = 13
    is_training = True
    # The mixin reads these off the tester, not off the config.
    hidden_size = 6
    num_hidden_layers = 2

    def get_config(self):
        return tiny_config(self.architecture)

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), batch(self.batch_size, labels=False)


class CtrDinTester(CtrTester):
    architecture = "din"


class CtrSuite(ModelTesterMixin):
    model_tester_class = None
    model_tester = None  # abstract in the mixin
    has_attentions = False
    test_resize_embeddings = False  # by one `vocab_size`: each feature has its own, and tests/hf_models/ctr resize it
    test_mismatched_shapes = False  # of heads with another number of labels: a click is one logit

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.all_model_classes = (CtrModel, CtrForCtrPrediction)
        # No `common_properties`: there is no hidden size or number of heads.
        self.config_tester = ConfigTester(
            self, config_class=CtrModel.config_class, has_text_modality=False, common_properties=[]
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    @unittest.skip("there are no hidden states of layers")
    def test_hidden_states_output(self):
        pass

    @unittest.skip("there are no hidden states of layers")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    @unittest.skip("there is one problem type: a click or none")
    def test_problem_types(self):
        pass


class CtrTest(CtrSuite, unittest.TestCase):
    model_tester_class = CtrTester


class CtrDinTest(CtrSuite, unittest.TestCase):
    model_tester_class = CtrDinTester
