"""What users of transformers expect of a model, beyond its common tests, and what they are told where they err."""

import copy

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForImageClassification, CLIPConfig

from hf_models.dot_cbm import DotCbmConfig, DotCbmForImageClassification
from tests.hf_models.dot_cbm.tiny_dot_cbm import (
    BACKBONES,
    CONCEPTS,
    LABELS,
    READOUTS,
    SHAPE,
    images,
    tiny,
    tiny_config,
)


NAN = float("nan")


# --- outputs


@pytest.mark.parametrize("kind", BACKBONES)
def test_hidden_states_and_attentions_are_the_backbone_s(kind):
    model = tiny(kind)
    model.set_attn_implementation("eager")
    options = {"output_hidden_states": True, "output_attentions": True}
    expected = model.model.backbone(images(), **options)
    for found in (model(images(), **options), model.model(images(), **options)):
        assert (len(found.hidden_states), len(found.attentions)) == (3, 2)
        torch.testing.assert_close(found.hidden_states, expected.hidden_states)
        torch.testing.assert_close(found.attentions, expected.attentions)
    plain = model(images())
    assert plain.hidden_states is None and plain.attentions is None
    cached = model(patch_features=model.model.extract_features(images()), **options)
    assert cached.hidden_states is None and cached.attentions is None
    model.config.output_hidden_states = True
    assert len(model(images()).hidden_states) == 3


def test_the_first_of_a_tuple_are_the_concepts_of_the_body_and_the_classes_of_the_head():
    for readout in READOUTS[:-1]:
        model = tiny(readout=readout)
        body = model.model(images(), output_transport_plan=True, return_dict=False)
        torch.testing.assert_close(body[0], model(images()).concept_logits)
        torch.testing.assert_close(model(images(), return_dict=False)[0], model(images()).logits)
        torch.testing.assert_close(model(images(), labels=LABELS, return_dict=False)[1], model(images()).logits)


def test_maps_of_attention_that_is_not_returned_say_what_to_do():
    model = tiny(saliency="cls_attention")
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="set_attn_implementation..eager"):
        model(images())
    model.set_attn_implementation("eager")
    assert model(images()).saliency.shape == (3, 16)


# --- labels and losses


def test_classes_may_be_many_at_once_or_numbers():
    several = tiny(problem_type="multi_label_classification")
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    out = several(images(), labels=labels)
    torch.testing.assert_close(out.loss, F.binary_cross_entropy_with_logits(out.logits, labels))
    torch.testing.assert_close(several(images(), labels=labels.long()).loss, out.loss)
    number = tiny(problem_type="regression", num_labels=1)
    out = number(images(), labels=LABELS.float())
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits[:, 0], LABELS.float()))


def test_concept_labels_of_every_type_count_alike_and_wrong_shapes_are_refused():
    model = tiny()
    expected = model(images(), concept_labels=CONCEPTS).loss
    for labels in (CONCEPTS.float(), CONCEPTS.bool(), CONCEPTS.to(torch.uint8), CONCEPTS.double()):
        torch.testing.assert_close(model(images(), concept_labels=labels).loss, expected)
    for labels in (CONCEPTS[:, :4], CONCEPTS[:2], CONCEPTS[0]):
        with pytest.raises(ValueError, match=r"must be \(3, 5\)"):
            model(images(), concept_labels=labels)


# --- interventions


def test_interventions_of_another_shape_are_refused():
    model = tiny()
    for shape in ((3, 1), (3,), (2, 5), (3, 4), (1, 3, 5), (5, 3)):
        with pytest.raises(ValueError, match=r"must be \(3, 5\)"):
            model(images(), interventions=torch.full(shape, NAN))
    whole = torch.full((3, 5), NAN)
    whole[:, 2] = 1.0
    for interventions in (whole[0], whole[:1], whole.double()):
        torch.testing.assert_close(
            model(images(), interventions=interventions).logits, model(images(), interventions=whole).logits
        )


def test_concepts_that_there_are_not_are_named():
    model = tiny()
    for wrong in ("shoe", 5, -1):
        with pytest.raises(ValueError, match="there is no concept"):
            model.explain(images(), concepts=[wrong])
        with pytest.raises(ValueError, match="there is no concept"):
            model.intervention(CONCEPTS, concepts=[wrong])


# --- precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_half_precision_what_belongs_to_concepts_stays_in_fp32(tmp_path, dtype):
    whole = tiny()
    whole.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype)
    assert half.dtype == half.model.dtype == dtype and all(p.dtype == dtype for p in half.parameters())
    for name in ("model.gamma", "activation_mean", "activation_std", "activation_low", "activation_high"):
        assert torch.equal(half.state_dict()[name], whole.state_dict()[name])
    with torch.no_grad():
        out = half(images().to(dtype), output_transport_plan=True, labels=LABELS, concept_labels=CONCEPTS)
    assert out.transport_plan.dtype == out.concept_probs.dtype == out.loss.dtype == torch.float32
    torch.testing.assert_close(out.transport_plan.sum(1), half.model.gamma.expand(3, -1))
    half.set_concepts(["a", "b", "c"], torch.randn(3, 9), torch.tensor([[1, 0, 1], [0, 1, 1]]))
    assert half.model.text_embeddings.dtype == half.model.concept_bias.dtype == half.classifier.weight.dtype == dtype
    assert half.model.gamma.dtype == half.activation_mean.dtype == torch.float32
    assert half(images().to(dtype)).logits.isfinite().all()


def test_a_new_model_has_the_same_placeholders_for_texts_wherever_it_was_made():
    model = DotCbmForImageClassification(tiny_config())
    with torch.device("meta"):
        other = DotCbmForImageClassification(tiny_config())
    other.to_empty(device="cpu").init_weights()
    assert torch.equal(other.model.text_embeddings, model.model.text_embeddings)
    assert torch.linalg.matrix_rank(model.model.text_embeddings) == 5


# --- gradients


def test_lora_in_a_frozen_backbone_is_trained():
    model = tiny("vit", training_stage="joint")
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["visual_adapter"]}
    wrapped = get_peft_model(model, LoraConfig(r=2, lora_dropout=0.1, **targets)).train()
    assert all(module.training for module in wrapped.modules() if isinstance(module, torch.nn.Dropout))
    wrapped(pixel_values=images(), labels=LABELS, concept_labels=CONCEPTS).loss.backward()
    trained = {name: p.grad for name, p in wrapped.named_parameters() if p.requires_grad}
    assert len([name for name in trained if "lora_" in name]) == 2 * 2 * 2  # two layers, two places, A and B
    assert all(gradient is not None for gradient in trained.values())
    assert all(gradient.abs().sum() > 0 for name, gradient in trained.items() if "lora_B" in name)


def test_stages_and_concepts_leave_lora_its_place():
    targets = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["visual_adapter"]}
    model = tiny("vit", training_stage="joint")
    wrapped = get_peft_model(model, LoraConfig(r=2, **targets))

    def trained_in_the_backbone():
        return {name for name, p in wrapped.named_parameters() if p.requires_grad and ".backbone." in name}

    lora = trained_in_the_backbone()
    assert len(lora) == 2 * 2 * 2 and all("lora_" in name for name in lora)
    for stage, expected in (("concept", lora), ("class", set()), ("joint", lora)):
        model.set_stage(stage)
        assert trained_in_the_backbone() == expected
    model.set_concepts(model.config.concept_names, torch.randn_like(model.model.text_embeddings))
    assert trained_in_the_backbone() == lora


@pytest.mark.parametrize("stage", ["concept", "class", "joint"])
def test_gradient_reaches_the_pixels_through_what_is_frozen(stage):
    """Attribution methods ask for it, of published models too, whose stage is the last one."""
    pixels = images().requires_grad_()
    tiny(training_stage=stage)(pixels).logits.sum().backward()
    assert pixels.grad.abs().sum() > 0


def test_nothing_of_a_frozen_backbone_is_kept_for_a_backward_pass():
    found = tiny().train().model(images(), output_hidden_states=True)
    assert found.concept_logits.requires_grad and not any(state.requires_grad for state in found.hidden_states)


# --- between the stages


def test_statistics_are_taken_of_cached_features_as_lists_too():
    model, other = tiny(), tiny()
    features = model.model.extract_features(images())
    model.fit_activation_statistics([{"pixel_values": images(), "labels": LABELS}])
    other.fit_activation_statistics([{"patch_features": list(features), "concept_labels": CONCEPTS}])
    torch.testing.assert_close(other.activation_mean, model.activation_mean)
    assert (model.activation_mean != tiny().activation_mean).all()


def test_a_backbone_that_is_no_vision_transformer_is_refused():
    with pytest.raises(StrictDataclassClassValidationError, match="clip_vision_model"):
        DotCbmConfig(backbone_config=CLIPConfig().to_dict(), **copy.deepcopy(SHAPE))
    with pytest.raises(StrictDataclassClassValidationError, match="hidden_size"):
        DotCbmConfig(backbone_config={"model_type": "resnet"}, **copy.deepcopy(SHAPE))
