"""DOT-CBM against its equations in float64, on every backbone and with every read-out."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForImageClassification

from hf_models.dot_cbm import DotCbmConfig, DotCbmForImageClassification, DotCbmModel
from tests.hf_models.dot_cbm.tiny_dot_cbm import (
    BACKBONES,
    CONCEPTS,
    LABELS,
    READOUTS,
    backbone_config,
    images,
    parameters_without_gradient,
    tiny,
    tiny_config,
)


BOTH = {"labels": LABELS, "concept_labels": CONCEPTS}


# --- the definition


def mlp(x, weights, name):
    for layer in range(3):
        x = x @ weights[f"{name}.layers.{layer}.weight"].T + weights[f"{name}.layers.{layer}.bias"]
        x = x.relu() if layer < 2 else x
    return F.normalize(x, dim=-1)


def reference(model, global_token, patches):
    """Losses, probabilities and logits by the equations, from the tokens on, one image after the other."""
    c, w = model.config, {name.removeprefix("model."): t for name, t in model.state_dict().items()}
    v, gamma, terms, probabilities = mlp(w["text_embeddings"], w, "text_adapter"), w["gamma"], [], []
    count = v.shape[0]
    top = sum(v[i] @ v[j] for i in range(count) for j in range(count) if i != j) / (count * (count - 1))
    for g, p in zip(global_token, patches, strict=True):
        s = F.cosine_similarity(p, g[None], dim=-1)
        theta = ((s - s.mean()) / s.std(correction=0) / c.saliency_temperature).softmax(0)
        u = mlp(p, w, "visual_adapter")
        cost, scale = 1 - u @ v.T, torch.ones_like(gamma)
        for _ in range(c.sinkhorn_iterations):
            rows = theta / ((-cost / c.sinkhorn_eps).exp() @ scale)
            scale = gamma / ((-cost / c.sinkhorn_eps).exp().T @ rows)
        plan = rows[:, None] * (-cost / c.sinkhorn_eps).exp() * scale
        score = 1 - (plan * cost).sum(0) / plan.sum(0)
        probabilities.append((w["logit_scale"].exp() * score + w["concept_bias"]).sigmoid())
        weight, n = theta / theta.max(), len(p)
        pairs = [weight[i] * weight[j] * (u[i] @ u[j]) for i in range(n) for j in range(n) if i != j]
        terms.append(sum(pairs) / (n * (n - 1)))
    probabilities = torch.stack(probabilities)
    inputs = (probabilities - w["activation_mean"]) / w["activation_std"]
    logits = inputs @ w["classifier.weight"].T + w["classifier.bias"]
    y = CONCEPTS.double()
    bce = -(y * probabilities.log() + (1 - y) * (1 - probabilities).log()).mean()
    losses = {"concept": bce, "vop": sum(terms) / len(terms), "top": top, "class": F.cross_entropy(logits, LABELS)}
    return probabilities, logits, losses


def test_the_model_is_its_equations():
    model = tiny(training_stage="joint", marginal_floor=0.0, sinkhorn_eps=0.3).double()
    model.model.gamma.copy_(torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15], dtype=torch.float64))
    features = tuple(part.double() for part in model.model.extract_features(images().double()))
    out = model(patch_features=features, **BOTH)
    probabilities, logits, losses = reference(model, *features)
    torch.testing.assert_close(out.concept_probs, probabilities, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out.logits, logits, rtol=1e-5, atol=1e-5)
    weights = {"concept": 0.8, "vop": 0.15, "top": 0.2, "class": 1.0}
    assert out.losses.keys() == weights.keys()
    for name, loss in losses.items():
        assert float(out.losses[name]) == pytest.approx(float(loss), rel=1e-4, abs=1e-6), name
    for stage, terms in {"joint": list(weights), "concept": ["concept", "vop", "top"], "class": ["class"]}.items():
        model.set_stage(stage)
        expected = sum(weights[name] * float(losses[name]) for name in terms)
        assert float(model(patch_features=features, **BOTH).loss) == pytest.approx(expected, rel=1e-4)


def test_parameter_counts_of_the_paper_s_shapes():
    with torch.device("meta"):
        model = DotCbmForImageClassification(DotCbmConfig(num_concepts=312, num_labels=200))
    counts = {name: p.numel() for name, p in model.named_parameters()}
    adapter = {1024: 1024 * 768 + 768 + 2 * (768 * 768 + 768), 768: 3 * (768 * 768 + 768)}
    assert sum(n for name, n in counts.items() if ".visual_adapter." in name) == adapter[1024]
    assert sum(n for name, n in counts.items() if ".text_adapter." in name) == adapter[768]
    assert sum(n for name, n in counts.items() if name.startswith("classifier")) == 312 * 200 + 200
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(adapter.values()) + 312 + 1
    assert 304e6 < sum(n for name, n in counts.items() if ".backbone." in name) < 305e6


# --- backbones


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("readout", READOUTS)
def test_every_backbone_trains_with_every_readout_and_no_parameter_is_idle(kind, readout):
    model = tiny(kind, readout=readout, freeze_backbone=False, training_stage="joint").train()
    out = model(images(), **BOTH)
    assert out.logits.shape == (3, 3) and out.loss.isfinite() and out.grid == (4, 4)
    out.loss.backward()
    assert parameters_without_gradient(model) == []
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    for stage in ("class",) if readout == "linear_probe" else ("concept", "class"):
        model.zero_grad()
        model.set_stage(stage)
        model(images(), **BOTH).loss.backward()
        assert parameters_without_gradient(model) == []


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_tokens_are_the_backbone_s(kind):
    model = tiny(kind)
    inner, pixels = model.model.backbone, images()
    tokens = inner(pixel_values=pixels).last_hidden_state
    prefix = {"dinov2_with_registers": 5, "siglip_vision_model": 0}.get(kind, 1)
    if kind == "clip_vision_model":
        tokens = inner.post_layernorm(tokens)
    global_token, patches = model.model.extract_features(pixels)
    torch.testing.assert_close(patches, tokens[:, prefix:])
    assert patches.shape == (3, 16, 24)
    expected = inner(pixel_values=pixels).pooler_output if kind in BACKBONES[3:] else tokens[:, 0]
    torch.testing.assert_close(global_token, expected)
    a, b = model(pixels, output_transport_plan=True), model(patch_features=(global_token, patches))
    torch.testing.assert_close(a.logits, b.logits)
    assert a.grid == b.grid == (4, 4) and a.transport_plan.shape == (3, 16, 5)
    assert b.transport_plan is None and b.concept_maps is None


@pytest.mark.parametrize("kind", BACKBONES)
def test_other_sizes_and_non_square_images_have_their_own_grid(kind):
    model = tiny(kind)
    for height, width, grid in ((32, 48, (4, 6)), (40, 16, (5, 2)), (32, 32, (4, 4))):
        out = model(images(2, height, width), output_transport_plan=True)
        assert out.grid == grid and out.transport_plan.shape == (2, grid[0] * grid[1], 5)
        assert model.heatmaps(out.transport_plan, (height, width), grid=grid).shape == (2, 5, height, width)


def test_rows_of_the_grid_are_rows_of_the_image():
    """A patch that is changed in the pixels is the one that changes among the patch embeddings."""
    model = tiny("siglip_vision_model", image_size=[32, 48])
    pixels, changed = images(1, 32, 48), images(1, 32, 48)
    changed[:, :, 8:16, 40:48] += 3.0  # second row, last of six columns
    a, b = (model.model.backbone.embeddings.patch_embedding(x).flatten(2).transpose(1, 2) for x in (pixels, changed))
    assert (a != b).any(-1)[0].nonzero().flatten().tolist() == [11]
    plan = torch.full((1, 24, 5), 1e-9)
    plan[:, 11] = 1.0
    heat = model.heatmaps(plan, (32, 48))[0, 0]
    row, column = divmod(int(heat.argmax()), 48)
    assert 8 <= row < 16 and 40 <= column < 48


def test_attention_of_the_cls_token_is_a_saliency():
    for kind in BACKBONES[:-1]:
        model = tiny(kind, saliency="cls_attention")
        features = model.model.extract_features(images())
        assert len(features) == 3 and features[2].shape == (3, 16) and (features[2] > 0).all()
        out = model(images())
        torch.testing.assert_close(out.saliency, features[2])
        torch.testing.assert_close(model(patch_features=features).logits, out.logits)
        with pytest.raises(ValueError, match="third entry"):
            model(patch_features=features[:2])


def test_a_frozen_backbone_stays_as_it_is_and_a_trained_one_gets_gradient():
    frozen = tiny().train()
    assert not frozen.model.backbone.training and frozen.model.visual_adapter.training
    assert not any(p.requires_grad for p in frozen.model.backbone.parameters())
    free = tiny(freeze_backbone=False).train()
    assert free.model.backbone.training
    free(images(), **BOTH).loss.backward()
    assert free.model.backbone.embeddings.patch_embeddings.projection.weight.grad.abs().sum() > 0


def test_a_backbone_that_was_loaded_elsewhere_is_taken_over():
    for kind in BACKBONES:
        torch.manual_seed(3)
        backbone = AutoModel.from_config(tiny_config(kind).backbone_config).eval()
        model = DotCbmForImageClassification.from_backbone(backbone, num_concepts=4).eval()
        body = DotCbmModel.from_backbone(backbone, tiny_config()).eval()
        assert body.config.backbone_config.model_type == kind
        a, b = model.model.extract_features(images()), body.extract_features(images())
        torch.testing.assert_close(a, b)
        expected = backbone(pixel_values=images()).last_hidden_state[:, -16:]
        if kind == "clip_vision_model":
            expected = backbone.post_layernorm(expected)
        torch.testing.assert_close(a[1], expected)


# --- marginals


def test_a_mask_of_the_caller_is_the_patch_marginal():
    model = tiny(saliency="mask")
    mask = torch.zeros(3, 32, 32)
    mask[:, :8, 8:24] = 1  # patches 1 and 2
    out = model(images(), foreground_mask=mask)
    torch.testing.assert_close(out.theta[:, 1:3], torch.full((3, 2), 0.5), rtol=1e-4, atol=0)
    torch.testing.assert_close(model(images(), foreground_mask=mask.view(3, 4, 8, 4, 8).mean((2, 4)).flatten(1)), out)
    with pytest.raises(ValueError, match="needs foreground_mask"):
        model(images())
    with pytest.raises(ValueError, match="saliency='cls_cosine'"):
        tiny()(images(), foreground_mask=mask)


@pytest.mark.parametrize("readout", READOUTS[:6])
def test_patches_outside_the_mask_change_nothing(readout):
    model = tiny(readout=readout, saliency="uniform")
    token, patches = model.model.extract_features(images())
    mask = (torch.arange(16) % 3 > 0).expand(3, -1)
    changed = torch.where(mask[..., None], patches, 7.0)
    a = model(patch_features=(token, patches), patch_mask=mask, output_transport_plan=True)
    b = model(patch_features=(token, changed), patch_mask=mask, output_transport_plan=True)
    torch.testing.assert_close(a.concept_logits, b.concept_logits)
    assert (b.concept_maps[~mask] == 0).all()


def test_plans_have_the_marginals_and_patches_and_concepts_have_no_order():
    model = tiny(sinkhorn_eps=0.3)
    model.model.gamma.copy_(torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]))
    token, patches = model.model.extract_features(images())
    out = model(patch_features=(token, patches), output_transport_plan=True)
    torch.testing.assert_close(out.transport_plan.sum(1), model.model.gamma.expand(3, -1))
    torch.testing.assert_close(out.transport_plan.sum(2), out.theta, rtol=1e-3, atol=1e-4)
    order = torch.randperm(16)
    moved = model(patch_features=(token, patches[:, order]), output_transport_plan=True)
    torch.testing.assert_close(moved.transport_plan, out.transport_plan[:, order], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(moved.logits, out.logits, rtol=1e-3, atol=1e-4)
    other, concepts = copy.deepcopy(model), torch.randperm(5)
    for tensor in (other.model.gamma, other.model.text_embeddings, other.model.concept_bias.data):
        tensor.copy_(tensor[concepts].clone())
    shuffled = other(patch_features=(token, patches)).concept_logits
    torch.testing.assert_close(shuffled, out.concept_logits[:, concepts], rtol=1e-3, atol=1e-4)


def test_the_gradient_of_the_plan_is_there_where_it_is_asked_for():
    gradients, features = {}, (torch.randn(3, 24), 3 * torch.randn(3, 16, 24))
    for mode in ("detached", "unrolled", "implicit"):
        model = tiny(sinkhorn_gradient=mode, sinkhorn_eps=0.3, sinkhorn_iterations=60)
        model(patch_features=features, **BOTH).loss.backward()
        gradients[mode] = model.model.visual_adapter.layers[0].weight.grad
    largest = gradients["unrolled"].abs().max()
    assert (gradients["detached"] - gradients["unrolled"]).abs().max() > 0.01 * largest
    assert (gradients["implicit"] - gradients["unrolled"]).abs().max() < 0.01 * largest


# --- losses and stages


def test_only_the_classifier_moves_in_the_class_stage_and_dropout_is_off():
    model = tiny(training_stage="class").train()
    assert not model.model.training and model.classifier.training
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }
    torch.testing.assert_close(model(images()).concept_probs, model(images()).concept_probs)
    model.set_stage("concept")
    assert model.model.training and not model.classifier.weight.requires_grad
    assert (model(images()).concept_probs != model(images()).concept_probs).any()
    with pytest.raises(ValueError, match="'two'"):
        model.set_stage("two")
    with pytest.raises(ValueError, match="linear probe"):
        tiny(readout="linear_probe").set_stage("concept")


def test_an_evaluation_has_the_losses_that_its_labels_allow():
    model = tiny()
    assert model(images()).loss is None and model(images()).losses is None
    only = model(images(), labels=LABELS)
    assert set(only.losses) == {"class"} and torch.equal(only.loss, only.losses["class"])
    concepts = model(images(), concept_labels=CONCEPTS)
    assert set(concepts.losses) == {"concept", "vop", "top"}
    assert set(tiny(readout="vanilla")(images(), **BOTH).losses) == {"concept", "class"}
    assert set(tiny(readout="linear_probe")(images(), **BOTH).losses) == {"class"}
    with pytest.raises(ValueError, match="label_names"):
        model.train()(images(), labels=LABELS)


def test_unknown_labels_do_not_count():
    model = tiny(training_stage="joint")
    known = CONCEPTS.float()
    known[0, 1], known[2] = float("nan"), -1.0
    kept = torch.tensor([[1, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    out = model(images(), labels=torch.tensor([2, -100, 1]), concept_labels=known)
    expected = F.binary_cross_entropy_with_logits(out.concept_logits[kept], CONCEPTS.float()[kept])
    torch.testing.assert_close(out.losses["concept"], expected)
    torch.testing.assert_close(out.losses["class"], F.cross_entropy(out.logits[[0, 2]], LABELS[[0, 2]]))
    nothing = model(images(), labels=torch.full((3,), -100), concept_labels=torch.full((3, 5), -1))
    assert nothing.losses["concept"] == nothing.losses["class"] == 0 and nothing.loss.isfinite()


def test_the_classifier_can_be_trained_on_true_concepts():
    model = tiny(training_stage="class", class_inputs="true").train()
    seen = model(images(), **BOTH).head_inputs
    torch.testing.assert_close(seen, (CONCEPTS - model.activation_mean) / model.activation_std)
    predicted = tiny(training_stage="class")(images()).head_inputs
    torch.testing.assert_close(model.eval()(images(), **BOTH).head_inputs, predicted)
    with pytest.raises(ValueError, match="class_inputs='true'"):
        model.train()(images(), labels=LABELS)


def test_the_scale_stays_positive_and_starts_where_the_config_says():
    torch.manual_seed(0)
    model = DotCbmForImageClassification(tiny_config())
    assert float(model.model.logit_scale.exp()) == pytest.approx(10.0)
    assert (model.model.concept_bias == 0).all() and model.model.gamma.tolist() == pytest.approx([0.2] * 5)


def test_patches_and_concepts_of_a_new_model_point_in_many_directions():
    """Also where transformers makes what a checkpoint has not: there, it initialises module by module."""
    torch.manual_seed(0)
    model = DotCbmForImageClassification(tiny_config())
    kept = {name: t for name, t in model.state_dict().items() if "adapter" not in name}
    completed = DotCbmForImageClassification.from_pretrained(None, config=model.config, state_dict=kept)
    for made in (model.eval(), completed):
        made.set_concepts(["a", "b", "c"], torch.randn(3, 9))
        found = made.model(images())
        for directions in (found.patch_directions[0], found.concept_directions):
            cosine = directions @ directions.T
            assert cosine[~torch.eye(len(cosine), dtype=torch.bool)].mean() < 0.9
        assert (made.model.visual_adapter.layers[1].bias == 0).all()


def test_the_literal_readout_of_a_model_is_0_731():
    probabilities = tiny(readout="literal")(images()).concept_probs
    assert (probabilities - 1 / (1 + math.exp(-1))).abs().max() < 0.02  # 16 patches, not 324


# --- interventions


@pytest.mark.parametrize("readout", READOUTS[:-1])
def test_an_intervention_replaces_what_it_names_and_nan_is_untouched(readout):
    model = tiny(readout=readout)
    before = model(images())
    wanted = torch.full((3, 5), float("nan"))
    torch.testing.assert_close(model(images(), interventions=wanted).logits, before.logits)
    wanted[0, 1], wanted[2, 4] = 1.0, 0.0
    after = model(images(), interventions=wanted)
    changed = ~wanted.isnan()
    torch.testing.assert_close(after.concept_probs[~changed], before.concept_probs[~changed])
    assert torch.equal(after.concept_probs[changed], wanted[changed])
    torch.testing.assert_close(after.concept_logits, before.concept_logits)
    assert (after.logits != before.logits).any(1).tolist() == [True, False, True]
    one = model(images(), interventions=torch.tensor([0.5, *[float("nan")] * 4]))
    assert (one.concept_probs[:, 0] == 0.5).all()


def test_interventions_by_name_and_by_group():
    model = tiny()
    nan = float("nan")
    by_group = model.intervention(CONCEPTS, groups=["hat"], concepts=["glasses"])
    expected = torch.tensor([[1, 0, nan, 0, nan], [0, 1, nan, 0, nan], [0, 0, nan, 1, nan]])
    torch.testing.assert_close(by_group, expected, equal_nan=True)
    torch.testing.assert_close(model.intervention(CONCEPTS, concepts=[3]).nan_to_num(-1)[:, 3], CONCEPTS[:, 3].float())
    with pytest.raises(ValueError, match="'shoe'"):
        model.intervention(CONCEPTS, groups=["shoe"])
    with pytest.raises(ValueError, match="'shoe'"):
        model.intervention(CONCEPTS, concepts=["shoe"])
    with pytest.raises(ValueError, match="linear probe"):
        tiny(readout="linear_probe")(images(), interventions=by_group)


def test_no_gradient_flows_through_an_intervention():
    model = tiny(training_stage="joint")
    wanted = torch.full((3, 5), 1.0, requires_grad=True)
    model(images(), interventions=wanted).logits.sum().backward()
    assert wanted.grad is None
    assert all(p.grad is None or (p.grad == 0).all() for p in model.model.parameters())
    assert model.classifier.weight.grad.abs().sum() > 0


def test_an_intervention_can_be_kept_in_the_range_of_the_predictions():
    model = tiny(intervention_range=[0.05, 0.95])
    model.activation_low.copy_(torch.linspace(0.1, 0.3, 5))
    model.activation_high.copy_(torch.linspace(0.6, 0.9, 5))
    for value in (0.0, 1.0, 0.5):
        got = model(images(), interventions=torch.full((5,), value)).concept_probs
        expected = (1 - value) * model.activation_low + value * model.activation_high
        torch.testing.assert_close(got, expected.expand(3, -1))


# --- what users of transformers rely on


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.compatibility("Auto classes", method="dot_cbm")
def test_saving_and_loading_keeps_everything(tmp_path, readout):
    model = tiny(readout=readout, training_stage="class")
    model.model.gamma.copy_(torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15]))
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(again) is DotCbmForImageClassification and not again.training
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert again.config.concept_names == model.config.concept_names
    torch.testing.assert_close(again(images()).logits, model(images()).logits)
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is DotCbmModel
    torch.testing.assert_close(body(images()).concept_logits, model(images()).concept_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_the_transport_in_fp32(dtype):
    model = tiny()
    expected = model(images(), output_transport_plan=True)
    with torch.autocast("cpu", dtype=dtype):
        mixed = model(images(), output_transport_plan=True, **BOTH)
    assert mixed.transport_plan.dtype == torch.float32 and mixed.loss.dtype == torch.float32
    half = model.to(dtype)(images().to(dtype), output_transport_plan=True, **BOTH)
    assert half.transport_plan.dtype == torch.float32 and half.loss.isfinite()
    for out in (mixed, half):
        torch.testing.assert_close(out.transport_plan.sum((1, 2)), torch.ones(3), rtol=1e-3, atol=0)
        torch.testing.assert_close(out.concept_probs, expected.concept_probs, rtol=0.1, atol=0.1)
    half.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", BACKBONES)
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    gradients = []
    for checkpointing in (False, True):
        model = tiny(kind, freeze_backbone=False, training_stage="joint", adapter_dropout=0.0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.train()(images(), **BOTH).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_outputs_are_tuples_on_request_and_large_ones_are_not_gathered():
    model = tiny()
    as_tuple = model(images(), return_dict=False)
    torch.testing.assert_close(as_tuple[0], model(images()).logits)
    gathered = model(images(), **BOTH).keys() - set(model.config.keys_to_ignore_at_inference)
    assert gathered == {"loss", "logits", "concept_logits", "concept_probs"}


def test_bad_input_is_refused_with_the_remedy():
    model = tiny()
    with pytest.raises(ValueError, match="exactly one"):
        model()
    token, patches = model.model.extract_features(images())
    with pytest.raises(ValueError, match="exactly one"):
        model(images(), patch_features=(token, patches))
    with pytest.raises(ValueError, match="grid="):
        model(patch_features=(token, patches[:, :10]))
    assert model(patch_features=(token, patches[:, :10]), grid=(2, 5)).grid == (2, 5)
    with pytest.raises(ValueError, match="10 patches"):
        model(patch_features=(token, patches[:, :10]), grid=(2, 4))


def test_every_backbone_s_config_reaches_the_model():
    config = tiny_config(backbone_config=backbone_config("vit", num_hidden_layers=1))
    assert len(DotCbmModel(config).backbone.layers) == 1
    other = DotCbmForImageClassification.from_backbone(AutoModel.from_config(config.backbone_config), readout="dot")
    assert other.config.readout == "dot" and other.model.backbone.pooler is None
