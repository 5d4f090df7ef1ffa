"""What every encoder of ours gives to transformers' common tests."""

import torch
from hf_tests.test_configuration_common import ConfigTester
from hf_tests.test_fsdp_mixin import FSDPTesterMixin
from hf_tests.test_modeling_common import ModelTesterMixin, ids_tensor
from hf_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from hf_tests.test_training_mixin import TrainingTesterMixin


class EncoderTester:
    """A tiny model and its inputs, as the mixins ask for them; families set the classes and `config_fields`."""

    model_classes: tuple = ()
    config_fields: dict = {}

    batch_size = 13
    seq_length = 7
    is_training = True
    # The mixins read these off the tester, not off the config.
    vocab_size = 99
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 2
    num_labels = 3

    @property
    def config_class(self):
        return self.model_classes[0].config_class

    def get_config(self):
        shape = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_labels")
        return self.config_class(
            **{name: getattr(self, name) for name in shape}
            | {"intermediate_size": 37, "max_position_embeddings": 512, "pad_token_id": 0}
            | self.config_fields
        )

    def prepare_config_and_inputs_for_common(self):
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        # Row i sees its first i + 1 tokens: every length of padding in one batch.
        attention_mask = torch.tril(torch.ones_like(input_ids))
        return self.get_config(), {"input_ids": input_ids, "attention_mask": attention_mask}


class EncoderSuite(ModelTesterMixin, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin):
    """All common tests; subclass together with `unittest.TestCase` and set `model_tester_class`."""

    model_tester_class = None
    model_tester = None  # abstract in the mixins

    def setUp(self):
        self.model_tester = self.model_tester_class()
        self.all_model_classes = self.model_tester.model_classes
        self.config_tester = ConfigTester(self, config_class=self.model_tester.config_class)

    def _get_trainable_model_class(self):
        return self.all_model_classes[1]  # the body alone has no loss

    def test_config(self):
        self.config_tester.run_common_tests()
