"""A CTR model goes to the Hub, the loopback one, and comes back to somebody who never installed us."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.bare_environment import bare_python
from tests.hf_models.ctr.tiny_ctr import ARCHITECTURES, batch, tiny
from tests.hub.client import PYTHONS, run_client
from tests.hub.server import LoopbackHub


TOKEN = "hf_fake_of_alice"
CODE = {"configuration_ctr.py", "modeling_ctr.py", "fields.py", "interactions.py", "outputs.py"}
PUSH = """
import sys
from huggingface_hub import HfApi
for folder, repo in zip(sys.argv[1::2], sys.argv[2::2]):
    HfApi().create_repo(repo)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
"""
AS_A_STRANGER = """
import importlib.util, json, sys
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

for name in ("hf_models", "sigma_kernels"):
    assert importlib.util.find_spec(name) is None, f"this environment has {name}"
inputs, out, *repos = sys.argv[1:]
inputs = torch.load(inputs)
seen, logits = {}, {}
for repo in repos:
    try:
        AutoModelForSequenceClassification.from_pretrained(repo)
    except ValueError as error:
        untrusted = str(error)
    options = {"trust_remote_code": True, "output_loading_info": True}
    body, missing = AutoModel.from_pretrained(repo, **options)
    model, info = AutoModelForSequenceClassification.from_pretrained(repo, **options)
    seen[repo] = [type(body).__name__, type(model).__name__, untrusted]
    seen[repo] += [sorted(missing["missing_keys"]), sorted(info["missing_keys"]), sorted(info["unexpected_keys"])]
    with torch.no_grad():
        logits[repo] = model.eval()(**inputs).logits
    model.save_pretrained(out)
    AutoModelForSequenceClassification.from_pretrained(out, trust_remote_code=True)
torch.save(logits, out + ".pt")
open(out + ".json", "w").write(json.dumps(seen))
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", ["newest", pytest.param("oldest", marks=pytest.mark.oldest)])
def test_a_stranger_has_what_a_user_of_the_package_has(tmp_path, reader):
    inputs = batch()
    torch.save(inputs, tmp_path / "inputs.pt")
    models = {f"alice/{name.replace('_', '-')}": tiny(name) for name in ARCHITECTURES}
    pushed = []
    for repo, model in models.items():
        model.save_pretrained(tmp_path / repo)
        assert {path.name for path in (tmp_path / repo).glob("*.py")} == CODE
        pushed += [tmp_path / repo, repo]
    (tmp_path / "publisher").mkdir()
    with LoopbackHub({TOKEN: "alice"}) as hub:
        run_client(PUSH, hub, home=tmp_path / "publisher", token=TOKEN, arguments=pushed, cwd=tmp_path)
        run_client(
            AS_A_STRANGER,
            hub,
            home=tmp_path / "home",
            token=None,
            python=bare_python(tmp_path / "bare", PYTHONS[reader]),
            arguments=[tmp_path / "inputs.pt", tmp_path / "out", *models],
            cwd=tmp_path,
            env={"PYTHONPATH": ""},
            timeout=300,
        )
    seen, logits = json.loads((tmp_path / "out.json").read_text()), torch.load(tmp_path / "out.pt")
    for repo, model in models.items():
        body, head, untrusted, *keys = seen[repo]
        assert (body, head, keys) == ("CtrModel", "CtrForCtrPrediction", [[], [], []])
        assert "trust_remote_code=True" in untrusted
        torch.testing.assert_close(logits[repo], model(**inputs).logits)
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == CODE


def test_every_saved_model_names_both_of_its_classes_and_carries_its_code(tmp_path):
    tiny("din").model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_ctr.CtrConfig",
        "AutoModel": "modeling_ctr.CtrModel",
        "AutoModelForSequenceClassification": "modeling_ctr.CtrForCtrPrediction",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path).config.architecture == "din"
