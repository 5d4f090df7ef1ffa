"""DC-CCL of images: what its branches add, what its phases train, and what a device gets."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification, pipeline

from hf_models.dc_ccl import DcCclConfig, DcCclDeviceModel, DcCclForImageClassification
from tests.hf_models.dc_ccl.tiny_dc_ccl import LABELS, PAIRS, images, tiny, tiny_config


def answers(model, **options):
    with torch.no_grad():
        return {b: model(images(), branch=b, **options).logits for b in ("serve", "device", "cloud", "control", "co")}


# --- the sum


@pytest.mark.parametrize("kind", PAIRS)
def test_what_is_served_is_the_sum_exactly(kind):
    model = tiny(kind)
    logits = answers(model)
    assert torch.equal(logits["serve"], logits["cloud"] + logits["co"])
    assert torch.equal(logits["device"], logits["control"] + logits["co"])
    assert torch.equal(model(images()).logits, logits["serve"])
    assert logits["serve"].shape == (3, 5) and not torch.equal(logits["serve"], logits["device"])


@pytest.mark.parametrize("kind", ["vit", "whole"])
def test_the_loss_is_cross_entropy_and_ignores_what_has_no_label(kind):
    model = tiny(kind)
    logits = answers(model)["device"]
    loss = model(images(), labels=LABELS, branch="device").loss
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, LABELS))
    some = torch.tensor([2, -100, 4])
    expected = torch.nn.functional.cross_entropy(logits[[0, 2]], LABELS[[0, 2]])
    torch.testing.assert_close(model(images(), labels=some, branch="device").loss, expected)


def test_cached_logits_and_features_take_the_place_of_what_gave_them():
    model = tiny("resnet")
    logits, features = answers(model), model.encode(images())
    for branch, frozen in (("device", "control"), ("serve", "cloud")):
        found = model(images(), branch=branch, control_logits=logits[frozen]).logits
        assert torch.equal(found, logits[branch])
        assert torch.equal(model(shared_features=features, branch=branch).logits, logits[branch])
    with pytest.raises(ValueError, match="adds nothing"):
        model(images(), branch="co", control_logits=logits["control"])
    with pytest.raises(ValueError, match="one of the two"):
        model(images(), shared_features=features)


def test_unknown_branches_are_named():
    with pytest.raises(ValueError, match="branch 'both' is not known to a DcCclForImageClassification"):
        tiny()(images(), branch="both")
    with pytest.raises(ValueError, match="not known to a DcCclDeviceModel. Choose one of .'device', 'control', 'co'"):
        tiny().device_package()(images(), branch="serve")


# --- phases


@pytest.mark.parametrize("kind", PAIRS)
def test_only_what_a_phase_trains_gets_gradients(kind):
    model = tiny(kind).train()
    learned = {"cloud": ("cloud_submodel", "shared_encoder"), "control": ("control_model",), "co": ("co_submodel",)}
    for phase, parts in learned.items():
        model.zero_grad()
        model.set_phase(phase)
        branch = "device" if phase == "co" else phase
        model(images(), labels=LABELS, branch=branch).loss.backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith(parts), (phase, name)
            assert parameter.requires_grad == name.startswith(parts)


def test_the_head_phase_trains_the_last_linear_layer():
    for kind in PAIRS:
        model = tiny(kind).train()
        model.set_phase("head")
        model(images(), labels=LABELS, branch="device").loss.backward()
        learned = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        assert len(learned) == 2 and all(name.startswith("co_submodel.classifier") for name in learned)
        assert {f"co_submodel.{name}" for name in model.head_state()} == set(learned)


def test_frozen_parts_stay_in_eval_mode_and_their_batch_norms_do_not_move():
    model = tiny("resnet")
    model.set_phase("co")
    model.train()
    before = copy.deepcopy(model.state_dict())
    model(images(), labels=LABELS, branch="device")
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all(name.startswith("co_submodel.") for name in moved)
    assert model.training and model.co_submodel.training and not model.control_model.training
    model.eval()
    assert not model.co_submodel.training
    with pytest.raises(ValueError, match="phase 'fourth' is not known"):
        model.set_phase("fourth")
    with pytest.raises(ValueError, match="has no cloud submodel"):
        model.device_package().set_phase("cloud")


def test_a_perfect_control_model_gives_the_gradients_of_the_true_one():
    """G = F_c: phase 3 is training with the large model itself."""
    config = tiny_config("vit")
    fields = {name: config.cloud_config.to_dict() for name in ("cloud_config", "control_config")}
    perfect = type(config)(
        **fields,
        co_config=config.co_config.to_dict(),
        base_config=config.base_config.to_dict(),
        shared_encoder=True,
    )
    torch.manual_seed(0)
    model = DcCclForImageClassification(perfect).double().train()
    model.control_model.load_state_dict(model.cloud_submodel.state_dict())
    gradients = []
    model.set_phase("co")
    for branch in ("serve", "device"):
        model.zero_grad()
        model(images().double(), labels=LABELS, branch=branch).loss.backward()
        gradients.append([p.grad.clone() for p in model.co_submodel.parameters() if p.grad is not None])
    assert gradients[0] and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_the_control_model_leaves_no_graph():
    model = tiny("vit").train()
    model.set_phase("co")
    seen = []
    model.control_model.register_forward_hook(lambda m, i, output: seen.append(output.logits.requires_grad))
    assert model(images(), labels=LABELS, branch="device").loss.requires_grad
    assert seen == [False]


# --- updates


def test_an_update_has_no_integers_and_is_taken_as_a_whole_or_not():
    model, other = tiny("resnet"), tiny("resnet")
    state = {name: tensor + 1 for name, tensor in other.co_state().items()}
    assert state and all(tensor.is_floating_point() for tensor in state.values())
    assert any(name.endswith("running_mean") for name in state)
    model.load_co_update(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.co_state().items())
    bad = dict(state)
    key = next(iter(bad))
    bad[key] = bad[key][:-1]
    for update, message in ((bad, "has shape"), ({key: state[key]}, "missing")):
        with pytest.raises(ValueError, match=message):
            other.load_co_update({n: t * 2 for n, t in update.items()})
        assert all(torch.equal(tensor + 1, state[name]) for name, tensor in other.co_state().items())


# --- the package of a device


@pytest.mark.parametrize("kind", PAIRS)
def test_a_device_package_holds_nothing_of_the_cloud(kind, tmp_path):
    model = tiny(kind)
    package = model.device_package()
    assert isinstance(package, DcCclDeviceModel)
    expected = answers_of_device(model)
    assert all(torch.equal(package(images(), branch=b).logits, logits) for b, logits in expected.items())
    assert torch.equal(package(images()).logits, expected["device"])
    package.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [key for key in stored if "cloud" in key]
    parts = [model.control_model, model.co_submodel] + ([model.shared_encoder] if model.shared_encoder else [])
    tensors = [tensor for part in parts for tensor in part.state_dict().values()]
    wanted = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert wanted < size < wanted + 200 * len(tensors) + 1000
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert isinstance(again, DcCclDeviceModel) and torch.equal(again(images()).logits, expected["device"])


def answers_of_device(model):
    with torch.no_grad():
        return {branch: model(images(), branch=branch).logits for branch in ("device", "control", "co")}


def test_a_package_is_a_copy_and_draws_no_random_numbers():
    model = tiny("vit")
    state = torch.get_rng_state()
    package = model.device_package()
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(tensor.is_meta for tensor in package.state_dict().values())
    with torch.no_grad():
        package.co_submodel.classifier.weight.zero_()
    assert model.co_submodel.classifier.weight.any()
    assert all(parameter.requires_grad for parameter in package.parameters())


# --- with transformers


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.compatibility("Auto classes", method="dc_ccl")
def test_a_saved_model_gives_the_same_logits(kind, tmp_path):
    model = tiny(kind)
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, DcCclForImageClassification)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected = answers(model)
    assert all(torch.equal(logits, expected[branch]) for branch, logits in answers(again).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.compatibility("bf16 inference", method="dc_ccl")
def test_half_precision(dtype, tmp_path):
    model = tiny("vit").to(dtype)
    out = model(images().to(dtype), labels=LABELS)
    assert out.logits.dtype == dtype and out.loss.dtype == torch.float32
    torch.testing.assert_close(out.logits.float(), tiny("vit")(images()).logits, rtol=0.1, atol=0.25)
    assert model.device_package().dtype == dtype
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.dtype == dtype and torch.equal(again(images().to(dtype)).logits, out.logits)
    single = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    assert single.co_submodel.dtype == single.shared_encoder.dtype == torch.float32


@pytest.mark.compatibility("Attention: eager and SDPA", method="dc_ccl")
def test_both_attention_backends_agree_and_reach_every_submodel():
    model = tiny("vit")
    expected = answers(model)
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        for submodel in (model.cloud_submodel, model.co_submodel, model.control_model):
            assert submodel.config._attn_implementation == backend
        for branch, logits in answers(model).items():
            torch.testing.assert_close(logits, expected[branch], rtol=1e-5, atol=1e-5)
    eager = AutoModelForImageClassification.from_config(tiny_config("vit"), attn_implementation="eager")
    assert eager.co_submodel.config._attn_implementation == "eager"


@pytest.mark.compatibility("Gradient checkpointing", method="dc_ccl")
def test_gradient_checkpointing_changes_nothing():
    model = tiny("vit").train()
    model.set_phase("co")
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.co_submodel.vit.layers[0].gradient_checkpointing
        model.zero_grad()
        model(images(), labels=LABELS, branch="device").loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_missing_in_a_checkpoint_is_initialised(tmp_path):
    model = tiny("vit")
    state = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("cloud_submodel.")}
    model.save_pretrained(tmp_path, state_dict=state)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    for name, tensor in again.state_dict().items():
        assert tensor.isfinite().all() and tensor.abs().max() < 10, name
    assert torch.equal(again.cloud_submodel.classifier.weight, model.cloud_submodel.classifier.weight)
    assert 0.05 < again.shared_encoder.stem.position_embeddings.std() < 0.4


@pytest.mark.compatibility('pipeline("image-classification")', method="dc_ccl")
def test_a_pipeline_serves_it(tmp_path):
    from PIL import Image
    from transformers import ViTImageProcessorPil

    model = tiny("vit")
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    found = classify(Image.new("RGB", (20, 24), (200, 10, 10)), top_k=5)
    assert {row["label"] for row in found} == set(model.config.id2label.values())


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("convnext", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}),
        ("mobilenet_v2", {"depth_multiplier": 0.25}),
        ("efficientnet", {"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}),
    ],
)
def test_any_image_classifier_may_be_on_either_side(kind, fields):
    small = AutoConfig.for_model(kind, num_labels=5, **fields)
    large = tiny_config("whole").co_config
    configs = {"cloud_config": large.to_dict(), "co_config": small.to_dict(), "control_config": small.to_dict()}
    for mixed in (configs, configs | {"cloud_config": small.to_dict(), "co_config": large.to_dict()}):
        model = DcCclForImageClassification(DcCclConfig(**mixed)).train()
        model.set_phase("co")
        model(torch.randn(2, 3, 64, 64), labels=torch.tensor([0, 1]), branch="device").loss.backward()
        assert all(p.grad is not None for p in model.co_submodel.parameters())
        assert model.head_state()


def test_after_the_phases_everything_trains_again():
    model = tiny("resnet").train()
    model.set_phase("head")
    assert not model.cloud_submodel.training
    model.train_all()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval().train_all()
    assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.train().modules())
