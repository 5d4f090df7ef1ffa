"""A model cut by its width: shapes, and the sum that it was."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_models.dc_ccl import DcCclForImageClassification, split_vertically
from tests.hf_models.dc_ccl.tiny_dc_ccl import base_config, images, unsettled


def base(kind):
    torch.manual_seed(0)
    return unsettled(AutoModelForImageClassification.from_config(base_config(kind)).eval())


@pytest.mark.parametrize(("ratio", "heads"), [(0.125, 1), (0.25, 2), (0.01, 1), (0.5, 4)])
def test_a_vit_is_cut_by_heads_and_mlp(ratio, heads):
    config = split_vertically(base_config("vit"), ratio)
    cloud, small = config.cloud_config, config.co_config
    assert small.num_attention_heads == heads and cloud.num_attention_heads == 8 - heads
    assert small.hidden_size == 4 * heads and small.hidden_size + cloud.hidden_size == 32
    assert small.intermediate_size == 6 * heads and small.intermediate_size + cloud.intermediate_size == 48
    assert config.control_config.to_dict() == small.to_dict() and config.control_config is not small
    assert config.shared_encoder and config.split_ratio == ratio


def test_a_resnet_is_cut_by_channels():
    config = split_vertically(base_config("resnet"), 0.25)
    assert config.co_config.hidden_sizes == [4, 8] and config.cloud_config.hidden_sizes == [12, 24]
    bottleneck = split_vertically(base_config("bottleneck"), 0.1)
    assert bottleneck.co_config.hidden_sizes == [4, 8] and bottleneck.cloud_config.hidden_sizes == [28, 56]
    at_the_stem_s_width = split_vertically(base_config("bottleneck"), 0.25)
    assert at_the_stem_s_width.co_config.hidden_sizes == [12, 16]


def without_cross_weights(model, config):
    """Zero every weight from one group of channels to the other, behind the stem."""
    groups = dict(zip(config.base_config.hidden_sizes, config.co_config.hidden_sizes))
    if config.base_config.layer_type == "bottleneck":
        groups |= {width // 4: few // 4 for width, few in groups.items()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() != 4 or name.startswith("resnet.embedder"):
                continue
            first, second = weight.shape[:2]
            if "stages.0.layers.0.layer.0." in name or "stages.0.layers.0.shortcut" in name:
                continue  # both groups read the whole stem
            few_out, few_in = groups[first], groups[second]
            weight[:-few_out, -few_in:] = 0
            weight[-few_out:, :-few_in] = 0
    return model


@pytest.mark.parametrize("kind", ["resnet", "bottleneck", "as wide as its stem"])
def test_a_resnet_without_weights_between_the_groups_is_the_sum_of_its_parts(kind):
    whole = base(kind)
    config = split_vertically(whole.config, 0.25)
    whole = without_cross_weights(whole, config).double()
    split = split_vertically(whole, 0.25)
    pixels = images().double()
    with torch.no_grad():
        torch.testing.assert_close(split(pixels).logits, whole(pixels).logits, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(split(pixels, branch="control").logits, split(pixels, branch="co").logits)


def test_a_split_vit_has_the_weights_of_its_groups():
    whole = base("vit")
    split = split_vertically(whole, 0.25)
    assert isinstance(split, DcCclForImageClassification) and not split.training
    source, cloud = whole.state_dict(), split.cloud_submodel.state_dict()
    small = split.co_submodel.state_dict()
    query = next(name for name in cloud if name.endswith(("q_proj.weight", "query.weight")))
    assert torch.equal(cloud[query], source[query][:24, :24]) and torch.equal(small[query], source[query][24:, 24:])
    tokens = split.encode(images())
    stem = whole.vit.embeddings(images())
    torch.testing.assert_close(tokens, stem)
    for submodel, kept in ((split.cloud_submodel, stem[..., :24]), (split.co_submodel, stem[..., 24:])):
        torch.testing.assert_close(submodel.vit.embeddings(stem), kept)
    assert not split.co_submodel.classifier.bias.any()


def test_the_small_side_is_small():
    split = split_vertically(base("vit"), 0.125)
    package = split.device_package()
    assert package.num_parameters() < 0.35 * split.num_parameters()
    assert split.num_parameters() < base("vit").num_parameters() * 1.2
