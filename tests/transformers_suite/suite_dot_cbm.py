"""DOT-CBM under transformers' common tests, on a backbone that is trained with it and on a frozen one."""

import unittest

import torch

from hf_models.dot_cbm.modeling_dot_cbm import DotCbmForImageClassification, DotCbmModel
from tests.transformers_suite.vision import BACKBONE_SHAPE, VisionSuite, VisionTester


class DotCbmTester(VisionTester):
    model_classes = (DotCbmModel, DotCbmForImageClassification)
    backbone = {"model_type": "vit", "intermediate_size": 37}
    config_fields = {"freeze_backbone": False, "training_stage": "joint"}
    num_concepts = 5

    def get_config(self):
        return self.config_class(
            backbone_config=BACKBONE_SHAPE | self.backbone,
            num_concepts=self.num_concepts,
            text_embedding_dim=12,
            projection_dim=16,
            num_labels=self.num_labels,
            **self.config_fields,
        )


class DotCbmFrozenTester(DotCbmTester):
    backbone = {"model_type": "dinov2_with_registers", "num_register_tokens": 2}
    config_fields = {"training_stage": "joint"}
    seq_length = DotCbmTester.seq_length + 2


class DotCbmSuite(VisionSuite):
    _is_composite = True

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DotCbmForImageClassification:
            size = len(inputs["pixel_values"]), self.model_tester.num_concepts
            inputs["concept_labels"] = torch.ones(size).tril()
        return inputs

    def test_sdpa_can_dispatch_non_composite_models(self):
        self._is_composite = False  # what transformers asks of others holds as well
        super().test_sdpa_can_dispatch_non_composite_models()


class DotCbmTest(DotCbmSuite, unittest.TestCase):
    model_tester_class = DotCbmTester


class DotCbmFrozenTest(DotCbmSuite, unittest.TestCase):
    model_tester_class = DotCbmFrozenTester

    def test_retain_grad_hidden_states_attentions(self):
        # transformers asks that gradient reaches the first hidden state; it is to end above a frozen backbone.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        outputs = DotCbmModel._from_config(config, attn_implementation="eager")(
            **inputs, output_hidden_states=True, output_attentions=True
        )
        outputs[0].sum().backward()
        self.assertEqual((len(outputs.hidden_states), len(outputs.attentions)), (3, 2))
        self.assertFalse(any(tensor.requires_grad for tensor in (*outputs.hidden_states, *outputs.attentions)))

    def check_training_gradient_checkpointing(self, gradient_checkpointing_kwargs=None):
        # transformers sets all parameters free and asks that layers run twice; frozen ones have nothing to run for.
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        inputs = self._prepare_for_class(inputs, DotCbmForImageClassification, return_labels=True)
        model = DotCbmForImageClassification(config).train()
        gradients = []
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable(activation_checkpointing_kwargs=gradient_checkpointing_kwargs)
            model.zero_grad()
            torch.manual_seed(0)
            model(**inputs).loss.backward()
            trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
            self.assertTrue(trained and not any("backbone" in name for name in trained))
            gradients.append(trained)
        torch.testing.assert_close(*gradients)
