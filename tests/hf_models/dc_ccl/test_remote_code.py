"""A DC-CCL model and its device package go to the loopback Hub and come back to somebody who never installed us."""

import json

import pytest
import torch

from tests.bare_environment import bare_python
from tests.hf_models.dc_ccl.tiny_dc_ccl import images, tiny, tiny_lm, tokens
from tests.hub.client import PYTHONS, run_client
from tests.hub.server import LoopbackHub


TOKEN = "hf_fake_of_alice"
CODE = {"configuration_dc_ccl.py", "joint_cache.py", "modeling_dc_ccl.py", "shared_encoder.py"}
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[2])
HfApi().upload_folder(repo_id=sys.argv[2], folder_path=sys.argv[1])
"""
AS_A_STRANGER = """
import importlib.util, json, sys
import torch, transformers

for name in ("hf_models", "sigma_kernels"):
    assert importlib.util.find_spec(name) is None, f"this environment has {name}"
repo, auto_class, inputs, out = sys.argv[1:5]
inputs = torch.load(inputs)
auto_class = getattr(transformers, auto_class)
try:
    auto_class.from_pretrained(repo)
except ValueError as error:
    untrusted = str(error)
model, info = auto_class.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
seen = {"untrusted": untrusted, "class": type(model).__name__}
seen |= {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys")}
with torch.no_grad():
    result = {"logits": model.eval()(inputs).logits, "device": model(inputs, branch="device").logits}
if inputs.dtype == torch.long:
    result["text"] = model.generate(inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
if hasattr(model, "device_package"):
    package = model.device_package()
    result["package"] = package(inputs).logits.detach()
torch.save(result, out + ".pt")
model.save_pretrained(out)
auto_class.from_pretrained(out, trust_remote_code=True)
open(out + ".json", "w").write(json.dumps(seen))
"""
IMAGES, TEXT = "AutoModelForImageClassification", "AutoModelForCausalLM"


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({TOKEN: "alice"}) as hub:
        yield hub


def model_of(kind):
    if kind.startswith("text"):
        return (tiny_lm() if kind == "text" else tiny_lm().device_package()), TEXT, tokens()
    whole = tiny(kind.removesuffix("-device"))
    return (whole.device_package() if kind.endswith("-device") else whole), IMAGES, images()


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["newest", pytest.param("oldest", marks=pytest.mark.oldest)])
@pytest.mark.parametrize("kind", ["vit", "resnet", "whole", "vit-device", "text", "text-device"])
def test_a_stranger_has_what_a_user_of_the_package_has(hub, tmp_path, kind, reader):
    model, auto_class, inputs = model_of(kind)
    saved, repo = tmp_path / "saved", f"alice/{kind}-{reader}"
    model.save_pretrained(saved)
    assert {path.name for path in saved.glob("*.py")} == CODE
    (tmp_path / "publisher").mkdir()
    run_client(PUSH, hub, home=tmp_path / "publisher", token=TOKEN, arguments=[saved, repo], cwd=tmp_path)
    torch.save(inputs, tmp_path / "inputs.pt")
    run_client(
        AS_A_STRANGER,
        hub,
        home=tmp_path / "home",
        token=None,
        python=bare_python(tmp_path / "bare", PYTHONS[reader]),
        arguments=[repo, auto_class, tmp_path / "inputs.pt", tmp_path / "out"],
        cwd=tmp_path,
        env={"PYTHONPATH": ""},
        timeout=300,
    )
    seen, found = json.loads((tmp_path / "out.json").read_text()), torch.load(tmp_path / "out.pt")
    assert "trust_remote_code=True" in seen["untrusted"] and seen["class"] == type(model).__name__
    assert seen["missing_keys"] == seen["unexpected_keys"] == []
    with torch.no_grad():
        expected = {"logits": model(inputs).logits, "device": model(inputs, branch="device").logits}
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-4)
    if "package" in found:
        torch.testing.assert_close(found["package"], expected["device"], rtol=1e-4, atol=1e-4)
    if kind.startswith("text"):
        text = model.generate(inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert torch.equal(found["text"], text)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == CODE


def test_every_saved_model_names_its_classes_and_brings_its_code(tmp_path):
    for kind, prefix in (("vit", "DcCcl"), ("vit-device", "DcCclDevice")):
        model_of(kind)[0].save_pretrained(tmp_path / kind)
        image_class = "DcCclDeviceModel" if kind.endswith("device") else "DcCclForImageClassification"
        assert json.loads((tmp_path / kind / "config.json").read_text())["auto_map"] == {
            "AutoConfig": f"configuration_dc_ccl.{prefix}Config",
            IMAGES: f"modeling_dc_ccl.{image_class}",
            TEXT: f"modeling_dc_ccl.{prefix}ForCausalLM",
        }
        assert {path.name for path in (tmp_path / kind).glob("*.py")} == CODE
