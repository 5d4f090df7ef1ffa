"""The small backbone, and probes that tell local tokens from global ones."""

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from tests.trainers.recipes.tiny_bottleneck import tiny_features
from trainers.recipes.dot_cbm_backbone import (
    BackboneArguments,
    Locality,
    ViTForTags,
    balanced_accuracy,
    load_backbone,
    locality,
    one_hot,
    part_under_patch,
    require_local,
    ridge,
    small_vit_config,
)
from trainers.recipes.dot_cbm_features import Features


def test_ridge_is_least_squares_where_its_strength_is_nothing():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(50, 3)), rng.normal(size=(3, 2))
    fitted = ridge(x, x @ w + 5.0, strength=1e-12)
    new = rng.normal(size=(4, 3))
    np.testing.assert_allclose(fitted(new), new @ w + 5.0, rtol=1e-6)
    # strong: what is left is the constant, which is penalised as well
    assert np.abs(ridge(x, x @ w, strength=1e9)(new)).max() < 1e-6


def test_a_balanced_ridge_does_not_drown_the_rare_class():
    x = np.array([[0.0]] * 99 + [[1.0]])
    targets = one_hot(np.array([0] * 99 + [1]))
    scores = ridge(x, targets, balance=True)(np.array([[0.0], [1.0]]))
    np.testing.assert_allclose(scores, np.eye(2), atol=0.01)


def test_balanced_accuracy_by_hand():
    scores = np.eye(3)[[0, 0, 0, 1, 2]]
    assert balanced_accuracy(scores, np.array([0, 0, 0, 1, 1])) == pytest.approx((1 + 0.5) / 2)


def test_the_part_under_a_patch_by_hand():
    parts = np.zeros((1, 2, 4, 4), dtype=bool)
    parts[0, 0, :2, :2] = True  # all of the first patch
    parts[0, 1, :1, 2:3] = True  # a quarter of the second
    parts[0, 1, 2:, :1] = True  # half of the third
    assert part_under_patch(parts, (2, 2)).tolist() == [[1, 0, 2, 0]]


def probed(kind: str) -> Locality:
    """Tokens that say what lies under them, and nothing or everything else."""
    rng = np.random.default_rng(0)
    features, parts = [], []
    for _ in range(2):
        under = rng.integers(0, 3, size=(60, 16)) * (rng.random((60, 16)) < 0.5)
        concepts = np.stack([(under == 1).sum(1) > 2, (under == 2).sum(1) > 2], axis=1).astype(int)
        patches = np.concatenate([np.eye(3)[under], np.zeros((60, 16, 2))], axis=2)
        if kind == "global":
            patches[..., 3:] = concepts[:, None]
        if kind == "blind":
            patches[:] = 0
        tokens = (patches[:, 0], patches + 0.01 * rng.normal(size=patches.shape))
        labels = torch.zeros(60, dtype=torch.long)
        features.append(Features(tokens, labels, torch.tensor(concepts), (under > 0).astype(float), (4, 4)))
        parts.append(under)
    return locality(*features, tuple(parts))


def test_probes_tell_local_from_global_from_blind_tokens():
    local, everywhere, blind = (probed(kind) for kind in ("local", "global", "blind"))
    assert local.chance == pytest.approx(1 / 3)
    assert local.part_probe > 0.99 and everywhere.part_probe > 0.99 and abs(blind.part_probe - 1 / 3) < 0.1
    assert abs(local.remote_auc - 0.5) < 0.2 and everywhere.remote_auc > 0.99


def test_without_background_nothing_remote_can_be_probed():
    features = tiny_features()
    features.foreground[:] = 1.0
    under = np.tile([0, 1, 1, 2], (12, 1))
    found = locality(features, features, (under, under))
    assert np.isnan(found.remote_auc) and found.chance == pytest.approx(1 / 3)


def test_tokens_that_are_not_local_are_refused_and_knowing_ones_warned_of(caplog):
    from trainers.recipes import dot_cbm_backbone

    args = BackboneArguments(min_part_probe=0.4)
    with pytest.raises(ValueError, match=r"balanced accuracy of 0.39 \(chance 0.14\), below --min_part_probe 0.4"):
        require_local(Locality(0.39, 1 / 7, 0.6), args)
    said = []
    dot_cbm_backbone.logger.warning, kept = said.append, dot_cbm_backbone.logger.warning
    try:
        require_local(Locality(0.5, 1 / 7, 0.95), args)
        require_local(Locality(0.5, 1 / 7, 0.6), args)
    finally:
        dot_cbm_backbone.logger.warning = kept
    assert len(said) == 1 and "ROC-AUC 0.95" in said[0]


def tagger():
    torch.manual_seed(0)
    args = BackboneArguments(backbone_hidden_size=16, backbone_layers=1)
    config = small_vit_config(args, 32)
    config.num_labels = 3
    return ViTForTags(config)


def test_the_small_vit_learns_tags_pixels_and_context():
    model, pixels = tagger(), torch.randn(4, 3, 32, 32)
    tags = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]])
    output = model.eval()(pixels, labels=tags)
    assert output.logits.shape == (4, 3) and model(pixels).loss is None
    model.train()
    torch.manual_seed(1)
    with_context = model(pixels, labels=tags).loss
    assert with_context > output.loss
    with_context.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_the_context_is_the_whole_of_it_for_a_patch_that_looks_at_nobody():
    model = tagger()
    with torch.no_grad():
        for layer in model.vit.layers:
            for name, parameter in layer.named_parameters():
                if "attention" in name:
                    parameter.zero_()
    pixels = torch.randn(4, 3, 32, 32)
    patches = model.vit(pixels).last_hidden_state[:, 1:]
    torch.testing.assert_close(model._context_loss(pixels, patches), torch.zeros(()), rtol=0, atol=1e-10)


def test_of_a_model_of_images_and_texts_the_vision_part_is_taken(tmp_path):
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = CLIPConfig(
        vision_config=shape | {"image_size": 32, "patch_size": 16}, text_config=shape | {"vocab_size": 20}
    )
    whole = CLIPModel(config)
    whole.save_pretrained(tmp_path)
    backbone = load_backbone(str(tmp_path))
    assert backbone.config.model_type == "clip_vision_model"
    ours = backbone.state_dict()
    assert ours
    for name, tensor in whole.state_dict().items():
        if name.startswith("vision_model."):
            same = ours.get(name, ours.get(name.removeprefix("vision_model.")))
            assert same is not None and torch.equal(same, tensor)
