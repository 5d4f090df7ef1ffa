"""What may leave the machine. The conversation with the Hub is in `tests/hub/test_publish_and_load.py`."""

import json
import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from model_cards.build import CardError
from model_cards.inspection import machine_roots
from model_cards.publish import main
from model_cards.publishable import PublishError, collect
from tests.model_cards.tiny_run import TOKEN, write_tiny_run
from trainers.report import read_results, write_results


EXPECTED = {
    *("results.json", "config.json", "generation_config.json", "figures/bits.png"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("configuration_sigma_moe.py", "modeling_sigma_moe.py", "balance.py", "routing_losses.py"),
    *("elastic.py", "neurons.py"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_tiny_run(folder, max_shard_size="20KB")
    return folder


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "tiny")


def snapshot(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_list_is_what_a_repository_needs_and_no_more(run):
    before = snapshot(run)
    publication = collect(run, "alice/tiny")
    shards = set(json.loads((run / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1 and publication.weights == {name: run / name for name in shards}
    evidence = {name for name in publication.contents if name.startswith("figures/evidence_")}
    made = {"README.md", "published_files.json"}
    assert publication.contents.keys() - evidence == EXPECTED | {"model.safetensors.index.json"} | made
    manifest = json.loads(publication.contents["published_files.json"])
    assert set(manifest["files"]) == publication.contents.keys() | shards
    for name in EXPECTED:
        assert publication.contents[name] == (run / name).read_bytes()
    assert {".env", "training_args.bin", "checkpoint-1/", "logs/", "fit.json", "notes.py"} <= set(
        publication.left_here
    )
    assert snapshot(run) == before


def test_the_card_names_the_repository(run):
    (run / "README.md").write_text("an old card")
    card = collect(run, "alice/tiny").contents["README.md"].decode()
    assert 'from_pretrained("alice/tiny")' in card
    assert ModelCard(card).data.model_name == "tiny"


def test_one_file_of_weights_needs_no_index(tmp_path):
    write_tiny_run(tmp_path / "tiny")
    publication = collect(tmp_path / "tiny", "alice/tiny")
    assert publication.weights.keys() == {"model.safetensors"}
    assert "model.safetensors.index.json" not in publication.contents


# -- secrets and paths ------------------------------------------------------------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_weights(run, **metadata):
    shard = sorted(run.glob("*.safetensors"))[0]
    save_file(load_file(shard), shard, metadata={"format": "pt"} | metadata)
    return shard.name


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_a_token_in_a_file_on_the_list_is_refused_by_the_name_of_the_file(run, name):
    edit_json(run / name, note=f"x{TOKEN}")
    with pytest.raises(PublishError, match=f"{name} holds an access token"):
        collect(run, "alice/tiny")


def test_a_secret_of_the_environment_is_recognised_whatever_its_shape(run, monkeypatch):
    monkeypatch.setenv("TRACKER_API_KEY", "0123456789abcdefghij")
    edit_json(run / "config.json", note="0123456789abcdefghij")
    with pytest.raises(PublishError, match="config.json holds an access token"):
        collect(run, "alice/tiny")


def test_a_token_in_code_or_in_the_header_of_the_weights_is_refused(run):
    with open(run / "balance.py", "a") as code:
        code.write(f"# {TOKEN}\n")
    shard = rewrite_weights(run, note=TOKEN)
    with pytest.raises(PublishError) as refusal:
        collect(run, "alice/tiny")
    assert "balance.py holds an access token" in str(refusal.value)
    assert f"{shard} holds an access token" in str(refusal.value)


@pytest.mark.parametrize("where", ["config.json", "weights"])
def test_a_path_of_this_machine_is_refused(run, where):
    if where == "weights":
        where = rewrite_weights(run, source=str(run))
    else:
        edit_json(run / where, note=f"trained from {run / 'data'} on")
    with pytest.raises(PublishError, match=f"{where} holds a path of this machine"):
        collect(run, "alice/tiny")


@pytest.mark.parametrize(
    "path", ["/mnt/nas/customers/corpus.txt", "/srv/alice/secret", "C:\\Users\\me\\x", "~/data/x", "file:///a/b"]
)
@pytest.mark.parametrize("where", ["config.json", "results.json"])
def test_any_absolute_path_is_refused_where_nobody_is_quoted(run, where, path):
    if where == "results.json":
        results = read_results(run)
        results.evidence["corpus"] = [path]
        write_results(run, results)
    else:
        edit_json(run / where, note={"nested": [path]})
    with pytest.raises((PublishError, CardError), match=re.escape(path)):
        collect(run, "alice/tiny")


def test_what_a_model_wrote_may_name_folders_that_everybody_has(run):
    results = read_results(run)
    results.samples[0].completion = "/usr/share/dict/words"
    write_results(run, results)
    assert b"/usr/share/dict/words" in collect(run, "alice/tiny").contents["results.json"]


def test_the_folders_of_the_user_are_found_inside_of_text(run, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/alices"))
    with open(run / "balance.py", "a") as code:
        code.write("# see /alices/notes\n")
    with pytest.raises(PublishError, match="balance.py holds a path of this machine"):
        collect(run, "alice/tiny")


def test_one_folder_alone_names_no_machine(monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: Path("/"))
    assert machine_roots(Path("/usr"), Path("/usr/lib"), Path("/srv/alice/x/y")) == {"/usr/lib", "/srv/alice"}


def test_a_token_without_any_shape_is_known_by_its_value(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "correct-horse")
    edit_json(run / "config.json", note="a correct-horse b")
    with pytest.raises(PublishError, match="config.json holds an access token"):
        collect(run, "alice/tiny")


def test_a_token_behind_an_escape_of_json_is_read_as_json_reads_it(run):
    edit_json(run / "config.json", note="PLACE")
    escaped = "\\u0068" + TOKEN[1:]
    (run / "config.json").write_text((run / "config.json").read_text().replace("PLACE", escaped))
    assert json.loads((run / "config.json").read_text())["note"] == TOKEN
    with pytest.raises(PublishError, match="config.json holds an access token"):
        collect(run, "alice/tiny")


# -- files that are not what they should be ---------------------------------------------------------------------------


def test_a_pickle_under_another_name_is_refused(run):
    (run / "tokenizer.json").write_bytes(pickle.dumps({"a": 1}))
    (run / "figures" / "bits.png").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PublishError) as refusal:
        collect(run, "alice/tiny")
    assert "tokenizer.json is not valid" in str(refusal.value)
    assert "figures/bits.png is not a PNG" in str(refusal.value)


@pytest.mark.parametrize("name", ["figures/bits.png", "chat_template.jinja", "generation_config.json"])
def test_a_pickle_behind_or_inside_another_file_is_refused(run, name):
    before = (run / name).read_bytes() if name.endswith((".png", ".json")) else b""
    (run / name).write_bytes(before + pickle.dumps({"a": 1}, protocol=0))
    with pytest.raises(PublishError, match=f"{name} is not (a PNG|valid)|{name} is a pickle"):
        collect(run, "alice/tiny")


def test_text_with_nul_bytes_is_refused(run):
    (run / "chat_template.jinja").write_bytes(b"a\0b")
    with pytest.raises(PublishError, match="chat_template.jinja holds NUL bytes"):
        collect(run, "alice/tiny")


@pytest.mark.parametrize("path", ["training_args.bin", "customers.csv", "figures/x.svg", "checkpoint-1/optimizer.pt"])
def test_a_figure_is_a_png_in_its_folder_and_nothing_else(run, path):
    results = read_results(run)
    results.figures[0].path = path
    write_results(run, results)
    with pytest.raises(PublishError, match=f"{path} of results.json is no figure"):
        collect(run, "alice/tiny")


@pytest.mark.parametrize("fields", [{"auto_map": ["x"]}, {"model_type": ["x"]}, {"model_type": None}])
def test_a_malformed_config_is_a_message_and_no_traceback(run, fields):
    edit_json(run / "config.json", **fields)
    with pytest.raises(PublishError, match="config.json has a malformed auto_map or model_type"):
        collect(run, "alice/tiny")


def test_weights_that_change_after_they_were_checked_are_not_sent(run):
    publication = collect(run, "alice/tiny")
    publication.check_unchanged()
    shard = sorted(publication.weights)[0]
    (run / shard).unlink()
    (run / shard).symlink_to(run / "training_args.bin")
    with pytest.raises(PublishError, match=f"{shard} changed while it was being published"):
        publication.check_unchanged()


def test_weights_that_are_a_pickle_are_refused(run):
    shard = sorted(run.glob("*.safetensors"))[0]
    shard.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(PublishError, match=f"{shard.name} is damaged"):
        collect(run, "alice/tiny")


@pytest.mark.parametrize("name", ["../model.safetensors", "/model.safetensors", "sub/model.safetensors"])
def test_a_tampered_index_is_refused(run, name):
    index = run / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"][next(iter(content["weight_map"]))] = name
    index.write_text(json.dumps(content))
    with pytest.raises(PublishError, match="is not a plain file name"):
        collect(run, "alice/tiny")


def test_links_are_refused(run, tmp_path):
    (tmp_path / "elsewhere.json").write_text("{}")
    (run / "generation_config.json").unlink()
    (run / "generation_config.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(PublishError, match="generation_config.json is a link"):
        collect(run, "alice/tiny")


def test_a_figures_folder_that_is_a_link_is_refused(run, tmp_path):
    os.replace(run / "figures", tmp_path / "figures")
    (run / "figures").symlink_to(tmp_path / "figures")
    with pytest.raises(PublishError, match="figures/bits.png is a link"):
        collect(run, "alice/tiny")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tokenizer.json"], "there is no tokenizer"),
        (["config.json"], "config.json is missing"),
        (["balance.py"], "balance.py is missing"),
        (["figures/bits.png"], "figures/bits.png cannot be read"),
        (["model.safetensors.index.json"], "has neither model.safetensors nor"),
    ],
)
def test_a_missing_file_is_named(run, names, message):
    for name in names:
        (run / name).unlink()
    with pytest.raises(PublishError, match=message):
        collect(run, "alice/tiny")


def test_an_unfinished_run_is_refused(run, capsys):
    (run / "results.json").unlink()
    assert main([str(run), "--repo-id", "alice/tiny", "--dry-run"]) == 2
    assert "is not the folder of a finished run" in capsys.readouterr().err


def test_a_repository_that_nobody_could_load_is_refused(run):
    edit_json(run / "config.json", auto_map=None)
    with pytest.raises(PublishError, match="nobody could load"):
        collect(run, "alice/tiny")


def test_code_of_another_repository_is_refused(run):
    auto_map = json.loads((run / "config.json").read_text())["auto_map"]
    edit_json(run / "config.json", auto_map=auto_map | {"AutoModel": "mallory/x--modeling_sigma_moe.SigmaMoeModel"})
    with pytest.raises(PublishError, match="mallory/x"):
        collect(run, "alice/tiny")


# -- the command ------------------------------------------------------------------------------------------------------


def test_dry_run_lists_what_goes_and_what_stays_and_asks_nobody(run, capsys):
    before = snapshot(run)
    assert main([str(run), "--repo-id", "alice/tiny", "--dry-run"]) == 0
    goes, stays = capsys.readouterr().out.split("stay here: ")
    assert all(f"  {name} " in goes for name in EXPECTED)
    assert "training_args.bin" in stays and "training_args.bin" not in goes
    assert snapshot(run) == before


@pytest.mark.parametrize("repo_id", ["tiny", "alice/", "alice/ti ny", "a/b/c"])
def test_a_bad_id_is_refused_before_anything_is_read(repo_id, tmp_path, capsys):
    assert main([str(tmp_path / "nothing"), "--repo-id", repo_id, "--dry-run"]) == 1
    assert "--repo-id" in capsys.readouterr().err
