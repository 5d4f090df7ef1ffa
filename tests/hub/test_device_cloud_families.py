"""CTR, DC-CCL and personal models are pushed to one Hub, and their ids are enough, with and without this package."""

import pytest
import torch

from tests.bare_environment import bare_python
from tests.hf_models.ctr import tiny_ctr
from tests.hf_models.dc_ccl import tiny_dc_ccl
from tests.hf_models.personal_lm import tiny_personal_lm
from tests.hub.client import PYTHONS, call_client
from tests.hub.server import LoopbackHub
from tests.hub.test_publish_and_load import ROOT
from tests.model_cards.tiny_run import TOKEN


pytestmark = pytest.mark.slow

AUTO = {
    "ctr": "AutoModelForSequenceClassification",
    "dc-ccl": "AutoModelForImageClassification",
    "dc-ccl-device": "AutoModelForImageClassification",
    "personal-lm": "AutoModelForCausalLM",
}
CODE = {
    "ctr": {"configuration_ctr.py", "modeling_ctr.py", "fields.py", "interactions.py", "outputs.py"},
    "dc-ccl": {"configuration_dc_ccl.py", "modeling_dc_ccl.py", "joint_cache.py", "shared_encoder.py"},
    "personal-lm": {"configuration_personal_lm.py", "modeling_personal_lm.py", "user_tokens.py"},
}
CODE["dc-ccl-device"] = CODE["dc-ccl"]


# The two functions run in processes of their own, where they import what they need: a client knows one Hub only.


def push(folder, auto_classes):
    """Each model by one call of the library's, and once more."""
    import transformers

    import hf_models  # noqa: F401

    for name, auto in auto_classes.items():
        model = getattr(transformers, auto).from_pretrained(f"{folder}/{name}")
        for _ in range(2):
            model.push_to_hub(f"alice/{name}")


def pull(folder, auto_classes, trust):
    """What a user sees of each repository; logits go to a file."""
    import importlib.util
    import json

    import torch
    import transformers

    if trust:
        assert importlib.util.find_spec("hf_models") is None, "this environment has the package"
    else:
        import hf_models  # noqa: F401
    seen, logits = {}, {}
    batches = torch.load(f"{folder}/inputs.pt")
    for name, auto in auto_classes.items():
        auto, repo = getattr(transformers, auto), f"alice/{name}"
        refused = ""
        if trust:
            try:
                auto.from_pretrained(repo)
            except ValueError as error:
                refused = str(error)
        model, info = auto.from_pretrained(repo, trust_remote_code=trust, output_loading_info=True)
        with torch.no_grad():
            logits[name] = model.eval()(**batches[name]).logits
        keys = sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
        seen[name] = [type(model).__name__, type(model).__module__.split(".")[0], refused, keys]
    torch.save(logits, f"{folder}/logits-{trust}.pt")
    return json.loads(json.dumps(seen))


def models_and_inputs():
    dc_ccl = tiny_dc_ccl.tiny("vit")
    images = {"pixel_values": tiny_dc_ccl.images()}
    texts = tiny_personal_lm.texts() | {"user_embeds": tiny_personal_lm.draws(2, tokens=2)}
    return {
        "ctr": (tiny_ctr.tiny("din"), tiny_ctr.batch(labels=False)),
        "dc-ccl": (dc_ccl, images),
        "dc-ccl-device": (dc_ccl.device_package(), images),
        "personal-lm": (tiny_personal_lm.language_model("llama"), texts),
    }


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """The Hub after the push, the folder of models and inputs, and the models."""
    folder = tmp_path_factory.mktemp("pushed")
    models = models_and_inputs()
    for name, (model, _) in models.items():
        model.save_pretrained(folder / name)
    torch.save({name: inputs for name, (_, inputs) in models.items()}, folder / "inputs.pt")
    with LoopbackHub({TOKEN: "alice"}) as hub:
        options = {"home": folder / "writer", "token": TOKEN, "cwd": ROOT, "env": {"PYTHONPATH": str(ROOT)}}
        call_client(push, hub, str(folder), AUTO, **options)
        yield hub, folder, models


def assert_alike(seen, folder, models, trust):
    logits = torch.load(folder / f"logits-{trust}.pt")
    for name, (model, inputs) in models.items():
        kind, package, refused, keys = seen[name]
        assert (kind, keys) == (type(model).__name__, [])
        assert package == ("transformers_modules" if trust else "hf_models")
        assert ("trust_remote_code=True" in refused) == trust
        with torch.no_grad():
            torch.testing.assert_close(logits[name], model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_a_push_holds_safetensors_and_the_familys_code_and_a_second_one_changes_nothing(pushed):
    hub, _, models = pushed
    for name in models:
        files = set(hub.files(f"alice/{name}"))
        assert {file for file in files if file.endswith(".py")} == CODE[name]
        assert {"config.json", "model.safetensors"} <= files
        assert not [file for file in files if file.endswith((".bin", ".pt", ".pkl"))]
        assert len([commit for commit in hub.commits(f"alice/{name}") if commit.summary.startswith("Upload")]) == 1


def test_a_device_package_holds_nothing_of_the_cloud(pushed):
    hub, folder, _ = pushed
    content = (folder / "dc-ccl-device" / "model.safetensors").read_bytes()
    assert b"co_submodel" in content and b"cloud_submodel" not in content
    assert "cloud_config" not in (folder / "dc-ccl-device" / "config.json").read_text()


@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method=["ctr", "dc_ccl", "personal_lm"],
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_with_the_package_nobody_needs_to_trust_code(pushed, tmp_path):
    hub, folder, models = pushed
    options = {"home": tmp_path, "token": None, "cwd": ROOT, "env": {"PYTHONPATH": str(ROOT)}}
    assert_alike(call_client(pull, hub, str(folder), AUTO, False, **options), folder, models, False)


@pytest.mark.parametrize("reader", ["newest", pytest.param("oldest", marks=pytest.mark.oldest)])
@pytest.mark.compatibility("Remote code, without this package", method=["ctr", "dc_ccl", "personal_lm"])
@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method=["ctr", "dc_ccl", "personal_lm"],
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_without_it_the_repositories_bring_their_code(pushed, tmp_path, reader):
    hub, folder, models = pushed
    (tmp_path / "empty").mkdir()
    bare = bare_python(tmp_path / "bare", PYTHONS[reader])
    options = {"home": tmp_path / "home", "token": None, "python": bare, "cwd": tmp_path / "empty", "timeout": 300}
    seen = call_client(pull, hub, str(folder), AUTO, True, env={"PYTHONPATH": ""}, **options)
    assert_alike(seen, folder, models, True)
