"""A run goes to the Hub and comes back to somebody who never installed us, over HTTP to the loopback Hub."""

import base64
import functools
import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import hf_models  # noqa: F401
from hf_models.moe import (
    SigmaMoeForCausalLM,
    SigmaMoeForSequenceClassification,
    SigmaMoeForTokenClassification,
    SigmaMoeModel,
)
from tests.bare_environment import bare_python
from tests.hub.client import PYTHONS, run_client, run_command
from tests.hub.server import LoopbackHub
from tests.model_cards.tiny_run import TOKEN, write_tiny_run


ROOT = Path(__file__).parents[2]
OTHERS_TOKEN = "hf_fake_of_bob"
READ_TOKEN = "hf_fake_to_read"
REPO = "alice/tiny"
PROMPT = "def area("
HEADS = {
    "AutoModelForSequenceClassification": SigmaMoeForSequenceClassification,
    "AutoModelForTokenClassification": SigmaMoeForTokenClassification,
    "AutoModelForCausalLM": SigmaMoeForCausalLM,
    "AutoModel": SigmaMoeModel,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_tiny_run(folder, max_shard_size="20KB")
    return folder


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({TOKEN: "alice", OTHERS_TOKEN: "bob", READ_TOKEN: "alice"}, read_only={READ_TOKEN}) as hub:
        yield hub


def publish(hub, run, *flags, repo=REPO, token=TOKEN, home, python=sys.executable, check=True):
    home.mkdir(exist_ok=True)
    command = [python, "-m", "model_cards.publish", run, "--repo-id", repo, *flags]
    return run_command(command, hub, home=home, token=token, env={"PYTHONPATH": str(ROOT)}, cwd=home, check=check)


@pytest.fixture(scope="module")
def published(hub, run, tmp_path_factory):
    """The first push, what it sent, and the second push of the same run."""
    home = tmp_path_factory.mktemp("publisher")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first = publish(hub, run, home=home)
    sent, commits = list(hub.requests), hub.commits(REPO)
    again = publish(hub, run, home=home)
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before, "the run folder was touched"
    return {"first": first, "sent": sent, "commits": commits, "again": again, "sent_again": hub.requests[len(sent) :]}


def loaded_elsewhere(hub, code, *arguments, home, token=None, python=sys.executable, env=(), check=True):
    """Run `code` in an empty folder, outside of the tree of this package; what is installed is seen all the same."""
    (home / "empty").mkdir(parents=True, exist_ok=True)
    settings = {"PYTHONPATH": "", **dict(env)}
    return run_client(
        code,
        hub,
        home=home,
        token=token,
        python=python,
        arguments=arguments,
        cwd=home / "empty",
        env=settings,
        check=check,
    )


# --- what arrives


def test_one_commit_holds_the_run_byte_for_byte(hub, run, published):
    assert len([commit for commit in published["commits"] if commit.summary.startswith("Publish")]) == 1
    assert len([r for r in published["sent"] if r.method == "POST" and "/commit/" in r.path]) == 1
    files = hub.files(REPO)
    shards = set(json.loads((run / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 1 and shards <= files.keys()
    for name in files.keys() - {"README.md", "published_files.json", ".gitattributes"}:
        if not name.startswith("figures/evidence_"):
            assert files[name] == (run / name).read_bytes(), name
    assert f'from_pretrained("{REPO}")' in files["README.md"].decode()
    assert hub.files(REPO).keys() >= set(json.loads(files["published_files.json"])["files"])
    assert f"{hub.endpoint}/{REPO} published, commit {hub.commits(REPO)[0].oid}" in published["first"].stdout


def sent_contents(requests):
    """Every byte that left: bodies as they were, and what the lines of a commit carry in base64."""
    for request in requests:
        yield request.body
        if "/commit/" in request.path:
            for line in request.body.splitlines():
                value = json.loads(line)["value"]
                if value.get("encoding") == "base64":
                    yield base64.b64decode(value["content"])


def test_no_secret_no_path_and_no_pickle_leaves(run, published):
    contents = list(sent_contents(published["sent"]))
    assert sum(map(len, contents)) > sum(path.stat().st_size for path in run.glob("*.safetensors"))
    planted = [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert len(planted) >= 4, "nothing to find"
    pickles = [run / "training_args.bin", run / "checkpoint-1" / "optimizer.pt"]
    for content in contents:
        assert TOKEN.encode() not in content
        assert str(run).encode() not in content and str(ROOT).encode() not in content
        assert str(Path.home()).encode() + b"/" not in content
        for pickle in pickles:
            assert pickle.read_bytes()[:256] not in content and b"data.pkl" not in content


def test_the_same_push_again_is_no_commit_and_no_upload(hub, published):
    assert f"was so already, commit {published['commits'][0].oid}" in published["again"].stdout
    assert hub.commits(REPO)[: len(published["commits"])][0].oid == published["commits"][0].oid
    assert not [r for r in published["sent_again"] if r.method == "PUT" or "/commit/" in r.path]


@pytest.mark.slow
def test_a_new_run_replaces_the_old_and_both_can_be_pulled(hub, tmp_path):
    repo, home = "alice/versions", tmp_path / "home"
    write_tiny_run(tmp_path / "old", seed=1, max_shard_size="20KB")
    write_tiny_run(tmp_path / "new", seed=2)
    publish(hub, tmp_path / "old", repo=repo, home=home)
    old = hub.commits(repo)[0].oid
    of_the_owner = {name: b"kept" for name in ("notes.txt", "handler.py", "figures/mine.png")}
    hub.commit(repo, of_the_owner | {"adapter_model.safetensors": b"kept"})
    (tmp_path / "new" / "generation_config.json").unlink()
    done = publish(hub, tmp_path / "new", repo=repo, home=home)
    files = hub.files(repo)
    assert "model.safetensors" in files and "generation_config.json" not in files
    assert all(files[name] == b"kept" for name in [*of_the_owner, "adapter_model.safetensors"])
    assert "deleted there, as the run does not have them: generation_config.json, model-" in done.stdout
    assert not [name for name in files if name.endswith("index.json") or name.startswith("model-")]
    code = """
import sys, torch, transformers
for revision, name in zip(sys.argv[2:4], sys.argv[4:]):
    model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], revision=revision, trust_remote_code=True)
    torch.save({name: p.detach() for name, p in model.named_parameters()}, name)
"""
    loaded_elsewhere(hub, code, repo, old, "main", tmp_path / "old.pt", tmp_path / "new.pt", home=home)
    for name in ("old", "new"):
        model = SigmaMoeForCausalLM.from_pretrained(tmp_path / name)
        pulled = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert all(torch.equal(parameter, pulled[key]) for key, parameter in model.named_parameters())


# --- loaded without the package

READERS = ["newest", pytest.param("oldest", marks=pytest.mark.oldest)]


AS_A_STRANGER = """
import importlib.util, json, sys
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer

assert importlib.util.find_spec("hf_models") is None, "this environment has the package"
repo, prompt, out = sys.argv[1:4]
trusted = {"trust_remote_code": True, "revision": sys.argv[4]}
tokenizer = AutoTokenizer.from_pretrained(repo, revision=sys.argv[4])
inputs = tokenizer(prompt, return_tensors="pt")
report = {"transformers": transformers.__version__}
report["config"] = type(AutoConfig.from_pretrained(repo, **trusted)).__name__
AutoConfig.from_pretrained(repo, trust_remote_code=True)  # by the branch, which the cache then knows too
tensors = {}
torch.manual_seed(0)
for auto_class in sys.argv[5:]:
    auto = getattr(transformers, auto_class)
    seen = report[auto_class] = {}
    try:
        auto.from_pretrained(repo, revision=sys.argv[4])
    except ValueError as error:
        seen["untrusted"] = str(error)
    model, info = auto.from_pretrained(repo, output_loading_info=True, **trusted)
    model.eval()
    seen["class"] = [cls.__name__ for cls in type(model).__mro__]
    seen["from"] = type(model).__module__.partition(".")[0]
    seen["missing"] = sorted(info["missing_keys"])
    seen["unexpected"] = sorted(info["unexpected_keys"])
    seen["is its config"] = isinstance(model.config, type(model).config_class)
    seen["attention"], seen["experts"] = model.config._attn_implementation, model.config._experts_implementation
    seen["top_k"] = [router.top_k for router in model.routers]
    with torch.no_grad():
        if not info["missing_keys"]:  # a new classifier starts from random numbers
            tensors[auto_class] = model(**inputs)[0]
        for name in ("eager", "batched_mm", "grouped_mm"):
            model.set_experts_implementation(name)
            seen[name] = [model.config._experts_implementation, bool(model(**inputs)[0].isfinite().all())]
        model.set_attn_implementation("eager")
        seen["eager attention"] = bool(model(**inputs)[0].isfinite().all())
    if auto_class == "AutoModelForCausalLM":
        model.set_attn_implementation("sdpa")
        greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
        tensors["greedy"] = model.generate(**inputs, **greedy)
        tensors["beams"] = model.generate(**inputs, num_beams=3, **greedy)
        tensors["one expert"] = model.generate(**inputs, num_active_experts=1, **greedy)
        with torch.no_grad(), model.active_experts(2), model.active_neurons(ratio=0.25):
            tensors["fewer neurons"] = model(**inputs)[0]
        loss = model.train()(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        tensors["training loss"] = loss.detach()
        model.set_experts_per_token(2)
        try:
            model.set_experts_per_token(99)
        except ValueError as error:
            seen["refused"] = str(error)
        model.save_pretrained(out + "-again")
        tokenizer.save_pretrained(out + "-again")
        seen["again"] = auto.from_pretrained(out + "-again", trust_remote_code=True).config.num_experts_per_tok
torch.save(tensors, out + ".pt")
with open(out + ".json", "w") as file:
    json.dump(report, file)
"""


def stranger_sees(hub, repo, python, folder, heads=HEADS):
    """What `AS_A_STRANGER` reports of the head of `repo`, and the tensors that it computed."""
    (folder / "bare").mkdir(parents=True)
    arguments = [repo, PROMPT, folder / "out", hub.commits(repo)[0].oid, *heads]
    bare = bare_python(folder / "bare", python)
    loaded_elsewhere(hub, AS_A_STRANGER, *arguments, home=folder / "home", python=bare)
    return json.loads((folder / "out.json").read_text()), torch.load(folder / "out.pt", weights_only=True)


def package_computes(run, heads=HEADS):
    """The same as the stranger's tensors, by the classes of this package."""
    inputs = AutoTokenizer.from_pretrained(run)(PROMPT, return_tensors="pt")
    model = heads["AutoModelForCausalLM"].from_pretrained(run).eval()
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        tensors = {"AutoModelForCausalLM": model(**inputs)[0]}
        if "AutoModel" in heads:
            tensors["AutoModel"] = model.model(**inputs)[0]
        with model.active_experts(2), model.active_neurons(ratio=0.25):
            tensors["fewer neurons"] = model(**inputs)[0]
    tensors |= {"greedy": model.generate(**inputs, **greedy), "beams": model.generate(**inputs, num_beams=3, **greedy)}
    tensors["one expert"] = model.generate(**inputs, num_active_experts=1, **greedy)
    tensors["training loss"] = model.train()(**inputs, labels=inputs["input_ids"]).loss.detach()
    return tensors


def assert_alike(report, tensors, run, heads=HEADS, top_k=(3, 1, 2)):
    """What a stranger sees is what a user of the package sees."""
    expected, written = package_computes(run, heads), {"greedy", "beams", "one expert"}
    assert tensors.keys() == expected.keys()
    for name in written:
        assert torch.equal(tensors[name], expected[name]), name
    for name in expected.keys() - written:
        torch.testing.assert_close(tensors[name], expected[name], rtol=1e-5, atol=1e-6, msg=name)
    assert report["config"] == heads["AutoModelForCausalLM"].config_class.__name__
    for auto_class, model_class in heads.items():
        seen, ours = report[auto_class], model_class.from_pretrained(run)
        assert "trust_remote_code=True" in seen["untrusted"]
        assert seen["from"] == "transformers_modules" and seen["is its config"] is True
        assert seen["class"] == [cls.__name__ for cls in model_class.__mro__]
        assert seen["unexpected"] == (["lm_head.weight"] if auto_class != "AutoModelForCausalLM" else [])
        assert all(name.startswith("score.") for name in seen["missing"])
        assert bool(seen["missing"]) == ("Classification" in auto_class)
        assert (seen["attention"], seen["experts"]) == ("sdpa", "grouped_mm")
        assert (ours.config._attn_implementation, ours.config._experts_implementation) == ("sdpa", "grouped_mm")
        assert seen["top_k"] == [router.top_k for router in ours.routers] == list(top_k)
        for backend in ("eager", "batched_mm", "grouped_mm"):
            assert seen[backend] == [backend, True]
        assert seen["eager attention"] is True
    seen = report["AutoModelForCausalLM"]
    assert seen["again"] == 2
    with pytest.raises(ValueError) as refusal:
        heads["AutoModelForCausalLM"].from_pretrained(run).set_experts_per_token(99)
    assert seen["refused"] == str(refusal.value)


@pytest.fixture(scope="module")
def stranger(hub, published, tmp_path_factory):
    """`stranger(reader)` -> the folder of somebody who came once, what they reported, and their tensors."""

    @functools.cache
    def came(reader):
        folder = tmp_path_factory.mktemp("stranger")
        return folder, *stranger_sees(hub, REPO, PYTHONS[reader], folder)

    return came


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.compatibility("Remote code, without this package", method="sigma_moe")
@pytest.mark.compatibility(
    "Pushed and pulled by its id",
    method="sigma_moe",
    library="huggingface-hub",
    note="with a Hub on the loopback interface",
)
def test_a_stranger_has_what_a_user_of_the_package_has(run, stranger, reader):
    folder, report, tensors = stranger(reader)
    assert_alike(report, tensors, run)
    # What the stranger saved is a repository of its own again, code and all.
    again = {path.name for path in folder.glob("out-again/*")}
    assert {"configuration_sigma_moe.py", "modeling_sigma_moe.py", "balance.py", "routing_losses.py"} <= again
    auto_map = json.loads((folder / "out-again" / "config.json").read_text())["auto_map"]
    assert auto_map.keys() == {"AutoConfig", *HEADS}


WRITE = """
import sys
from pathlib import Path
from tests.model_cards.tiny_run import write_tiny_run
write_tiny_run(Path(sys.argv[1]), seed=4)
"""


@pytest.mark.oldest
@pytest.mark.parametrize("reader", ["newest", "oldest"])
def test_what_the_oldest_versions_save_and_publish_loads_everywhere(hub, tmp_path, reader):
    repo, run, oldest = f"alice/oldest-for-{reader}", tmp_path / "run", PYTHONS["oldest"]
    settings = {"PYTHONPATH": str(ROOT)}
    run_client(WRITE, hub, home=tmp_path, token=None, python=oldest, arguments=[run], cwd=ROOT, env=settings)
    saved_by = json.loads((run / "config.json").read_text())["transformers_version"]
    assert saved_by.startswith("5.18."), "OLDEST_PYTHON has another transformers than the lower bound"
    publish(hub, run, repo=repo, home=tmp_path / "publisher", python=oldest)
    report, tensors = stranger_sees(hub, repo, PYTHONS[reader], tmp_path / "reader")
    assert report["transformers"].startswith("5.18.") == (reader == "oldest")
    assert_alike(report, tensors, run)


def test_once_pulled_it_loads_without_the_hub(hub, stranger, tmp_path):
    code = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
inputs = tokenizer(sys.argv[2], return_tensors="pt")
torch.save(model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None), sys.argv[3])
"""
    folder, _, tensors = stranger("newest")
    count = len(hub.requests)
    arguments = [REPO, PROMPT, tmp_path / "ids.pt"]
    loaded_elsewhere(hub, code, *arguments, home=folder / "home", env={"HF_HUB_OFFLINE": "1"})
    assert len(hub.requests) == count
    assert torch.equal(torch.load(tmp_path / "ids.pt", weights_only=True), tensors["greedy"])


# --- who may


LOAD = """
import sys, transformers
transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
print("loaded")
"""


@pytest.mark.slow
def test_a_private_repository_is_seen_by_its_owner_only(hub, run, tmp_path):
    repo = "alice/private"
    publish(hub, run, "--private", repo=repo, home=tmp_path / "home")
    publish(hub, run, "--private", repo=repo, home=tmp_path / "home")
    assert "loaded" in loaded_elsewhere(hub, LOAD, repo, home=tmp_path / "alice", token=TOKEN).stdout
    for name, token in (("bob", OTHERS_TOKEN), ("nobody", None)):
        refused = loaded_elsewhere(hub, LOAD, repo, home=tmp_path / name, token=token, check=False)
        assert refused.returncode and "loaded" not in refused.stdout
        assert "is not a local folder and is not a valid model identifier" in refused.stderr
        assert not list((tmp_path / name).rglob("*.safetensors"))


REFUSALS = {
    "wrong token": ({"token": "hf_fake_unknown"}, "The Hub does not know this token"),
    "no token": ({"token": ""}, "There is no token of the Hub here"),
    "a token that may only read": ({"token": READ_TOKEN}, "This token may not write"),
    "another user's name": ({"repo": "bob/tiny"}, "This token may not write"),
    "another user's repository": ({"repo": "bob/model"}, "This token may not write"),
    "another user's private repository": ({"repo": "bob/private"}, "This token may not write"),
    "a name that is taken": ({"repo": "alice/taken"}, "is taken: it holds 1 files that are no model"),
    "the name of another model": ({"repo": "alice/llama"}, "is taken: it holds a model of type 'llama'"),
    "a public repository for a private run": ({"repo": "alice/model", "flag": "--private"}, "exists and is public"),
    "offline": ({"offline": True}, "HF_HUB_OFFLINE is set"),
}
# In one process, since each costs the seconds of its imports; the client reads the token at each request.
REFUSED = """
import contextlib, io, json, os, sys
from huggingface_hub import constants
from model_cards.publish import main
run, cases, default_token, out = sys.argv[1], json.loads(sys.argv[2]), *sys.argv[3:]
seen = {}
for case, options in cases.items():
    os.environ["HF_TOKEN"] = options.get("token", default_token)
    constants.HF_HUB_OFFLINE = options.get("offline", False)
    flags = [options["flag"]] if "flag" in options else []
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main([run, "--repo-id", options.get("repo", "alice/never"), *flags])
    seen[case] = [status, errors.getvalue()]
with open(out, "w") as file:
    json.dump(seen, file)
"""


@pytest.fixture(scope="module")
def occupied(hub, tmp_path_factory):
    """Repositories of alice and bob that hold other things."""
    code = "import sys; from huggingface_hub import HfApi\n" + (
        "for name in sys.argv[1:]: HfApi().create_repo(name, private='private' in name)"
    )
    names = {TOKEN: ["alice/taken", "alice/llama", "alice/model"], OTHERS_TOKEN: ["bob/model", "bob/private"]}
    for token, repositories in names.items():
        run_client(code, hub, home=tmp_path_factory.mktemp("owner"), token=token, arguments=repositories)
    hub.commit("alice/taken", {"essay.txt": b"words"})
    hub.commit("alice/llama", {"config.json": b'{"model_type": "llama"}'})
    for name in ("alice/model", "bob/model", "bob/private"):
        hub.commit(name, {"config.json": b'{"model_type": "sigma_moe"}'})


@pytest.fixture(scope="module")
def refused(hub, run, occupied, tmp_path_factory):
    """Status and message of every case, once it is certain that none changed anything."""
    home = tmp_path_factory.mktemp("refused")
    repositories = {key: dict(hub.files(key[1])) for key in hub.repositories}
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    arguments = [
        run,
        json.dumps({case: options for case, (options, _) in REFUSALS.items()}),
        TOKEN,
        home / "seen.json",
    ]
    run_client(REFUSED, hub, home=home, token=TOKEN, arguments=arguments, cwd=home, env={"PYTHONPATH": str(ROOT)})
    assert {key: dict(hub.files(key[1])) for key in hub.repositories} == repositories
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    return json.loads((home / "seen.json").read_text())


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_says_why_and_changes_nothing(refused, case):
    status, message = refused[case]
    assert status == 1 and REFUSALS[case][1] in message


@pytest.mark.slow
def test_a_taken_name_can_be_taken_on_purpose(hub, run, occupied, tmp_path):
    publish(hub, run, "--replace", repo="alice/taken", home=tmp_path)
    assert {"essay.txt", "config.json"} <= hub.files("alice/taken").keys()


# --- what breaks on the way


@pytest.mark.slow
def test_a_connection_that_breaks_leaves_no_half_and_the_same_command_goes_on(hub, run, tmp_path):
    repo = "alice/interrupted"
    hub.cut_upload_after(1000, times=1000)
    code = """
import sys, time
time.sleep = lambda seconds: None  # the client waits between its attempts
from model_cards.publish import main
sys.exit(main(sys.argv[1:]))
"""
    done = run_client(
        code,
        hub,
        home=tmp_path,
        token=TOKEN,
        arguments=[run, "--repo-id", repo],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        check=False,
    )
    hub.cut_upload_after(1000, times=0)
    assert done.returncode == 1 and "The connection to the Hub broke: run the same command again" in done.stderr
    assert "Traceback" not in done.stderr
    assert hub.files(repo).keys() <= {".gitattributes"}
    publish(hub, run, repo=repo, home=tmp_path)
    assert "modeling_sigma_moe.py" in hub.files(repo)


@pytest.mark.slow
def test_a_push_of_someone_else_at_the_same_moment_is_not_mixed_with_ours(hub, run, tmp_path):
    repo = "alice/contested"
    publish(hub, run, repo=repo, home=tmp_path / "home")
    write_tiny_run(tmp_path / "new", seed=3)
    hub.before_commit(lambda: hub.commit(repo, {"theirs.txt": b"theirs"}))
    done = publish(hub, tmp_path / "new", repo=repo, home=tmp_path / "home", check=False)
    assert done.returncode == 1 and "at the same moment" in done.stderr
    assert hub.files(repo)["theirs.txt"] == b"theirs" and "model.safetensors" not in hub.files(repo)
    publish(hub, tmp_path / "new", repo=repo, home=tmp_path / "home")
    assert {"theirs.txt", "model.safetensors"} <= hub.files(repo).keys()


@pytest.mark.slow
def test_a_gitignore_that_keeps_files_out_is_told(hub, run, tmp_path):
    repo = "alice/ignoring"
    publish(hub, run, repo=repo, home=tmp_path)
    hub.commit(repo, {".gitignore": b"*.py\n"})
    write_tiny_run(tmp_path / "new", seed=5)
    with open(tmp_path / "new" / "balance.py", "a") as code:
        code.write("# newer\n")
    hub.delete(repo, "balance.py")
    done = publish(hub, tmp_path / "new", repo=repo, home=tmp_path, check=False)
    assert done.returncode == 1 and "has a .gitignore that kept out ['balance.py']" in done.stderr


@pytest.mark.slow
def test_a_repository_without_a_tokenizer_says_so(hub, run, tmp_path):
    code = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo(sys.argv[1])
api.upload_folder(repo_id=sys.argv[1], folder_path=sys.argv[2], allow_patterns=["*.json", "*.py"],
                  ignore_patterns=["tokenizer*", "*.bin"])
from trainers.data import load_tokenizer
load_tokenizer(sys.argv[1])
"""
    settings = {"PYTHONPATH": str(ROOT)}
    done = run_client(
        code, hub, home=tmp_path, token=TOKEN, arguments=["alice/mute", run], cwd=tmp_path, env=settings, check=False
    )
    assert done.returncode and "ValueError" in done.stderr and "alice/mute" in done.stderr.splitlines()[-1]
    assert "tokenizer" in done.stderr.splitlines()[-1]


@pytest.mark.slow
def test_a_tampered_index_on_the_hub_reads_no_other_file(hub, tmp_path):
    """`convert` and all that reads checkpoints by `checkpoint_files` refuse; transformers finds no such file."""
    repo = "alice/tampered"
    write_tiny_run(tmp_path / "run", num_experts_per_tok_per_layer=None, max_shard_size="20KB")
    publish(hub, tmp_path / "run", repo=repo, home=tmp_path / "home")
    index = json.loads(hub.files(repo)["model.safetensors.index.json"])
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../../../../../secret.safetensors")
    hub.commit(repo, {"model.safetensors.index.json": json.dumps(index).encode()})
    refused = loaded_elsewhere(hub, LOAD, repo, home=tmp_path / "reader", check=False)
    assert refused.returncode and "loaded" not in refused.stdout
    command = [sys.executable, "-m", "hf_models.moe.convert", repo, tmp_path / "out", "--to", "sigma"]
    settings = {"PYTHONPATH": str(ROOT)}
    refused = run_command(command, hub, home=tmp_path / "home", token=None, env=settings, cwd=tmp_path, check=False)
    assert refused.returncode and "is not a plain file name" in refused.stderr
    assert not (tmp_path / "out").exists()
