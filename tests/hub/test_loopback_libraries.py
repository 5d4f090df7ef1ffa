"""The libraries that people push with, on the loopback Hub: transformers, peft, datasets, the `hf` command."""

import sys
from pathlib import Path

import pytest

from tests.hub.client import PYTHONS, call_client, run_command
from tests.hub.server import LoopbackHub


TOKEN = "hf_fake_alice"
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
INTERPRETERS = ["newest", pytest.param("oldest", marks=pytest.mark.oldest)]


@pytest.fixture
def hub():
    with LoopbackHub({TOKEN: "alice"}) as hub:
        yield hub


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def push_a_model_twice():
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    for _ in range(2):
        model.push_to_hub("alice/tiny", max_shard_size="20KB", private=True)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.push_to_hub("alice/tiny", max_shard_size="20KB", revision="zero", create_pr=False)
    models = {
        revision: AutoModelForCausalLM.from_pretrained("alice/tiny", revision=revision)
        for revision in ("main", "zero")
    }
    assert all(torch.equal(value, models["zero"].state_dict()[name]) for name, value in model.state_dict().items())
    differing = [
        name for name, value in model.state_dict().items() if not torch.equal(value, models["main"].state_dict()[name])
    ]
    return differing


@pytest.mark.parametrize("end", INTERPRETERS)
def test_a_sharded_model_is_pushed_once_and_loads_by_its_id(hub, home, end):
    options = {"home": home, "token": TOKEN, "python": PYTHONS[end], "env": QUIET}
    assert call_client(push_a_model_twice, hub, **options) == ["lm_head.weight"]
    files = hub.files("alice/tiny")
    shards = [path for path in files if path.endswith(".safetensors")]
    assert len(shards) == 6 and {"config.json", "model.safetensors.index.json", "README.md"} < set(files)
    assert [commit.summary for commit in hub.commits("alice/tiny", "main")] == [
        "Upload LlamaForCausalLM",
        "initial commit",
    ]
    assert len(hub.commits("alice/tiny", "zero")) == 3
    assert len([item for item in hub.requests if item.method == "PUT"]) == 7  # the shards, and the one that changed
    assert hub.repositories["model", "alice/tiny"].private


def push_datasets():
    from datasets import Dataset, DatasetDict, load_dataset

    rows = Dataset.from_dict({"text": ["a", "ü", "c"], "label": [1, 2, 3]})
    rows.push_to_hub("alice/rows", private=True)
    rows.push_to_hub("alice/rows", config_name="other", split="validation")
    DatasetDict(train=rows, test=rows.select([0])).push_to_hub("alice/splits", max_shard_size="1KB")
    assert load_dataset("alice/rows", split="train")[:] == rows[:]
    assert load_dataset("alice/rows", "other")["validation"][:] == rows[:]
    assert [row["text"] for row in load_dataset("alice/rows", split="train", streaming=True)] == ["a", "ü", "c"]
    return {split: len(part) for split, part in load_dataset("alice/splits").items()}


def test_datasets_come_back(hub, home):
    assert call_client(push_datasets, hub, home=home, token=TOKEN) == {"train": 3, "test": 1}
    assert set(hub.files("alice/rows", kind="dataset")) == {
        *(
            ".gitattributes",
            "README.md",
            "data/train-00000-of-00001.parquet",
            "other/validation-00000-of-00001.parquet",
        )
    }


def test_the_command_line(hub, home, tmp_path):
    def hf(*words, **options):
        command = [Path(sys.executable).with_name("hf"), *words]
        return run_command(command, hub, home=home, **{"token": TOKEN} | options)

    assert "alice" in hf("auth", "whoami").stdout
    (tmp_path / "x.txt").write_text("content")
    hf("upload", "alice/model", tmp_path / "x.txt", "sub/x.txt")
    assert hub.files("alice/model")["sub/x.txt"] == b"content"
    hf("download", "alice/model", "--local-dir", tmp_path / "all", token=None)
    assert (tmp_path / "all/sub/x.txt").read_text() == "content"
    failed = hf("download", "alice/model", "missing", check=False)
    assert failed.returncode and "missing" in failed.stderr + failed.stdout
    assert hf("auth", "whoami", token="hf_fake_nobody", check=False).returncode


def use_any_hub_client(folder):
    from huggingface_hub import HfApi, __version__, hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    api = HfApi()
    assert api.whoami()["name"] == "alice"
    api.create_repo("alice/secret", private=True)
    first = api.upload_folder(repo_id="alice/secret", folder_path=folder)
    assert api.upload_folder(repo_id="alice/secret", folder_path=folder).oid == first.oid
    api.create_tag("alice/secret", tag="v1")
    snapshot = snapshot_download("alice/secret", revision="v1")
    for error, function in [
        (EntryNotFoundError, lambda: hf_hub_download("alice/secret", "missing")),
        (
            RepositoryNotFoundError,
            lambda: hf_hub_download("alice/secret", "x.txt", token=False, cache_dir="elsewhere"),
        ),
        (HfHubHTTPError, lambda: api.create_repo("bob/model")),
    ]:
        try:
            function()
            raise SystemExit(f"no {error.__name__}")
        except error:
            pass
    return __version__, snapshot


@pytest.mark.parametrize("end", INTERPRETERS)
def test_files_with_every_client(hub, home, tmp_path, end):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "x.txt").write_bytes(b"text")
    (folder / "w.bin").write_bytes(bytes(range(256)) * 100)
    options = {"home": home, "token": TOKEN, "python": PYTHONS[end], "cwd": tmp_path}
    version, snapshot = call_client(use_any_hub_client, hub, str(folder), **options)
    assert {path.name: path.read_bytes() for path in Path(snapshot).iterdir()} == hub.files("alice/secret", "v1")
    assert hub.repositories["model", "alice/secret"].private
    assert len(hub.commits("alice/secret")) == 2
    assert version.startswith("1.") == (end == "oldest")
