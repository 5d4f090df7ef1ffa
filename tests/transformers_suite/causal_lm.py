"""What every causal language model of ours gives to transformers' common tests."""

import torch
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_fsdp_mixin import FSDPTesterMixin
from hf_tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin, ids_tensor
from hf_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from hf_tests.test_training_mixin import TrainingTesterMixin


try:
    from hf_tests.test_expert_parallel_mixin import ExpertParallelTesterMixin
except ImportError:  # an older release: its expert-parallel tests are in TensorParallelTesterMixin

    class ExpertParallelTesterMixin:
        pass


class CausalLMTester:
    """A tiny model and its inputs, as the mixins ask for them; families set the classes and `config_fields`."""

    base_model_class = causal_lm_class = sequence_classification_class = None
    config_fields: dict = {}

    batch_size = 13
    seq_length = 7
    is_training = True
    # The mixins read these off the tester, not off the config.
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_key_value_heads = 2

    @property
    def config_class(self):
        return self.causal_lm_class.config_class

    @property
    def model_classes(self):
        classes = (self.base_model_class, self.causal_lm_class, self.sequence_classification_class)
        return tuple(model_class for model_class in classes if model_class is not None)

    def get_config(self):
        shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        special_tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return self.config_class(**{name: getattr(self, name) for name in shape} | special_tokens | self.config_fields)

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Row i sees its first i + 1 tokens: every length of padding in one batch.
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class CausalLMSuite(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    TensorParallelTesterMixin,
    ExpertParallelTesterMixin,
    FSDPTesterMixin,
):
    """All common tests; subclass together with `unittest.TestCase` and set `model_tester_class`."""

    model_tester_class = None
    model_tester = None  # abstract in the mixins
    # An expert that no token of a tiny batch chose has no gradient.
    test_all_params_have_gradient = False

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.all_model_classes = self.model_tester.model_classes
        self.config_tester = ConfigTester(self, config_class=self.model_tester.config_class)

    def test_config(self):
        self.config_tester.run_common_tests()
