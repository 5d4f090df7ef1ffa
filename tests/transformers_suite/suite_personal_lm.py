"""Personal language models under transformers' common tests: a language model on Llama, a classifier on BERT."""

import unittest

from hf_models.personal_lm.modeling_personal_lm import PersonalLmForCausalLM, PersonalLmForSequenceClassification
from tests.transformers_suite.causal_lm import CausalLMSuite, CausalLMTester
from tests.transformers_suite.encoder import EncoderSuite, EncoderTester


BASE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 37}
BASE |= {"pad_token_id": 0, "max_position_embeddings": 512}


class PersonalLmTester(CausalLMTester):
    causal_lm_class = PersonalLmForCausalLM

    def get_config(self):
        base = {"model_type": "llama", "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
        return self.config_class(base_config=BASE | base, task="causal_lm")


class PersonalLmClassifierTester(EncoderTester):
    model_classes = (PersonalLmForSequenceClassification,)

    def get_config(self):
        return self.config_class(base_config=BASE | {"model_type": "bert"}, num_labels=self.num_labels)


class PersonalLmTest(CausalLMSuite, unittest.TestCase):
    model_tester_class = PersonalLmTester


class PersonalLmClassifierTest(EncoderSuite, unittest.TestCase):
    model_tester_class = PersonalLmClassifierTester
    test_all_params_have_gradient = False  # BERT's pooler is not read: the class is in the state of the last token

    def _get_trainable_model_class(self):
        return PersonalLmForSequenceClassification

    def _create_text_training_batch(self, *args, **kwargs):
        texts = super()._create_text_training_batch(*args, **kwargs)
        return texts | {"labels": texts["labels"][:, 0]}  # of a text, where transformers' are of its tokens

    def test_load_with_mismatched_shapes(self):
        # transformers also loads a body by AutoModel, which this family has none of; the head is loaded alike by
        # test_can_load_ignoring_mismatched_shapes.
        self.test_can_load_ignoring_mismatched_shapes()
