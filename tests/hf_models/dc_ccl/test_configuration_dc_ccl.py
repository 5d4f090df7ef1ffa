"""The configurations: what survives JSON, what is refused, and what a device's lacks."""

import json

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig

from hf_models.dc_ccl import DcCclConfig, DcCclDeviceConfig, split_vertically
from tests.hf_models.dc_ccl.tiny_dc_ccl import LANGUAGE_MODELS, PAIRS, base_config, tiny_config


@pytest.mark.parametrize("kind", PAIRS)
def test_every_field_survives_json(kind, tmp_path):
    config = tiny_config(kind, control_loss="kl", id2label={index: f"class {index}" for index in range(5)})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is DcCclConfig
    for name in ("cloud_config", "co_config", "control_config", "base_config"):
        one, other = getattr(config, name), getattr(again, name)
        assert type(one) is type(other) and (one is None or one.to_diff_dict() == other.to_diff_dict())
    for name in ("shared_encoder", "split_ratio", "fusion", "control_loss", "num_labels", "id2label"):
        assert getattr(again, name) == getattr(config, name)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["co_config"]["model_type"] and stored["model_type"] == "dc_ccl"


def test_the_device_s_configuration_names_nothing_of_the_cloud_s():
    config = tiny_config("vit")
    device = config.device_config()
    assert type(device) is DcCclDeviceConfig and device.model_type == "dc_ccl_device"
    assert "cloud" not in json.dumps(device.to_dict())
    assert device.id2label == config.id2label and device.num_labels == 5
    assert device.co_config.to_dict() == config.co_config.to_dict() and device.shared_encoder
    assert device.co_config is not config.co_config


def test_labels_are_those_of_the_submodels_and_reach_them():
    names = {0: "cat", 1: "dog"}
    small = {"model_type": "resnet", "id2label": names, "label2id": {"cat": 0, "dog": 1}}
    config = DcCclConfig(cloud_config=small, co_config=small, control_config=small)
    assert config.id2label == names
    renamed = DcCclConfig(cloud_config=small, co_config=small, control_config=small, id2label={0: "a", 1: "b"})
    assert renamed.co_config.id2label == {0: "a", 1: "b"}
    wider = DcCclConfig(cloud_config=small, co_config=small, control_config=small, num_labels=7)
    assert {config.num_labels for config in wider.submodel_configs.values()} == {7}


def test_the_default_is_small_and_complete():
    config = DcCclConfig()
    assert all(c.model_type == "resnet" for c in config.submodel_configs.values())
    assert list(DcCclDeviceConfig().submodel_configs) == ["control_model", "co_submodel"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fusion": "product"}, "fusion='product'"),
        ({"control_loss": "l1"}, "control_loss='l1' is not known. Choose one of"),
        ({"split_ratio": 1.5}, "split_ratio=1.5 must lie between 0 and 1"),
        ({"control_config": None}, "no configuration of control_model"),
        ({"co_config": base_config("vit", num_labels=3)}, "num_labels differs"),
        ({"shared_encoder": True}, "shared_encoder needs a base_config"),
        ({"shared_encoder": True, "base_config": base_config("resnet")}, "cannot read the stem of a resnet"),
    ],
)
def test_what_does_not_fit_together_is_refused(fields, message):
    whole = {name: base_config("vit") for name in ("cloud_config", "co_config", "control_config")}
    with pytest.raises(StrictDataclassClassValidationError, match=message):
        DcCclConfig(**(whole | fields))


def test_wrong_types_and_nameless_submodels_are_refused():
    with pytest.raises(StrictDataclassFieldValidationError):
        DcCclConfig(shared_encoder="yes")
    with pytest.raises(ValueError, match="co_config names no model_type"):
        DcCclConfig(cloud_config=base_config("vit"), co_config={"hidden_size": 8}, control_config=base_config("vit"))


def test_vocabularies_must_be_one():
    smaller = LANGUAGE_MODELS["co_config"] | {"vocab_size": 39}
    with pytest.raises(StrictDataclassClassValidationError, match="vocab_size differs"):
        DcCclConfig(**(LANGUAGE_MODELS | {"co_config": smaller}))


def test_language_models_hand_on_their_special_tokens():
    config = DcCclConfig(**LANGUAGE_MODELS)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0) and config.vocab_size == 40
    assert config.get_text_config(decoder=True).num_hidden_layers == 3 + 2 + 2


def test_other_families_are_pointed_to_two_whole_models():
    with pytest.raises(ValueError, match="a convnext is not split here.*two whole models"):
        split_vertically(AutoConfig.for_model("convnext"))
    for ratio in (0.0, 1.0):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            split_vertically(base_config("vit"), ratio)
    with pytest.raises(ValueError, match="leaves the cloud none"):
        split_vertically(base_config("vit"), 0.99)
