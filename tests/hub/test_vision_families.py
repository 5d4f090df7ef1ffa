"""DOT-CBM is pushed to the Hub with its image processor, and its id is enough for a pipeline, with and without us."""

import pytest
import torch
from PIL import Image

from hf_models.dot_cbm import DotCbmForImageClassification, DotCbmPipeline, image_processor_for
from tests.bare_environment import bare_python
from tests.hf_models.dot_cbm.tiny_dot_cbm import SHAPE, tiny
from tests.hub.client import PYTHONS, call_client
from tests.hub.server import LoopbackHub
from tests.hub.test_publish_and_load import ROOT
from tests.model_cards.tiny_run import TOKEN


pytestmark = pytest.mark.slow

REPO = "alice/concepts"
SIZE = (40, 24)  # width and height of the picture


# The three functions run in processes of their own, where they import what they need: a client knows one Hub only.


def push(folder, repo):
    """By one call for each part, as the library offers it; then the same once more."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    import hf_models  # noqa: F401

    model = AutoModelForImageClassification.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    for _ in range(2):
        model.push_to_hub(repo, max_shard_size="20KB")
        processor.push_to_hub(repo)
    return {"model": type(model).__name__, "processor": type(processor).__name__}


def pull_with_the_package(repo, picture):
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

    from hf_models.dot_cbm import DotCbmPipeline

    image = Image.open(picture)
    model = AutoModelForImageClassification.from_pretrained(repo)  # our class is registered: no code is trusted
    processor = AutoImageProcessor.from_pretrained(repo, backend="pil")
    plain = pipeline("image-classification", model=model, image_processor=processor)
    explaining = pipeline(
        "image-classification", model=model, image_processor=processor, pipeline_class=DotCbmPipeline
    )
    found = explaining(image, top_k_concepts=2)
    records = found["explanation"]
    return {
        "class": [type(model).__module__.split(".")[0], type(model).__name__],
        "plain": plain(image),
        "explained": found["predictions"],
        "records": [[r.concept, r.contribution, list(r.heatmap.shape), list(r.box or ())] for r in records],
    }


def pull_as_a_stranger(repo, picture):
    import importlib.util

    from PIL import Image
    from transformers import pipeline

    assert importlib.util.find_spec("hf_models") is None, "this environment has the package"
    found = pipeline("image-classification", model=repo, trust_remote_code=True)
    model = found.model
    inputs = found.image_processor(Image.open(picture), return_tensors="pt")
    (records,) = model.explain(inputs["pixel_values"], top_k=2)
    return {
        "class": [type(model).__module__.split(".")[0], type(model).__name__],
        "plain": found(Image.open(picture)),
        "records": [[record.concept, record.contribution] for record in records],
    }


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after the push, what it said, the model's folder and a picture."""
    folder = tmp_path_factory.mktemp("pushed")
    model = tiny("clip_vision_model", image_size=[32, 48])
    model.config.id2label = dict(enumerate(("jay", "wren", "robin")))
    model.save_pretrained(folder / "model")
    image_processor_for(model.config).save_pretrained(folder / "model")
    pixels = torch.randint(0, 256, (SIZE[1], SIZE[0], 3), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(folder / "picture.png")
    with LoopbackHub({TOKEN: "alice"}) as hub:
        home = folder / "writer"
        arguments = [str(folder / "model"), REPO]
        said = call_client(push, hub, *arguments, home=home, token=TOKEN, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
        yield hub, said, folder


def expected_of(folder):
    model = DotCbmForImageClassification.from_pretrained(folder / "model")
    pipe = DotCbmPipeline(model=model, image_processor=image_processor_for(model.config))
    return pipe(Image.open(folder / "picture.png"), top_k_concepts=2)


def assert_same_scores(found, expected):
    assert [each["label"] for each in found] == [each["label"] for each in expected]
    assert [each["score"] for each in found] == pytest.approx([each["score"] for each in expected], rel=1e-4)


def test_a_push_holds_the_model_its_code_and_its_image_processor_and_a_second_one_changes_nothing(pushed):
    hub, said, folder = pushed
    assert said["model"] == "DotCbmForImageClassification" and said["processor"].startswith("ViTImageProcessor")
    files = set(hub.files(REPO))
    code = {path.name for path in (folder / "model").glob("*.py")}
    assert code | {"config.json", "preprocessor_config.json", "model.safetensors.index.json"} <= files
    assert {name for name in files if name.endswith(".py")} == code
    assert not [name for name in files if name.endswith((".bin", ".pt"))]
    changes = [commit for commit in hub.commits(REPO) if commit.summary.startswith("Upload")]
    assert len(changes) == 2  # the model, the processor


@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method="dot_cbm",
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_with_the_package_nobody_needs_to_trust_code(pushed, tmp_path):
    hub, _, folder = pushed
    arguments = [REPO, str(folder / "picture.png")]
    options = {"home": tmp_path, "token": None, "cwd": ROOT, "env": {"PYTHONPATH": str(ROOT)}}
    found, expected = call_client(pull_with_the_package, hub, *arguments, **options), expected_of(folder)
    assert found["class"] == ["hf_models", "DotCbmForImageClassification"]
    assert_same_scores(found["plain"], expected["predictions"])
    assert_same_scores(found["explained"], expected["predictions"])
    for (concept, contribution, shape, box), record in zip(found["records"], expected["explanation"], strict=True):
        assert concept == record.concept and concept in SHAPE["concept_names"]
        assert contribution == pytest.approx(record.contribution, rel=1e-3, abs=1e-4)
        assert shape == [SIZE[1], SIZE[0]] and box == list(record.box or ())


@pytest.mark.parametrize("reader", ["newest", pytest.param("oldest", marks=pytest.mark.oldest)])
@pytest.mark.compatibility("Remote code, without this package", method="dot_cbm")
@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method="dot_cbm",
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_without_it_the_repository_brings_all_that_a_pipeline_needs(pushed, tmp_path, reader):
    hub, _, folder = pushed
    (tmp_path / "empty").mkdir()
    bare = bare_python(tmp_path / "bare", PYTHONS[reader])
    options = {"home": tmp_path / "home", "token": None, "python": bare, "cwd": tmp_path / "empty", "timeout": 300}
    arguments = [REPO, str(folder / "picture.png")]
    found = call_client(pull_as_a_stranger, hub, *arguments, env={"PYTHONPATH": ""}, **options)
    expected = expected_of(folder)
    assert found["class"] == ["transformers_modules", "DotCbmForImageClassification"]
    assert_same_scores(found["plain"], expected["predictions"])
    for (concept, contribution), record in zip(found["records"], expected["explanation"], strict=True):
        assert concept == record.concept
        assert contribution == pytest.approx(record.contribution, rel=1e-3, abs=1e-4)
