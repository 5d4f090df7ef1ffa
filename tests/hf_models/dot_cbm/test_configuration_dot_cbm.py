"""The config: what it takes, what it refuses and how it comes back."""

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, Dinov2Config

from hf_models.dot_cbm import DotCbmConfig
from tests.hf_models.dot_cbm.tiny_dot_cbm import BACKBONES, backbone_config, tiny_config


EVERY_FIELD = {
    "freeze_backbone": False,
    "image_size": [16, 24],
    "concept_names": ["a", "b", "c"],
    "num_concepts": 3,
    "concept_groups": {"ab": [0, 1]},
    "text_embedding_dim": 5,
    "concept_encoder": "an encoder",
    "projection_dim": 7,
    "adapter_layers": 2,
    "adapter_dropout": 0.1,
    "readout": "topk",
    "readout_topk": 3,
    "cem_dim": 4,
    "initial_scale": 5.0,
    "sinkhorn_eps": 0.2,
    "sinkhorn_iterations": 11,
    "sinkhorn_gradient": "unrolled",
    "sinkhorn_rho": 2.0,
    "saliency": "contrast",
    "saliency_temperature": 0.7,
    "concept_prior": "paper",
    "concept_prior_temperature": 0.3,
    "marginal_floor": 1e-5,
    "orth_loss": "squared",
    "lambda_vop": 0.1,
    "lambda_top": 0.3,
    "lambda_concept": 0.5,
    "lambda_class": 0.9,
    "training_stage": "joint",
    "class_inputs": "true",
    "intervention_range": [0.1, 0.9],
    "heatmap_threshold": 0.5,
    "initializer_range": 0.01,
}


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_field_comes_back(tmp_path, kind):
    fields = {"backbone_config": backbone_config(kind), **EVERY_FIELD}
    assert set(DotCbmConfig.__annotations__) == set(fields)
    config = DotCbmConfig(**fields, id2label={0: "x", 1: "y"})
    default = DotCbmConfig()
    assert all(getattr(config, name) != getattr(default, name) for name in EVERY_FIELD)
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DotCbmConfig and again.to_dict() | {"_name_or_path": ""} == config.to_dict()
    assert {name: getattr(again, name) for name in EVERY_FIELD} == EVERY_FIELD
    assert again.backbone_config.model_type == kind and again.hidden_size == 24 and again.num_labels == 2


def test_the_default_is_the_paper_s_backbone():
    config = DotCbmConfig(concept_names=["a"])
    assert isinstance(config.backbone_config, Dinov2Config) and config.hidden_size == 1024
    assert config.input_size == (252, 252) and config.patch_size == (14, 14)
    assert (config.lambda_vop, config.lambda_top, config.lambda_concept) == (0.15, 0.2, 0.8)


def test_names_and_their_number_give_each_other():
    assert DotCbmConfig(concept_names=["a", "b", "c"]).num_concepts == 3
    assert len(set(DotCbmConfig(num_concepts=4).concept_names)) == 4
    assert DotCbmConfig().num_concepts == 2


def test_a_linear_probe_has_no_concept_stage():
    assert tiny_config(readout="linear_probe").training_stage == "class"
    assert tiny_config(readout="linear_probe", training_stage="joint").training_stage == "joint"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"readout": "max"}, "readout='max'"),
        ({"saliency": "cls"}, "saliency='cls'"),
        ({"concept_prior": "none"}, "concept_prior='none'"),
        ({"sinkhorn_gradient": "no"}, "sinkhorn_gradient"),
        ({"orth_loss": "abs"}, "orth_loss"),
        ({"training_stage": "two"}, "training_stage"),
        ({"class_inputs": "logits"}, "class_inputs"),
        ({"concept_names": ["a", "a"], "concept_groups": None}, "repeats"),
        ({"num_concepts": 3}, "5 concept_names"),
        ({"concept_groups": {"hat": [0, 5]}}, "0..4"),
        ({"concept_groups": {"hat": []}}, "one or more"),
        ({"sinkhorn_eps": 0.0}, "sinkhorn_eps"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations"),
        ({"sinkhorn_rho": -1.0}, "sinkhorn_rho"),
        ({"saliency_temperature": 0.0}, "saliency_temperature"),
        ({"adapter_layers": 0}, "adapter_layers"),
        ({"adapter_dropout": 1.0}, "adapter_dropout"),
        ({"heatmap_threshold": 0.0}, "heatmap_threshold"),
        ({"marginal_floor": 0.1}, "marginal_floor"),
        ({"intervention_range": [0.9, 0.1]}, "intervention_range"),
        ({"backbone_config": {"hidden_size": 8}}, "model_type"),
    ],
)
def test_what_does_not_fit_is_refused(fields, message):
    with pytest.raises((StrictDataclassClassValidationError, ValueError), match=message):
        tiny_config(**fields)


def test_siglip_has_no_cls_token_to_take_attention_from():
    with pytest.raises(StrictDataclassClassValidationError, match="contrast"):
        tiny_config("siglip_vision_model", saliency="cls_attention")


def test_a_wrong_type_is_refused():
    with pytest.raises(StrictDataclassFieldValidationError):
        tiny_config(sinkhorn_iterations="many")
