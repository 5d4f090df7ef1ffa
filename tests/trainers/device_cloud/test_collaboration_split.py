"""Split inference: the halves are the whole, and what crosses is shape times dtype."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageClassification

from tests.trainers.device_cloud.tiny_collaboration import CUT, tiny_task
from trainers.device_cloud import DeviceBudget, DeviceBudgetError
from trainers.device_cloud.collaboration_split import SplitClassifier, SplitInference
from trainers.device_cloud.collaboration_task import pixels_of
from trainers.federated.core import WireMeter, pack


SMALL = {"num_labels": 4, "num_channels": 1, "image_size": 8}
TRANSFORMER = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 16}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 2]}
CASES = [
    ("vit", SMALL | TRANSFORMER | {"patch_size": 4}),
    ("deit", SMALL | TRANSFORMER | {"patch_size": 4}),
    ("resnet", {"num_labels": 4, "num_channels": 1, "embedding_size": 8, "layer_type": "basic"} | STAGES),
    ("convnext", SMALL | STAGES | {"num_stages": 2, "patch_size": 2}),
    ("swin", SMALL | {"embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "patch_size": 2, "window_size": 2}),
]


def classifier(kind, sizes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **sizes)
    config.architectures = ["DeiTForImageClassification"] if kind == "deit" else None  # of two classes
    return AutoModelForImageClassification.from_config(config).eval()


def blocks_of(model):
    """Every block of every list of blocks: where one would cut."""
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    return [f"{name}.{index}" for name in lists for index in range(len(model.get_submodule(name)))]


@pytest.mark.parametrize(("kind", "sizes"), CASES, ids=[kind for kind, _ in CASES])
def test_both_halves_are_the_whole_at_every_block(kind, sizes):
    model = classifier(kind, sizes)
    images = torch.randn(3, 1, 8, 8)
    whole, cuts = model(images).logits, 0
    for cut in blocks_of(model):
        split = SplitClassifier(model, cut, torch.zeros(1, 1, 8, 8))
        activations = split.lower(images)
        assert torch.equal(split.upper(activations), whole), cut
        assert torch.equal(split(images).logits, whole)
        cuts += 1
    assert cuts >= 2
    assert torch.equal(model(images).logits, whole), "the model is as it was"


@torch.no_grad()
def test_each_half_reads_its_own_weights_and_no_others():
    model = classifier(*CASES[0])
    images = torch.randn(2, 1, 8, 8)
    split = SplitClassifier(model, "vit.layers.0", torch.zeros(1, 1, 8, 8))
    activations, whole = split.lower(images), model(images).logits
    half = split.device_half()
    below = {id(parameter) for parameter in half.parameters()}
    above = [parameter for parameter in model.parameters() if id(parameter) not in below]
    assert below and above
    for parameter in above:
        parameter.add_(torch.nan)
    assert torch.equal(half(images), activations)
    model.load_state_dict(classifier(*CASES[0]).state_dict())
    for parameter in half.parameters():
        parameter.add_(torch.nan)
    assert torch.equal(split.upper(activations), whole)


def test_places_where_no_cut_is_possible_are_refused():
    model = classifier(*CASES[0])
    zero = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="has no module 'vit.blocks.0'. Some of its modules: vit"):
        SplitClassifier(model, "vit.blocks.0", zero)
    with pytest.raises(ValueError, match="needs more than what vit.layers.1.attention returns"):
        SplitClassifier(model, "vit.layers.1.attention", zero)
    model.unused = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match="a forward never comes to unused"):
        SplitClassifier(model, "unused", zero)


def test_split_inference_serves_the_whole_model_and_sends_shape_times_dtype(tmp_path):
    task, meter = tiny_task(tmp_path), WireMeter()
    served = SplitInference(cut=CUT).train(task, meter, None)
    model = task.model().eval()
    images = pixels_of(task.data.test)
    assert torch.allclose(served.logits, model(images, branch="cloud").logits, atol=1e-5)
    assert served.device_logits is None and served.cloud_calls == len(images)
    split = SplitClassifier(model, CUT, images[:1], branch="cloud")
    (activation,) = split.lower(images[:1])
    up = len(pack({"activations": activation}))
    assert meter.by_purpose()["serving"] == {"up": 40 * up, "down": 40 * len(pack({"logits": torch.zeros(4)}))}
    header = 8 + int.from_bytes(pack({"activations": activation})[:8], "little")
    assert up - header == math.prod(activation.shape) * activation.element_size()
    half = split.device_half()
    assert meter.by_purpose()["lower half"] == {"up": 0, "down": len(pack(half.state_dict()))}
    assert served.cost.parameters == sum(p.numel() for p in half.parameters()) < model.num_parameters()
    assert served.cost.flops > 0


def test_split_learning_trains_the_upper_half_alone(tmp_path):
    task, meter = tiny_task(tmp_path), WireMeter()
    served = SplitInference(cut=CUT, learn=True).train(task, meter, None)
    before = SplitInference(cut=CUT).train(task, WireMeter(), None)
    assert not torch.allclose(served.logits, before.logits)
    sent = meter.by_purpose()["activations and labels"]
    split = SplitClassifier(task.model(), CUT, torch.zeros(1, 1, 8, 8), branch="cloud")
    rows = split.lower(pixels_of(task.data.device))
    labels = torch.zeros(len(rows), dtype=torch.long)
    assert sent == {"up": len(pack({"shared_features": rows.detach(), "labels": labels})), "down": 0}
    again = SplitInference(cut=CUT, learn=True).train(task, WireMeter(), None)
    assert torch.equal(again.logits, served.logits)
    with pytest.raises(DeviceBudgetError):
        SplitInference(cut=CUT).train(task, empty := WireMeter(), DeviceBudget(max_parameters=3))
    assert empty.totals() == {"up": 0, "down": 0}
