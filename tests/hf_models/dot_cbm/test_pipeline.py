"""`pipeline("image-classification")` with explanations, and what prepares its images."""

import numpy
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, pipeline

from hf_models.dot_cbm import DotCbmPipeline, image_processor_for
from tests.hf_models.dot_cbm.tiny_dot_cbm import BACKBONES, tiny, tiny_config


PHOTO = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=numpy.uint8))
OTHER = Image.fromarray(numpy.random.default_rng(1).integers(0, 256, (50, 30, 3), dtype=numpy.uint8))


def made(**fields):
    model = tiny(**fields)
    options = {"image_processor": image_processor_for(model.config), "pipeline_class": DotCbmPipeline}
    return model, pipeline("image-classification", model=model, **options)


def test_a_prediction_comes_with_its_concepts_in_the_image_s_own_pixels():
    model, explainer = made()
    result = explainer(PHOTO, top_k=2, top_k_concepts=3)
    assert [set(p) for p in result["predictions"]] == [{"label", "score"}] * 2
    best = result["predictions"][0]["label"]
    assert [r.label for r in result["explanation"]] == [best] * 3
    assert all(r.heatmap.shape == (40, 60) for r in result["explanation"])
    pixels = explainer.image_processor(PHOTO, return_tensors="pt").pixel_values
    direct = model.explain(pixels, 3, image_size=(40, 60))[0]
    for a, b in zip(result["explanation"], direct, strict=True):
        assert (a.concept, a.box) == (b.concept, b.box)
        assert a.contribution == pytest.approx(b.contribution)
        torch.testing.assert_close(a.heatmap, b.heatmap)


def test_boxes_are_in_the_frame_of_the_picture_as_one_sees_it(tmp_path):
    model = tiny()
    explainer = DotCbmPipeline(model=model, image_processor=image_processor_for(model.config))
    picture, exif = Image.new("RGB", (40, 24), "red"), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    array = numpy.asarray(picture)
    given = {"path": str(tmp_path / "turned.jpg"), "image": Image.open(tmp_path / "turned.jpg"), "array": array}
    shapes = {name: tuple(explainer(image)["explanation"][0].heatmap.shape) for name, image in given.items()}
    assert shapes == {"path": (40, 24), "image": (40, 24), "array": (24, 40)}


def test_a_linear_probe_says_that_it_has_nothing_to_explain():
    model = tiny(readout="linear_probe", training_stage="class")
    explainer = DotCbmPipeline(model=model, image_processor=image_processor_for(model.config))
    with pytest.raises(ValueError, match="no concepts"):
        explainer(Image.new("RGB", (40, 24)))
    assert explainer(Image.new("RGB", (40, 24)), explain=False)[0]["score"] > 0


def test_batches_give_what_single_images_give(tmp_path):
    _, explainer = made()
    PHOTO.save(tmp_path / "photo.png")
    alone = [explainer(image) for image in (PHOTO, OTHER)]
    together = explainer([str(tmp_path / "photo.png"), OTHER], batch_size=2)
    for a, b in zip(together, alone, strict=True):
        assert [p["label"] for p in a["predictions"]] == [p["label"] for p in b["predictions"]]
        assert [r.box for r in a["explanation"]] == [r.box for r in b["explanation"]]
        assert a["explanation"][0].heatmap.shape == b["explanation"][0].heatmap.shape
    assert alone[1]["explanation"][0].heatmap.shape == (50, 30)


def test_without_explanations_it_is_transformers_own():
    model, explainer = made()
    plain = pipeline("image-classification", model=model, image_processor=image_processor_for(model.config))
    assert not isinstance(plain, DotCbmPipeline)
    assert explainer(PHOTO, explain=False) == plain(PHOTO)
    assert explainer(PHOTO)["predictions"] == plain(PHOTO)


def test_the_processor_suits_the_backbone_and_is_saved_beside_the_model(tmp_path):
    means = set()
    for kind in BACKBONES:
        processor = image_processor_for(tiny_config(kind, image_size=[16, 24]))
        assert processor(PHOTO, return_tensors="pt").pixel_values.shape == (1, 3, 16, 24)
        means.add(tuple(processor.image_mean))
    assert len(means) == 3
    model, _ = made()
    model.save_pretrained(tmp_path)
    image_processor_for(model.config).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    expected = image_processor_for(model.config)(PHOTO, return_tensors="pt").pixel_values
    torch.testing.assert_close(processor(PHOTO, return_tensors="pt").pixel_values, expected)
    loaded = pipeline("image-classification", model=str(tmp_path), pipeline_class=DotCbmPipeline)
    assert loaded(PHOTO)["explanation"][0].heatmap.shape == (40, 60)
