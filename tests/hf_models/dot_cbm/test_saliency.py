"""Forms of the saliency on patches whose foreground is known."""

import pytest
import torch
from torch.nn import functional as F

from hf_models.dot_cbm.saliency import border_of, mask_coverage, patch_saliency


GRID = (4, 5)
KINDS = ("cls_dot", "cls_cosine", "contrast", "pca")


def scene(dim, *, seed=0):
    """Patches near one background direction, but for four inside that point elsewhere; the CLS token agrees with
    these."""
    generator = torch.Generator().manual_seed(seed)
    foreground = torch.zeros(GRID, dtype=torch.bool)
    foreground[1:3, 2:4] = True
    foreground = foreground.flatten()
    # Of one length, or the dot product would find the longer.
    ground, thing = F.normalize(torch.randn(2, dim, generator=generator, dtype=torch.float64), dim=-1)
    patches = torch.where(foreground[:, None], thing, ground).expand(2, -1, -1)
    return patches + 0.01 * torch.randn(2, 20, dim, generator=generator, dtype=torch.float64), thing, foreground


@pytest.mark.parametrize("dim", [6, 64])  # fewer and more entries than patches
@pytest.mark.parametrize("kind", KINDS)
def test_the_foreground_stands_out(kind, dim):
    for seed in range(4):
        patches, thing, foreground = scene(dim, seed=seed)
        saliency = patch_saliency(kind, patches, thing.expand(2, -1), grid=GRID)
        assert saliency.shape == (2, 20) and saliency.dtype == torch.float64
        assert (saliency[:, foreground].amin(1) > saliency[:, ~foreground].amax(1)).all()


def test_the_closed_forms():
    patches = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]]])
    token = torch.tensor([[1.0, 2.0]])
    args = {"grid": (1, 3)}
    assert torch.equal(patch_saliency("cls_dot", patches, token, **args), torch.tensor([[11.0, 1.0, -4.0]]))
    cosine = torch.tensor([[11 / (5 * 5**0.5), 1 / 5**0.5, -2 / 5**0.5]])
    torch.testing.assert_close(patch_saliency("cls_cosine", patches, token, **args), cosine)
    # The median patch is (1, 0).
    contrast = torch.tensor([[20.0**0.5, 0.0, 5.0**0.5]])
    torch.testing.assert_close(patch_saliency("contrast", patches, token, **args), contrast)
    assert torch.equal(patch_saliency("uniform", patches, token, **args), torch.ones(1, 3))
    attention = torch.tensor([[0.2, 0.3, 0.1]])
    assert torch.equal(patch_saliency("cls_attention", patches, token, cls_attention=attention, **args), attention)


def test_the_first_component_is_that_of_a_singular_value_decomposition():
    for dim in (6, 64):
        patches = scene(dim)[0]
        u, s, _ = torch.linalg.svd(patches - patches.mean(1, keepdim=True), full_matrices=False)
        expected = (u[..., 0] * s[..., :1]).abs()
        got = patch_saliency("pca", patches, patches[:, 0], grid=GRID)
        torch.testing.assert_close(got.abs(), expected, rtol=1e-6, atol=1e-6)


def test_the_border_is_the_outermost_ring():
    assert border_of((3, 4)).view(3, 4).tolist() == [[True] * 4, [True, False, False, True], [True] * 4]
    assert border_of((2, 5)).all() and border_of((1, 1)).all()
    patch_saliency("pca", torch.randn(1, 10, 4), torch.randn(1, 4), grid=(2, 5))  # nothing inside: no sign to fix


def test_there_is_no_gradient_and_half_precision_is_computed_in_fp32():
    patches = torch.randn(2, 20, 8, dtype=torch.bfloat16, requires_grad=True)
    for kind in (*KINDS, "uniform"):
        saliency = patch_saliency(kind, patches, patches.mean(1), grid=GRID)
        assert not saliency.requires_grad and saliency.dtype == torch.float32


def test_a_mask_in_pixels_is_the_share_of_each_patch():
    mask = torch.zeros(1, 8, 12)
    mask[:, :4, :6] = 1
    expected = torch.tensor([[1.0, 0.5, 0.0, 0.0, 0.0, 0.0]])  # patches of 4 x 4 pixels, 2 x 3 of them
    assert torch.equal(mask_coverage(mask, (2, 3)), expected)
    assert torch.equal(mask_coverage(mask[:, None].bool(), (2, 3)), expected)
    assert torch.equal(mask_coverage(expected, (2, 3)), expected)
    with pytest.raises(ValueError, match="2 x 3 patches"):
        mask_coverage(torch.ones(1, 7), (2, 3))


def test_attention_that_nobody_has_is_asked_for():
    with pytest.raises(ValueError, match="third entry"):
        patch_saliency("cls_attention", torch.randn(1, 4, 2), torch.randn(1, 2), grid=(2, 2))
