"""Concepts brought by the user: names, embeddings, prior, frequencies, statistics of their predictions."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from tests.hf_models.dot_cbm.tiny_dot_cbm import READOUTS, SHAPE, images, tiny


NAMES = ["tail", "beak", "wing"]
MATRIX = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("readout", READOUTS)
def test_another_bank_is_saved_and_loaded_with_the_weights(tmp_path, readout):
    model = tiny(readout=readout)
    texts = torch.randn(3, 9)
    model.set_concepts(NAMES, texts, MATRIX, groups={"front": [1, 2]}, encoder="some/encoder")
    out = model(images())
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    config = again.config
    assert config.concept_names == NAMES and config.num_concepts == 3 and config.text_embedding_dim == 9
    assert config.concept_groups == {"front": [1, 2]} and config.concept_encoder == "some/encoder"
    torch.testing.assert_close(again.model.text_embeddings, texts)
    torch.testing.assert_close(again.model.gamma, model.model.gamma)
    torch.testing.assert_close(again(images()).logits, out.logits)
    if readout != "linear_probe":
        assert out.concept_probs.shape == (3, 3)


def test_the_prior_and_the_biases_come_from_the_matrix():
    model = tiny()
    model.set_concepts(NAMES, torch.randn(3, 12), MATRIX)
    scores = (1 - torch.tensor([2.0, 2.5, 3.0]) / 3).softmax(0)
    torch.testing.assert_close(model.model.gamma, scores)
    torch.testing.assert_close(model.model.concept_bias, torch.logit(torch.tensor([0.999, 2 / 3, 1 / 3])))
    model.set_concepts(NAMES, torch.randn(3, 12), frequencies=torch.tensor([0.1, 0.5, 0.0]))
    torch.testing.assert_close(model.model.concept_bias, torch.logit(torch.tensor([0.1, 0.5, 0.001])))
    assert model.model.gamma.tolist() == pytest.approx([1 / 3] * 3)
    vanilla = tiny(readout="vanilla")
    vanilla.set_concepts(NAMES, torch.randn(3, 12), frequencies=torch.tensor([0.1, 0.5, 0.25]))
    torch.testing.assert_close(vanilla.model.concept_projection.bias, torch.logit(torch.tensor([0.1, 0.5, 0.25])))


def test_the_same_concepts_keep_what_was_trained_and_others_do_not():
    model = tiny(training_stage="class")
    classifier, first = model.classifier.weight.clone(), model.model.text_adapter.layers[0].weight.clone()
    model.set_concepts(SHAPE["concept_names"], torch.randn(5, 12))
    assert torch.equal(model.classifier.weight, classifier)
    model.set_concepts([f"{name}s" for name in SHAPE["concept_names"]], torch.randn(5, 12))
    assert not torch.equal(model.classifier.weight, classifier)
    assert torch.equal(model.model.text_adapter.layers[0].weight, first)
    assert (model.activation_mean == 0).all() and (model.activation_std == 1).all()
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "classifier.weight",
        "classifier.bias",
    }


def test_a_bank_follows_the_model_s_dtype():
    model = tiny().to(torch.bfloat16)
    model.set_concepts(NAMES, torch.randn(3, 9), MATRIX)
    assert model(images().bfloat16()).concept_probs.shape == (3, 3)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


def test_a_bank_that_does_not_fit_is_refused_and_changes_nothing():
    model = tiny()
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    for names, texts, options, message in (
        (NAMES, torch.randn(2, 12), {}, "one row"),
        (["a", "a", "b"], torch.randn(3, 12), {}, "repeats"),
        (NAMES, torch.full((3, 12), float("nan")), {}, "NaN"),
        (NAMES, torch.randn(3, 12), {"groups": {"x": [3]}}, "0..2"),
        (NAMES, torch.randn(3, 12), {"class_concept_matrix": torch.ones(2, 4)}, "classes, 3"),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_concepts(names, texts, **options)
    assert model.config.to_dict() == config
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


# --- statistics of the predictions


def test_statistics_standardise_the_classifier_s_inputs():
    model = tiny(intervention_range=[0.1, 0.9])
    batches = [{"pixel_values": images(4) * scale, "labels": torch.zeros(4)} for scale in (0.2, 1.0, 3.0)]
    model.train()
    model.fit_activation_statistics(batches)
    assert model.training
    model.eval()
    p = torch.cat([model(batch["pixel_values"]).concept_probs for batch in batches]).double()
    torch.testing.assert_close(model.activation_mean.double(), p.mean(0), rtol=1e-5, atol=1e-6)
    deviation = p.std(0, correction=0).clamp_min(0.01)
    torch.testing.assert_close(model.activation_std.double(), deviation, rtol=1e-4, atol=1e-5)
    order = p.sort(0).values
    # The smallest prediction with a tenth, and nine tenths, of the twelve at or below it; within a bin of 0.001.
    torch.testing.assert_close(model.activation_low.double(), order[1], rtol=0, atol=6e-4)
    torch.testing.assert_close(model.activation_high.double(), order[10], rtol=0, atol=6e-4)
    other = tiny(intervention_range=[0.1, 0.9])
    other.set_activation_statistics(p)
    for name in ("mean", "std", "low", "high"):
        torch.testing.assert_close(getattr(other, f"activation_{name}"), getattr(model, f"activation_{name}"))


def test_a_constant_concept_is_not_blown_up():
    model = tiny()
    model.set_activation_statistics(torch.full((10, 5), 0.7))
    torch.testing.assert_close(model.activation_std, torch.full((5,), 0.01))
    with pytest.raises(ValueError, match="no image"):
        model.fit_activation_statistics([])
