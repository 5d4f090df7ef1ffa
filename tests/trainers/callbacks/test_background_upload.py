import json
import os
import threading
import time
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.hub.client import run_client
from tests.hub.server import LoopbackHub
from tests.trainers.reliability.interrupted_run import tiny_trainer
from trainers.callbacks.background_upload import BackgroundUploadCallback, FolderTarget, HubTarget
from trainers.callbacks.validated_checkpoint import ValidatedCheckpointCallback
from trainers.reliability.checkpoints import (
    checkpoint_folders,
    find_last_valid_checkpoint,
    read_latest,
    validate_checkpoint,
)
from trainers.reliability.events import EVENTS_NAME, read_events


ALICE, RENEWED, READER = "hf_fake_alice", "hf_fake_renewed", "hf_fake_reader"
ROOT = Path(__file__).parents[3]


def names(folder) -> list[str]:
    return [path.name for path in checkpoint_folders(folder)]


def incidents(folder) -> list[tuple[str, str, int]]:
    events = read_events(folder, component="background_upload")
    return [(event.severity, event.action, event.step) for event in events]


class Observed(FolderTarget):
    """Keeps the order of what is done; `fail` says which attempts do not succeed, `gate` holds uploads back."""

    def __init__(self, path, fail=lambda attempt: False, gate=None):
        super().__init__(path)
        self.done, self.attempts, self.fail, self.gate = [], 0, fail, gate

    def put(self, folder):
        if self.gate is not None:
            assert self.gate.wait(30)
        self.attempts += 1
        if self.fail(self.attempts):
            raise OSError(28, "No space left on device")
        super().put(folder)
        self.done.append(folder.name)

    def point_to(self, name):
        super().point_to(name)
        self.done.append(f"latest={name}")


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def there(tmp_path):
    return tmp_path / "there"


# --- a directory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manifests", [True, False])
def test_a_run_can_go_on_from_what_was_uploaded(run, there, manifests):
    validated = [ValidatedCheckpointCallback()] if manifests else []
    tiny_trainer(run, BackgroundUploadCallback(there), *validated, max_steps=4).train()
    assert names(there) == names(run) == ["checkpoint-2", "checkpoint-4"] and read_latest(there) == "checkpoint-4"
    assert not list(there.rglob("training_args.bin")) and not list(there.glob(".*"))
    last = find_last_valid_checkpoint(there)
    assert last.name == "checkpoint-4" and validate_checkpoint(last, require_manifest=manifests) == []
    assert not (run / EVENTS_NAME).exists(), "silent when nothing happens"
    more = tiny_trainer(there / "more", max_steps=5)
    more.train(resume_from_checkpoint=str(last))
    assert more.state.global_step == 5


def test_first_in_first_out_and_the_tracker_never_goes_back(run, there):
    """Uploads are held back until the run is over: all but the last are stale by then."""
    gate = threading.Event()
    target = Observed(there, gate=gate)

    class Open(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 8:
                gate.set()
            if state.global_step > 6:
                time.sleep(0.1)

    tiny_trainer(run, BackgroundUploadCallback(target), Open(), max_steps=8).train()
    folders = [name for name in target.done if not name.startswith("latest")]
    assert folders == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    assert target.done[-1] == "latest=checkpoint-8"
    assert "latest=checkpoint-2" not in target.done and "latest=checkpoint-4" not in target.done


def test_a_failure_is_tried_again(run, there):
    target = Observed(there, fail=lambda attempt: attempt <= 2)
    callback = BackgroundUploadCallback(target, backoff_seconds=0.01, delete_local=True)
    tiny_trainer(run, callback, max_steps=2).train()
    assert target.done == ["checkpoint-2", "latest=checkpoint-2"]
    assert incidents(run) == [("warning", "retry", 2)] * 2


def test_what_fails_is_never_deleted_and_training_goes_on(run, there):
    """The second of three checkpoints does not get through: it stays, and the others do what they would do."""
    target = Observed(there, fail=lambda attempt: 2 <= attempt <= 4)
    callback = BackgroundUploadCallback(target, backoff_seconds=0.01, retries=2, delete_local=True)
    trainer = tiny_trainer(run, ValidatedCheckpointCallback(), callback, max_steps=6)
    trainer.train()
    assert trainer.state.global_step == 6
    assert names(there) == ["checkpoint-2", "checkpoint-6"] and read_latest(there) == "checkpoint-6"
    assert names(run) == ["checkpoint-4", "checkpoint-6"], "uploaded and superseded, not uploaded, needed to resume"
    assert incidents(run) == [("warning", "retry", 4)] * 2 + [("error", "none", 4)]
    assert "it stays here" in read_events(run)[-1].message


def test_nothing_gets_through(run, there):
    callback = BackgroundUploadCallback(
        Observed(there, fail=lambda attempt: True), backoff_seconds=0, retries=0, delete_local=True
    )
    tiny_trainer(run, callback, max_steps=4).train()
    assert names(run) == ["checkpoint-2", "checkpoint-4"] and not there.exists()


def test_the_copy_that_is_damaged_on_its_way_does_not_get_its_name(run, there):
    class BadCable(FolderTarget):
        def _copy(self, source, destination, start, copied):
            copied = super()._copy(source, destination, start, copied)
            if source.name == "model.safetensors":
                destination.write_bytes(destination.read_bytes()[:-1] + b"\xff")
            return copied

    callback = BackgroundUploadCallback(BadCable(there), retries=0, delete_local=True)
    tiny_trainer(run, ValidatedCheckpointCallback(), callback, max_steps=2).train()
    assert names(there) == [] and read_latest(there) is None and names(run) == ["checkpoint-2"]
    assert "model.safetensors is not what was saved" in read_events(run)[-1].message


def test_only_what_was_committed_is_uploaded(run, there):
    class Spoil(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 4:
                (run / "checkpoint-4" / "model.safetensors").write_bytes(b"")

    callback = BackgroundUploadCallback(there, commit_seconds=0.5)
    tiny_trainer(run, callback, ValidatedCheckpointCallback(), Spoil(), max_steps=6).train()
    assert names(there) == ["checkpoint-2", "checkpoint-6"] and read_latest(there) == "checkpoint-6"
    assert incidents(run) == [("warning", "skip", 4)]


def test_a_checkpoint_that_was_rotated_out_before_it_was_uploaded(run, there):
    gate = threading.Event()

    class Open(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            gate.set()

    callbacks = Open(), BackgroundUploadCallback(Observed(there, gate=gate))
    tiny_trainer(run, *callbacks, max_steps=4, save_total_limit=1).train()
    assert names(there) == ["checkpoint-4"] and read_latest(there) == "checkpoint-4"
    assert incidents(run) == [("warning", "skip", 2)]


def test_the_end_of_training_waits_only_so_long(run, there):
    gate = threading.Event()
    callback = BackgroundUploadCallback(Observed(there, gate=gate), drain_seconds=0.1)
    tiny_trainer(run, callback, max_steps=4).train()
    gate.set()
    (event,) = read_events(run)
    assert event.severity == "warning" and "1 checkpoints and the one under way" in event.message


def test_leftovers_of_a_kill_are_replaced(run, there):
    tiny_trainer(run, max_steps=2).train()
    (there / ".checkpoint-2.partial").mkdir(parents=True)
    (there / ".checkpoint-2.partial" / "junk").touch()
    (there / "checkpoint-2").mkdir()
    (there / "checkpoint-2" / "old").touch()
    FolderTarget(there).put(run / "checkpoint-2")
    assert validate_checkpoint(there / "checkpoint-2") == [] and os.listdir(there) == ["checkpoint-2"]
    assert not (there / "checkpoint-2" / "old").exists()


def test_the_bandwidth_is_capped(tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "large").write_bytes(bytes(4 * 2**20))
    start = time.monotonic()
    FolderTarget(tmp_path / "there", max_bytes_per_second=10 * 2**20).put(folder)
    assert time.monotonic() - start >= 0.4


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: FolderTarget("x", max_bytes_per_second=0), "max_bytes_per_second=0 must be positive"),
        (lambda: HubTarget("model"), "is not ORG/NAME"),
        (lambda: HubTarget("/mnt/bucket"), "For a directory use FolderTarget"),
        (lambda: BackgroundUploadCallback("alice/run", delete_local=True), "only copy of the optimizer's state"),
    ],
)
def test_what_makes_no_sense(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# --- the Hub, by the real client ----------------------------------------------------------------------------------

CLIENT = """
import json, sys
from pathlib import Path
from transformers import TrainerCallback
from tests.trainers.reliability.interrupted_run import tiny_trainer
from trainers.callbacks.background_upload import BackgroundUploadCallback, HubTarget
from trainers.callbacks.validated_checkpoint import ValidatedCheckpointCallback

class Renew(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        Path("token").write_text("hf_fake_renewed\\n")

for name, target, options in json.loads(sys.argv[1]):
    callback = BackgroundUploadCallback(HubTarget(f"alice/{name}", **target), backoff_seconds=0.05, **options)
    tiny_trainer(name, ValidatedCheckpointCallback(), Renew(), callback, max_steps=4).train()
"""
RUNS = [
    ("plain", {}, {}),
    ("full", {"resume_state": True, "token_file": "token"}, {"delete_local": True}),
    ("refused", {"token_file": "reader"}, {"retries": 1}),
]


@pytest.fixture(scope="module")
def uploads(tmp_path_factory):
    """Three runs of one client process, each to its repository: the folder of the runs, and the Hub afterwards."""
    folder = tmp_path_factory.mktemp("uploads")
    (folder / "token").write_text("hf_fake_unknown\n")
    (folder / "reader").write_text(READER)
    users = {ALICE: "alice", RENEWED: "alice", READER: "alice"}
    with LoopbackHub(users, read_only={READER}) as hub:
        hub.cut_upload_after(1000, times=1)
        run_client(
            CLIENT,
            hub,
            home=folder / "home",
            token=ALICE,
            arguments=[json.dumps(RUNS)],
            cwd=folder,
            env={"PYTHONPATH": str(ROOT)},
            timeout=300,
        )
        yield folder, hub


def test_to_the_hub(uploads):
    """A cut connection on the way; weights, configuration and the pointer come through, no pickle does."""
    folder, hub = uploads
    files, commits = hub.files("alice/plain"), [c.summary for c in reversed(hub.commits("alice/plain"))]
    assert hub.repositories["model", "alice/plain"].private
    assert files["latest"] == b"checkpoint-4\n"
    assert {name.split("/")[0] for name in files} >= {"checkpoint-2", "checkpoint-4", "latest"}
    weights = (folder / "plain" / "checkpoint-4" / "model.safetensors").read_bytes()
    assert files["checkpoint-4/model.safetensors"] == weights
    assert {Path(name).suffix for name in files if "/" in name} == {".json", ".safetensors"}
    assert not any(name.endswith(("trainer_state.json", "manifest.json")) for name in files)
    assert "Upload checkpoint-2" in commits and commits[-2:] == ["Upload checkpoint-4", "Point to checkpoint-4"]
    assert names(folder / "plain") == ["checkpoint-2", "checkpoint-4"]


def test_to_the_hub_with_what_resuming_needs_and_a_token_that_is_renewed(uploads, tmp_path):
    folder, hub = uploads
    files = hub.files("alice/full")
    (tmp_path / "checkpoint-4").mkdir()
    for name, content in files.items():
        if name.startswith("checkpoint-4/"):
            (tmp_path / name).write_bytes(content)
    assert validate_checkpoint(tmp_path / "checkpoint-4", require_manifest=True) == []
    assert not any("training_args" in name for name in files)
    assert names(folder / "full") == ["checkpoint-4"], "the other was uploaded"
    used = {request.headers.get("authorization") for request in hub.requests if "alice/full" in request.path}
    assert f"Bearer {RENEWED}" in used and f"Bearer {ALICE}" not in used


def test_the_hub_refuses(uploads):
    """A token that may only read: each try is an event, nothing is deleted, the run ends well."""
    folder, hub = uploads
    twice = [("warning", "retry", step) if i == 0 else ("error", "none", step) for step in (2, 4) for i in (0, 1)]
    assert incidents(folder / "refused") == twice
    assert names(folder / "refused") == ["checkpoint-2", "checkpoint-4"]
    assert ("model", "alice/refused") not in hub.repositories
    assert READER not in (folder / "refused" / EVENTS_NAME).read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"x": "hf_' + "a" * 30 + '"}', "holds a token"),
        ('{"x": "$SECRET"}', "holds a token"),
        ('{"x": "$RUN/data"}', "absolute path of this machine"),
    ],
)
def test_secrets_and_paths_do_not_go_to_the_hub(run, text, said, monkeypatch):
    """Refused before any request, and not tried again: this process may not talk to a Hub at all."""
    monkeypatch.setenv("SOME_API_KEY", "0123456789abcdef0123")
    text = text.replace("$SECRET", "0123456789abcdef0123").replace("$RUN", str(run))

    class Plant(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            (run / f"checkpoint-{state.global_step}" / "tokenizer_config.json").write_text(text)

    tiny_trainer(run, BackgroundUploadCallback(HubTarget("alice/run")), Plant(), max_steps=2).train()
    (event,) = read_events(run)
    assert (event.severity, event.action) == ("error", "none")
    assert "tokenizer_config.json" in event.message and said in event.message
