"""m3BERT goes to the Hub and comes back, whole or cut, to somebody who never installed us."""

import json

import pytest
import torch

import hf_models  # noqa: F401
from hf_models.m3bert import (
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
)
from tests.bare_environment import bare_python
from tests.hf_models.m3bert.tiny_m3bert import IDS, KINDS, MASK, tiny
from tests.hub.client import PYTHONS, run_client
from tests.hub.server import LoopbackHub
from tests.hub.test_publish_and_load import READERS, ROOT, loaded_elsewhere
from tests.model_cards.tiny_run import TOKEN


pytestmark = pytest.mark.slow

HEADS = {
    "AutoModelForSequenceClassification": M3BertForSequenceClassification,
    "AutoModelForTokenClassification": M3BertForTokenClassification,
    "AutoModelForTextEncoding": M3BertForSentenceEmbedding,
    "AutoModelForMaskedLM": M3BertForMaskedLM,
    "AutoModel": M3BertModel,
}
CODE = {"configuration_m3bert.py", "modeling_m3bert.py", "grid_loss.py", "prefixes.py", "truncation.py"}
SAVE = """
import sys, torch
import hf_models
from hf_models.m3bert import M3BertForMaskedLM
from tests.hf_models.m3bert.tiny_m3bert import KINDS, tiny
tiny(M3BertForMaskedLM, **KINDS[sys.argv[1]]).save_pretrained(sys.argv[2], max_shard_size="12KB")
"""
PUSH = """
import sys
from huggingface_hub import HfApi
HfApi().create_repo(sys.argv[1])
HfApi().upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2])
"""
AS_A_STRANGER = """
import importlib.util, json, sys
import torch, transformers

assert importlib.util.find_spec("hf_models") is None, "this environment has the package"
assert importlib.util.find_spec("sigma_kernels") is None, "this environment has the kernels"
repo, out = sys.argv[1:3]
ids, mask = map(torch.tensor, json.loads(sys.argv[3]))
report, tensors = {"transformers": transformers.__version__}, {}
for name in sys.argv[4:]:
    auto = getattr(transformers, name)
    seen = report[name] = {}
    try:
        auto.from_pretrained(repo)
    except ValueError as error:
        seen["untrusted"] = str(error)
    model, info = auto.from_pretrained(repo, trust_remote_code=True, output_loading_info=True)
    seen["class"], seen["from"] = type(model).__name__, type(model).__module__.partition(".")[0]
    seen["missing"], seen["unexpected"] = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    seen["is its config"] = isinstance(model.config, type(model).config_class)
    with torch.no_grad():
        if not info["missing_keys"]:
            tensors[name] = model(ids, attention_mask=mask)[0]
            tensors[name + " cut"] = model.truncate(4, 8)(ids, attention_mask=mask)[0]
        model.set_attn_implementation("eager")
        seen["finite"] = bool(model(ids, attention_mask=mask)[0].isfinite().all())
model = transformers.AutoModelForMaskedLM.from_pretrained(repo, trust_remote_code=True).eval()
loss = model(ids, attention_mask=mask, labels=ids).loss
loss.backward()
tensors["loss"] = loss.detach()
try:
    transformers.AutoModel.from_pretrained(repo, trust_remote_code=True, num_layers=3)
except ValueError as error:
    report["refused"] = str(error)
model.save_pretrained(out + "-again")
again = transformers.AutoModel.from_pretrained(out + "-again", trust_remote_code=True)
report["again"] = type(again).__name__
torch.save(tensors, out + ".pt")
with open(out + ".json", "w") as file:
    json.dump(report, file)
"""
CUT = """
import importlib.util, json, sys
import torch, transformers
assert importlib.util.find_spec("hf_models") is None
repo, out = sys.argv[1:3]
ids, mask = map(torch.tensor, json.loads(sys.argv[3]))
auto = transformers.AutoModelForMaskedLM
model = auto.from_pretrained(repo, trust_remote_code=True, num_layers=2, embed_dim=8)
with torch.no_grad():
    torch.save(model(ids, attention_mask=mask)[0], out)
"""
INPUTS = json.dumps([IDS.tolist(), MASK.tolist()])


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({TOKEN: "alice"}) as hub:
        yield hub


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def publish(hub, kind, folder, repo, python):
    settings = {"PYTHONPATH": str(ROOT)}
    run = folder / "run"
    run_client(SAVE, hub, home=folder, token=None, python=python, arguments=[kind, run], cwd=ROOT, env=settings)
    run_client(PUSH, hub, home=folder, token=TOKEN, arguments=[repo, run])
    return run


def bare(folder, python):
    (folder / "bare").mkdir(parents=True)
    return bare_python(folder / "bare", python)


def assert_a_stranger_has_it_all(hub, kind, repo, run, folder, python):
    arguments = [repo, folder / "out", INPUTS, *HEADS]
    loaded_elsewhere(hub, AS_A_STRANGER, *arguments, home=folder, python=bare(folder, python))
    report = json.loads((folder / "out.json").read_text())
    tensors = torch.load(folder / "out.pt", weights_only=True)
    head = M3BertForMaskedLM.from_pretrained(run)
    for name, model_class in HEADS.items():
        seen = report[name]
        assert "trust_remote_code=True" in seen["untrusted"]
        assert (seen["class"], seen["from"]) == (model_class.__name__, "transformers_modules")
        assert seen["is its config"] is True and seen["finite"] is True
        assert all(key.startswith("score.") for key in seen["missing"])
        assert bool(seen["missing"]) == ("Classification" in name)
        assert all(key.startswith("head.") for key in seen["unexpected"])
        assert bool(seen["unexpected"]) == (model_class is not M3BertForMaskedLM)
    encoder = M3BertForSentenceEmbedding.from_pretrained(run)
    with torch.no_grad():
        for name, model in (("", head.model), ("ForMaskedLM", head), ("ForTextEncoding", encoder)):
            cut = model(IDS, attention_mask=MASK, exit_layer=4, embed_dim=8)[0]
            for suffix, expected in (("", model(IDS, attention_mask=MASK)[0]), (" cut", cut)):
                found = tensors[f"AutoModel{name}{suffix}"]
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        loss = head(IDS, attention_mask=MASK, labels=IDS).loss  # the stranger's without the kernels
    torch.testing.assert_close(tensors["loss"], loss, rtol=1e-5, atol=1e-5)
    assert "layer 3 is none of the trained mrl_layers=[2, 4, 6]" in report["refused"]
    again = folder / "out-again"
    assert report["again"] == "M3BertModel" and {path.name for path in again.glob("*.py")} == CODE
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((run / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *HEADS}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.compatibility("Remote code, without this package", method="m3bert")
@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method="m3bert",
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_a_stranger_has_what_a_user_of_the_package_has(hub, kind, tmp_path, reader):
    repo = f"alice/{kind}-{reader}".replace(" ", "-")
    run = publish(hub, kind, tmp_path, repo, PYTHONS["newest"])
    assert {file for file in hub.files(repo) if file.endswith(".py")} == CODE
    assert_a_stranger_has_it_all(hub, kind, repo, run, tmp_path / "reader", PYTHONS[reader])


@pytest.mark.oldest
def test_what_the_oldest_versions_save_loads_under_the_newest(hub, kind, tmp_path):
    repo = f"alice/oldest-{kind}".replace(" ", "-")
    run = publish(hub, kind, tmp_path, repo, PYTHONS["oldest"])
    assert json.loads((run / "config.json").read_text())["transformers_version"].startswith("5.18.")
    assert_a_stranger_has_it_all(hub, kind, repo, run, tmp_path / "reader", PYTHONS["newest"])


def test_a_cut_model_downloads_only_the_shards_that_it_needs(hub, tmp_path):
    repo = "alice/cut"
    run = publish(hub, "ours", tmp_path, repo, PYTHONS["newest"])
    weights = json.loads((run / "model.safetensors.index.json").read_text())["weight_map"]
    whole = tiny(M3BertForMaskedLM)
    needed = {shard for name, shard in weights.items() if name in whole.truncate(2, 8).state_dict()}
    before = len(hub.requests)
    reader = tmp_path / "reader"
    arguments = [repo, reader / "out.pt", INPUTS]
    loaded_elsewhere(hub, CUT, *arguments, home=reader, python=bare(reader, PYTHONS["newest"]))
    asked = {shard for shard in weights.values() if any(shard in request.path for request in hub.requests[before:])}
    assert asked == needed < set(weights.values())
    with torch.no_grad():
        expected = whole(IDS, attention_mask=MASK, exit_layer=2, embed_dim=8)[0]
    torch.testing.assert_close(torch.load(reader / "out.pt", weights_only=True), expected, rtol=1e-5, atol=1e-5)
