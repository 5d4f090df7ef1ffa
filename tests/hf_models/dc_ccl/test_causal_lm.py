"""DC-CCL over language models: sums, caches, padding, and the package of a device."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_models.dc_ccl import DcCclDeviceForCausalLM, DcCclForCausalLM
from tests.hf_models.dc_ccl.tiny_dc_ccl import tiny_lm, tokens, windowed_lm


def generated(model, branch, **options):
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0} | options
    ids = settings.pop("input_ids", tokens())
    return model.generate(ids, branch=branch, **settings)


def test_what_is_served_is_the_sum_and_the_loss_shifts_labels():
    model, ids = tiny_lm(), tokens()
    with torch.no_grad():
        logits = {b: model(ids, branch=b).logits for b in ("serve", "device", "cloud", "control", "co")}
    assert torch.equal(logits["serve"], logits["cloud"] + logits["co"])
    assert torch.equal(logits["device"], logits["control"] + logits["co"])
    loss = model(ids, labels=ids).loss
    expected = F.cross_entropy(logits["serve"][:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    assert model(ids, logits_to_keep=1).logits.shape == (2, 1, 40)


@pytest.mark.parametrize("branch", ["serve", "device"])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.compatibility("Cache: dynamic", method="dc_ccl", only={"cache": None})
@pytest.mark.compatibility("Cache: static", method="dc_ccl", only={"cache": "static"})
def test_every_cache_generates_what_no_cache_does(branch, cache):
    model = tiny_lm()
    expected = generated(model, branch, use_cache=False)
    assert torch.equal(generated(model, branch, cache_implementation=cache), expected)
    assert expected.shape == (2, 14)


@pytest.mark.parametrize("windows", [(4, 4), (8, 4), (4, 12), (None, 4), (4, None)])
@pytest.mark.parametrize("cache", [None, "static", "offloaded_static"])
def test_submodels_may_attend_to_windows_of_different_lengths(windows, cache):
    model = windowed_lm(*windows)
    for branch in ("serve", "device"):
        expected = generated(model, branch, use_cache=False)
        assert torch.equal(generated(model, branch, cache_implementation=cache), expected)
    with torch.no_grad():
        ids = tokens(2, 14)
        found = model(ids[:, :10], use_cache=True)
        logits = model(ids[:, 10:], past_key_values=found.past_key_values, use_cache=True).logits
        torch.testing.assert_close(logits, model(ids).logits[:, 10:], rtol=1e-4, atol=1e-4)


def test_a_layer_keeps_no_more_than_its_own_window():
    model = windowed_lm(8, 4)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cache = model.generate(tokens(), return_dict_in_generate=True, **options).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers[:5]] == [3, 3, 7, 7, 7]
    with torch.no_grad():
        cache = model(tokens(2, 14), use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers[:5]] == [3, 3, 7, 7, 7]


def test_tied_weights_are_exchanged_once():
    model = tiny_lm()
    state, head = model.co_state(), model.head_state()
    assert "lm_head.weight" in model.co_submodel.state_dict() and "lm_head.weight" not in state
    assert list(head) == ["transformer.wte.weight"]
    other = {name: tensor + 1 for name, tensor in state.items()}
    model.load_co_update(other)
    assert torch.equal(model.co_submodel.lm_head.weight, other["transformer.wte.weight"])


@pytest.mark.compatibility("Beam search", method="dc_ccl")
def test_branches_generate_different_text_and_beams_reorder_all_layers():
    model = tiny_lm()
    assert not torch.equal(generated(model, "serve"), generated(model, "device"))
    for branch in ("serve", "device"):
        beams = generated(model, branch, num_beams=3)
        assert torch.equal(beams, generated(model, branch, num_beams=3, use_cache=False))


@pytest.mark.parametrize("branch", ["serve", "device"])
@pytest.mark.compatibility("Padding", method="dc_ccl", note="on the left")
def test_left_padding_changes_nothing(branch):
    model, ids = tiny_lm(), tokens(1, 5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(8)[None] >= 3).long()
    alone = generated(model, branch, input_ids=ids)[:, 5:]
    assert torch.equal(generated(model, branch, input_ids=padded, attention_mask=mask)[:, 8:], alone)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        found = model(padded, attention_mask=mask, position_ids=positions, branch=branch).logits[:, 3:]
        torch.testing.assert_close(found, model(ids, branch=branch).logits, rtol=1e-4, atol=1e-4)


def test_a_cache_of_one_step_after_the_other():
    model, ids = tiny_lm(), tokens()
    with torch.no_grad():
        first = model(ids[:, :4], use_cache=True)
        assert first.past_key_values.get_seq_length() == 4
        second = model(ids[:, 4:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(second.logits, model(ids).logits[:, 4:], rtol=1e-4, atol=1e-4)
    assert first.past_key_values.get_seq_length() == 6


def test_only_the_co_submodel_learns_in_its_phase():
    model, ids = tiny_lm().train(), tokens()
    model.set_phase("co")
    model(ids, labels=ids, branch="device").loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.startswith("co_submodel."), name
    assert not model.control_model.training and model.co_submodel.training


def test_a_device_package_generates_by_itself(tmp_path):
    model = tiny_lm()
    package = model.device_package()
    assert isinstance(package, DcCclDeviceForCausalLM)
    assert not [name for name in package.state_dict() if name.startswith("cloud")]
    assert not any(tensor.is_meta for tensor in (*package.parameters(), *package.buffers()))
    expected = generated(model, "device")
    assert torch.equal(generated(package, None), expected)
    package.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, DcCclDeviceForCausalLM) and torch.equal(generated(again, None), expected)


@pytest.mark.compatibility("Auto classes", method="dc_ccl")
def test_saving_keeps_ties_and_logits(tmp_path):
    model = tiny_lm()
    model.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(again, DcCclForCausalLM) and not info["missing_keys"] and not info["unexpected_keys"]
    assert again.co_submodel.lm_head.weight is again.co_submodel.transformer.wte.weight
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)


def test_resizing_reaches_every_vocabulary():
    model = tiny_lm()
    model.resize_token_embeddings(44)
    assert model(tokens()).logits.shape[-1] == model.config.vocab_size == 44
    assert model(tokens(), branch="control").logits.shape[-1] == 44


@pytest.mark.compatibility("bf16 inference", method="dc_ccl")
def test_half_precision():
    model = tiny_lm().to(torch.bfloat16)
    assert generated(model, "serve").shape == (2, 14) and model(tokens()).logits.dtype == torch.bfloat16
