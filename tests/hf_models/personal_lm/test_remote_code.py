"""A personal model goes to somebody who never installed us, with its code and without anybody's distribution."""

import json
import subprocess
import sys

import pytest
import torch

from tests.bare_environment import bare_python
from tests.hf_models.personal_lm.tiny_personal_lm import classifier, draws, language_model, texts


CODE = {"configuration_personal_lm.py", "modeling_personal_lm.py", "user_tokens.py"}
AS_A_STRANGER = """
import importlib.util, sys
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

for name in ("hf_models", "sigma_kernels"):
    assert importlib.util.find_spec(name) is None, f"this environment has {name}"
folder, batch, out = sys.argv[1:4]
batch = torch.load(batch)
auto = AutoModelForCausalLM if folder.endswith("lm") else AutoModelForSequenceClassification
try:
    auto.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not info["missing_keys"] and not info["unexpected_keys"], info
result = {"logits": model.eval()(**batch).logits.detach()}
if folder.endswith("lm"):
    result["written"] = model.generate(**batch, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
torch.save(result, out)
model.save_pretrained(folder + "_again")
auto.from_pretrained(folder + "_again", trust_remote_code=True)
"""


def test_every_saved_model_names_both_of_its_heads_and_brings_its_code(tmp_path):
    classifier().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_personal_lm.PersonalLmConfig",
        "AutoModelForCausalLM": "modeling_personal_lm.PersonalLmForCausalLM",
        "AutoModelForSequenceClassification": "modeling_personal_lm.PersonalLmForSequenceClassification",
    }
    assert {path.name for path in tmp_path.glob("*.py")} == CODE


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "t5", "lm"])
def test_a_stranger_has_what_a_user_of_the_package_has(tmp_path, kind):
    model = language_model() if kind == "lm" else classifier(kind)
    batch = texts("left") | {"user_embeds": draws(2, 2 if kind == "lm" else 1)}
    folder = tmp_path / f"saved_{kind}"
    model.save_pretrained(folder)
    torch.save(batch, tmp_path / "batch.pt")
    python = bare_python(tmp_path / "bare", sys.executable)
    environment = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
    }
    subprocess.run(
        [python, "-c", AS_A_STRANGER, folder, tmp_path / "batch.pt", tmp_path / "out.pt"],
        check=True,
        cwd=tmp_path,
        env=environment,
        timeout=600,
    )
    seen = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(seen["logits"], model(**batch).logits, rtol=1e-4, atol=1e-5)
    if kind == "lm":
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(seen["written"], model.generate(**batch, **options))
    again = tmp_path / f"saved_{kind}_again"
    assert {path.name for path in again.glob("*.py")} == CODE
