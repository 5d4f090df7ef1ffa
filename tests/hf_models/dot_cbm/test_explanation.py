"""Records, boxes and heatmaps, and the figure that is made of them."""

import numpy
import pytest
import torch
from PIL import Image

from hf_models.dot_cbm import plot_explanation
from hf_models.dot_cbm.explanation import ConceptRecord, enclosing_box, heatmaps_in_pixels
from hf_models.dot_cbm.figure import AGAINST, FOR, describe
from tests.hf_models.dot_cbm.tiny_dot_cbm import READOUTS, images, tiny


# --- heatmaps and boxes


def test_a_heatmap_is_the_column_on_the_grid_scaled_to_its_maximum():
    maps = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [4.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]) * 1e-9
    heat = heatmaps_in_pixels(maps, (2, 3), (2, 3))
    torch.testing.assert_close(heat[0, 0], torch.tensor([[0.25, 0.5, 1.0], [0.0, 0.0, 0.0]]))
    assert (heat[0, 1] == 0).all()
    seen = heatmaps_in_pixels(maps, (2, 3), (2, 3), probabilities=torch.tensor([[0.4, 0.9]]))
    torch.testing.assert_close(seen[0, 0], 0.4 * heat[0, 0])


def test_upsampling_is_bilinear_with_each_patch_in_its_middle():
    heat = heatmaps_in_pixels(torch.tensor([[[0.0], [1.0]]]), (1, 2), (1, 8))
    expected = torch.tensor([0.0, 0.0, 0.125, 0.375, 0.625, 0.875, 1.0, 1.0])
    torch.testing.assert_close(heat[0, 0, 0], expected)


@pytest.mark.parametrize("readout", READOUTS[:-1])
def test_heatmaps_of_every_readout_have_pixels_and_are_not_negative(readout):
    model = tiny(readout=readout)
    out = model(images(2, 32, 48), output_transport_plan=True)
    heat = model.heatmaps(out.concept_maps, (32, 48), grid=out.grid, probabilities=out.concept_probs)
    assert heat.shape == (2, 5, 32, 48) and (heat >= 0).all() and heat.isfinite().all()
    peak = heat.amax((2, 3))
    seen = peak > 0  # a linear map may be nowhere positive
    torch.testing.assert_close(peak[seen], out.concept_probs[seen])
    if readout in READOUTS[:6]:
        assert seen.all()


def test_the_box_encloses_everything_above_the_threshold_speckle_included():
    heat = torch.zeros(6, 8)
    heat[1:3, 2:5] = 1.0
    assert enclosing_box(heat) == (2, 1, 5, 3)
    heat[5, 7] = 0.59
    assert enclosing_box(heat) == (2, 1, 5, 3)
    heat[5, 7] = 0.6
    assert enclosing_box(heat) == (2, 1, 8, 6)
    assert enclosing_box(heat, 0.7) == (2, 1, 5, 3)
    assert enclosing_box(0.01 * heat) == (2, 1, 8, 6)
    assert enclosing_box(torch.zeros(4, 4)) is None


# --- records


@pytest.mark.parametrize("readout", READOUTS[:-1])
def test_contributions_and_the_bias_are_the_logit(readout):
    model = tiny(readout=readout)
    out, records = model(images()), model.explain(images(), top_k=None)
    for row in range(3):
        label = int(out.logits[row].argmax())
        assert {record.index for record in records[row]} == set(range(5))
        total = sum(record.contribution for record in records[row]) + float(model.classifier.bias[label])
        assert total == pytest.approx(float(out.logits[row, label]), abs=1e-4)
        for record in records[row]:
            assert record.label == model.config.id2label[label]
            assert record.concept == model.config.concept_names[record.index]
            assert record.probability == pytest.approx(float(out.concept_probs[row, record.index]), abs=1e-5)


def test_records_are_ordered_by_weight_or_as_asked_for():
    model = tiny()
    model.train()
    found = model.explain(images(), top_k=3)
    assert model.training and all(len(records) == 3 for records in found)
    for records in found:
        weights = [abs(record.contribution) for record in records]
        assert weights == sorted(weights, reverse=True)
    asked = model.explain(images(), concepts=["smile", 0], labels=torch.tensor([1, 1, 1]))
    assert [[record.index for record in records] for records in asked] == [[4, 0]] * 3
    assert {record.label for records in asked for record in records} == {"LABEL_1"}


def test_sizes_interventions_and_cached_features_reach_the_records():
    model = tiny()
    record = model.explain(images(1, 32, 48), top_k=1)[0][0]
    assert record.heatmap.shape == (32, 48)
    assert model.explain(images(1), top_k=1, image_size=(50, 70))[0][0].heatmap.shape == (50, 70)
    features = model.model.extract_features(images(1))
    cached = model.explain(patch_features=features)[0]
    for a, b in zip(cached, model.explain(images(1))[0], strict=True):
        assert (a.concept, a.box) == (b.concept, b.box)
        torch.testing.assert_close(a.heatmap, b.heatmap)
    absent = torch.tensor([float("nan"), 0.0, 1.0, float("nan"), float("nan")])
    records = model.explain(images(1), concepts=[1, 2], interventions=absent)[0]
    assert [r.probability for r in records] == [0.0, 1.0]
    assert records[0].box is None and (records[0].heatmap == 0).all()
    assert float(records[1].heatmap.max()) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="linear probe"):
        tiny(readout="linear_probe").explain(images(1))


def test_a_planted_object_is_boxed_where_it_is():
    """Patches of one concept's own direction, in a known place of cached tokens: no training is needed to find it."""
    model = tiny(readout="conditional", saliency="uniform", adapter_layers=1, text_embedding_dim=24, projection_dim=24)
    with torch.no_grad():
        for adapter in (model.model.visual_adapter, model.model.text_adapter):
            adapter.layers[0].weight.copy_(torch.eye(24))
            adapter.layers[0].bias.zero_()
        model.model.text_embeddings.copy_(torch.eye(24)[:5])
    patches = torch.eye(24)[10].repeat(1, 16, 1)
    patches[:, [5, 6]] = torch.eye(24)[3]  # second row, second and third column of four
    record = model.explain(patch_features=(torch.zeros(1, 24), patches), concepts=["glasses"], image_size=32)[0][0]
    left, top, right, bottom = record.box
    assert 6 <= left <= 10 and 22 <= right <= 26 and 6 <= top <= 10 and 14 <= bottom <= 18


# --- the figure


def record(name="beard", probability=0.9, contribution=1.5, box=(4, 4, 12, 12)):
    heat = torch.zeros(32, 48)
    heat[4:12, 4:12] = probability
    return ConceptRecord(name, 0, probability, contribution, "a wizard", box, heat)


RECORDS = [record(), record("glasses", 0.1, 0.7, None), record("smile", 0.8, -0.6)]


def drawn(figure) -> numpy.ndarray:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return numpy.asarray(canvas.buffer_rgba())


def test_a_tile_says_what_is_there_and_what_it_does():
    assert [describe(r) for r in RECORDS] == [
        "beard (90%)\nfor +1.50",
        "no glasses (90%)\nfor +0.70",
        "smile (80%)\nagainst -0.60",
    ]


def test_the_figure_shows_the_image_the_tiles_and_boxes_of_what_is_present():
    image = Image.new("RGB", (48, 32), "orange")
    figure = plot_explanation(image, RECORDS)
    assert drawn(figure).std() > 0
    tiles = [axis for axis in figure.axes if axis.images]
    assert [axis.get_title() for axis in tiles] == ["a wizard", *map(describe, RECORDS)]
    assert [len(axis.patches) for axis in tiles] == [0, 2, 0, 2]  # a white edge under each coloured one
    assert tiles[1].title.get_color() == tiles[2].title.get_color() == FOR and tiles[3].title.get_color() == AGAINST
    bars = [axis.patches[0].get_width() for axis in figure.axes if axis.patches and not axis.images]
    assert bars == pytest.approx([1.0, 0.7 / 1.5, -0.4])
    heat = tiles[1].images[1]
    numpy.testing.assert_allclose(heat.get_array(), RECORDS[0].heatmap)
    numpy.testing.assert_allclose(heat.get_alpha(), 0.75 * RECORDS[0].heatmap)


def test_any_kind_of_image_will_do_and_one_of_another_size_will_not():
    pil = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=numpy.uint8))
    array = numpy.asarray(pil)
    kinds = (pil, array, array / 255.0, torch.tensor(array), torch.tensor(array / 255.0).permute(2, 0, 1))
    first = None
    for image in kinds:
        figure = plot_explanation(image, RECORDS, title="t", max_concepts=2)
        assert len([axis for axis in figure.axes if axis.images]) == 3
        shown = numpy.asarray(figure.axes[0].images[0].get_array(), dtype=float)
        first = shown if first is None else first
        numpy.testing.assert_allclose(shown, first, atol=1e-6)
    with pytest.raises(ValueError, match="image_size"):
        plot_explanation(array[:30], RECORDS)
    with pytest.raises(ValueError, match="no records"):
        plot_explanation(array, [])
