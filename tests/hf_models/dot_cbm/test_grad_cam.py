"""Grad-CAM against a closed form, and against numerical derivatives on every backbone."""

import pytest
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_models.dot_cbm import grad_cam
from hf_models.dot_cbm.grad_cam import last_block
from tests.hf_models.dot_cbm.tiny_dot_cbm import BACKBONES, backbone_config, images, tiny


class Untouched(GradientCheckpointingLayer):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def test_of_a_linear_head_on_the_mean_patch_it_is_the_head_s_weight_at_each_patch():
    model = tiny(backbone_config=backbone_config("siglip_vision_model", vision_use_head=False), readout="vanilla")
    backbone = model.model.backbone
    backbone.encoder.layers[-1], backbone.post_layernorm = Untouched(), nn.Identity()
    _, patches = model.model.extract_features(images())
    expected = (patches @ model.model.concept_projection.weight.T).relu() / 16
    found = grad_cam(model, images())
    torch.testing.assert_close(found, expected.detach())
    # That is also the first-order map of the read-out.
    torch.testing.assert_close(found, model(images(), output_transport_plan=True).concept_maps / 16)


CASES = [*((kind, "vanilla") for kind in BACKBONES), ("dinov2", "cem"), ("vit", "dot"), ("vit", "mean")]


@pytest.mark.parametrize(("kind", "readout"), CASES)
def test_its_weights_are_the_mean_derivatives(kind, readout):
    model = tiny(kind, readout=readout).double()
    pixels, entered = images(2).double(), []
    prefix = {"dinov2_with_registers": 5, "siglip_vision_model": 0}.get(kind, 1)

    def logits(change):
        """Concept logits with `change (T, D)` added to what enters the last block."""

        def add(block, args):
            entered.append(args[0].detach())
            return (args[0] + change, *args[1:])

        handle = last_block(model.model.backbone).register_forward_pre_hook(add)
        with torch.no_grad():
            out = model(pixels).concept_logits
        handle.remove()
        return out

    width = model.config.hidden_size
    logits(0.0)
    hidden, step, alpha = entered[0], 1e-6, []
    for direction in torch.eye(width, dtype=torch.float64):
        moved = torch.zeros(hidden.shape[1], width, dtype=torch.float64)
        moved[prefix:] = step * direction
        alpha.append((logits(moved) - logits(-moved)) / (2 * step) / 16)  # the sum over patches, all moved at once
    weights = torch.stack(alpha, dim=-1)  # (batch, M, D)
    expected = torch.einsum("bnd,bmd->bnm", hidden[:, prefix:], weights.to(hidden.dtype)).relu()
    found = grad_cam(model, pixels)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-5)
    assert found.shape == (2, 16, 5) and (found > 0).any()


def test_it_leaves_the_model_as_it_was():
    model = tiny(readout="vanilla").train()
    before = model(images()).concept_logits
    maps = grad_cam(model, images(2, 32, 48), concepts=[3, 1])
    assert maps.shape == (2, 24, 2) and not maps.requires_grad
    torch.testing.assert_close(maps, grad_cam(model.model, images(2, 32, 48))[..., [3, 1]])
    assert model.training and not model.model.backbone.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not last_block(model.model.backbone)._forward_pre_hooks
    torch.testing.assert_close(model(images()).concept_logits, before)
    assert model.heatmaps(maps, (32, 48), grid=(4, 6)).amax((2, 3)).max() == 1
    with torch.no_grad():
        torch.testing.assert_close(grad_cam(model, images()), grad_cam(model, images()))
    with pytest.raises(ValueError, match="no concepts"):
        grad_cam(tiny(readout="linear_probe"), images())
    with pytest.raises(ValueError, match="no transformer blocks"):
        last_block(nn.Linear(1, 1))
