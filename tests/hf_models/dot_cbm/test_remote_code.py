"""A DOT-CBM goes to the Hub, the loopback one, and comes back to somebody who never installed us."""

import json

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_models.dot_cbm import image_processor_for
from tests.bare_environment import bare_python
from tests.hf_models.dot_cbm.tiny_dot_cbm import images, tiny
from tests.hub.client import PYTHONS, run_client
from tests.hub.server import LoopbackHub


TOKEN = "hf_fake_of_alice"
CODE = {
    *("configuration_dot_cbm.py", "modeling_dot_cbm.py", "activation_statistics.py", "adapters.py", "backbone.py"),
    *("concept_bank.py", "explaining.py", "explanation.py", "interventions.py", "marginals.py", "objective.py"),
    *("orthogonality.py", "outputs.py"),
    *("readouts.py", "saliency.py", "transport.py"),
}
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[2])
HfApi().upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])
"""
AS_A_STRANGER = """
import importlib.util, json, sys
import torch, transformers
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

for name in ("hf_models", "sigma_kernels"):
    assert importlib.util.find_spec(name) is None, f"this environment has {name}"
repo, pixels, out = sys.argv[1:4]
pixels = torch.load(pixels)
AutoImageProcessor.from_pretrained(repo)
seen = {"transformers": transformers.__version__}
try:
    AutoModelForImageClassification.from_pretrained(repo)
except ValueError as error:
    seen["untrusted"] = str(error)
options = {"trust_remote_code": True, "output_loading_info": True}
body, info = AutoModel.from_pretrained(repo, **options)
seen["body"], seen["body missing"] = type(body).__name__, sorted(info["missing_keys"])
model, info = AutoModelForImageClassification.from_pretrained(repo, **options)
seen["head"], seen["missing"], seen["unexpected"] = (
    type(model).__name__, sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
)
wanted = torch.full((5,), float("nan"))
wanted[1] = 1.0
seen["boxes"] = [[record.box for record in records] for records in model.eval().explain(pixels)]
seen["names"] = model.config.concept_names
with torch.no_grad():
    result = {"logits": model(pixels).logits, "intervened": model(pixels, interventions=wanted).logits}
    result["concepts"] = body.eval()(pixels).concept_logits
torch.save(result, out + ".pt")
model.save_pretrained(out)
AutoModelForImageClassification.from_pretrained(out, trust_remote_code=True)
open(out + ".json", "w").write(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({TOKEN: "alice"}) as hub:
        yield hub


def stranger_sees(hub, repo, folder, python):
    torch.save(images(), folder / "pixels.pt")
    bare = bare_python(folder / "bare", python)
    run_client(
        AS_A_STRANGER,
        hub,
        home=folder / "home",
        token=None,
        python=bare,
        arguments=[repo, folder / "pixels.pt", folder / "out"],
        cwd=folder,
        env={"PYTHONPATH": ""},
        timeout=300,
    )
    return json.loads((folder / "out.json").read_text()), torch.load(folder / "out.pt")


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["newest", pytest.param("oldest", marks=pytest.mark.oldest)])
@pytest.mark.parametrize("readout", ["conditional", "cem"])
def test_a_stranger_has_what_a_user_of_the_package_has(hub, tmp_path, reader, readout):
    saved, repo = tmp_path / "saved", f"alice/{readout}-{reader}"
    model = tiny("dinov2_with_registers", readout=readout)
    model.save_pretrained(saved)
    image_processor_for(model.config).save_pretrained(saved)
    assert {path.name for path in saved.glob("*.py")} == CODE
    (tmp_path / "publisher").mkdir()
    run_client(PUSH, hub, home=tmp_path / "publisher", token=TOKEN, arguments=[saved, repo], cwd=tmp_path)
    seen, tensors = stranger_sees(hub, repo, tmp_path, PYTHONS[reader])
    assert "trust_remote_code=True" in seen["untrusted"]
    assert (seen["body"], seen["head"]) == ("DotCbmModel", "DotCbmForImageClassification")
    assert seen["missing"] == seen["unexpected"] == seen["body missing"] == []
    assert seen["names"] == model.config.concept_names
    own = AutoModelForImageClassification.from_pretrained(saved)
    wanted = torch.tensor([float("nan"), 1.0, *[float("nan")] * 3])
    expected = {"logits": own(images()).logits, "intervened": own(images(), interventions=wanted).logits}
    expected["concepts"] = own.model(images()).concept_logits
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-4)
    assert seen["boxes"] == [[list(r.box) if r.box else None for r in records] for records in own.explain(images())]
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == CODE


WRITE = """
import sys
import torch
from tests.hf_models.dot_cbm.tiny_dot_cbm import images, tiny
model = tiny()
model.save_pretrained(sys.argv[1])
torch.save(model(images()).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.oldest
def test_what_the_oldest_versions_save_loads_under_the_newest(hub, tmp_path):
    from tests.hub.test_publish_and_load import ROOT

    run_client(
        WRITE,
        hub,
        home=tmp_path,
        token=None,
        python=PYTHONS["oldest"],
        arguments=[tmp_path / "saved", tmp_path / "logits.pt"],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
    )
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert written["transformers_version"].startswith("5.18."), "OLDEST_PYTHON is not at the lower bound"
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(model(images()).logits, torch.load(tmp_path / "logits.pt"), rtol=1e-4, atol=1e-4)


def test_every_saved_model_names_both_of_its_classes(tmp_path):
    tiny(readout="vanilla").model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_dot_cbm.DotCbmConfig",
        "AutoModel": "modeling_dot_cbm.DotCbmModel",
        "AutoModelForImageClassification": "modeling_dot_cbm.DotCbmForImageClassification",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
