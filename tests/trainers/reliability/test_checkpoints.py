import hashlib
import json
import os
import struct

import pytest
import torch
from safetensors.torch import save_file

from trainers.reliability.checkpoints import (
    LATEST_NAME,
    MANIFEST_NAME,
    MANIFESTS_NAME,
    CheckpointError,
    NotFiniteError,
    checkpoint_folders,
    checkpoint_step,
    config_fingerprint,
    find_last_valid_checkpoint,
    manifest_state,
    manifests_required_after,
    not_finite,
    read_latest,
    read_manifest,
    require_manifests,
    validate_checkpoint,
    write_latest,
    write_manifest,
    write_refusal,
)
from trainers.reliability.events import EventLog, read_events


def make_checkpoint(root, step, *, shards=("model.safetensors",)):
    folder = root / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    for name in shards:
        save_file({f"{name}.weight": torch.ones(8, 4)}, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        index = {"metadata": {}, "weight_map": {f"{name}.weight": name for name in shards}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    torch.save({"state": torch.ones(8)}, folder / "optimizer.pt")
    torch.save({"cpu": torch.ones(8)}, folder / "rng_state.pth")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    return folder


def test_nothing_to_resume_from(tmp_path):
    assert find_last_valid_checkpoint(tmp_path) is None
    assert find_last_valid_checkpoint(tmp_path / "not there") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert find_last_valid_checkpoint(tmp_path) is None


def test_newest_by_number(tmp_path):
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert find_last_valid_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_weights_cut_off(tmp_path, keep):
    make_checkpoint(tmp_path, 1)
    file = make_checkpoint(tmp_path, 2) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_other_files_cut_off(tmp_path, name, keep):
    make_checkpoint(tmp_path, 1)
    file = make_checkpoint(tmp_path, 2) / name
    file.write_bytes(file.read_bytes()[:keep])
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_files_missing(tmp_path, name):
    make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / name).unlink()
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards(tmp_path):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    make_checkpoint(tmp_path, 1, shards=names)
    folder = make_checkpoint(tmp_path, 2, shards=names)
    assert find_last_valid_checkpoint(tmp_path) == folder
    (folder / names[2]).unlink()
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards_without_the_end_of_their_index(tmp_path):
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2, shards=["a.safetensors", "b.safetensors"])
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-5])
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards_of_fsdp(tmp_path):
    folder = make_checkpoint(tmp_path, 1, shards=())
    assert find_last_valid_checkpoint(tmp_path) is None
    (folder / "pytorch_model_fsdp_0").mkdir()
    assert find_last_valid_checkpoint(tmp_path) is None
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"\x80")  # written after all shards
    assert find_last_valid_checkpoint(tmp_path) == folder


def test_a_checkpoint_without_optimizer_is_whole(tmp_path):
    """`save_only_model=True`."""
    folder = make_checkpoint(tmp_path, 1)
    (folder / "optimizer.pt").unlink()
    assert find_last_valid_checkpoint(tmp_path) == folder


def test_a_header_that_promises_more_than_there_is(tmp_path):
    file = make_checkpoint(tmp_path, 1) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{")
    assert find_last_valid_checkpoint(tmp_path) is None


def test_the_reason_is_told(tmp_path, caplog):
    (make_checkpoint(tmp_path, 2) / "trainer_state.json").unlink()
    assert find_last_valid_checkpoint(tmp_path) is None
    assert "checkpoint-2 is incomplete (trainer_state.json is missing or cut off)" in caplog.text


# --- manifests ----------------------------------------------------------------------------------------------------


def committed(root, step, **options):
    folder = make_checkpoint(root, step, **options)
    write_manifest(folder, step=step, world_size=1)
    return folder


def test_what_a_manifest_says(tmp_path):
    folder = make_checkpoint(tmp_path, 7)
    (folder / "training_args.bin").write_bytes(b"hf_token")
    manifest = write_manifest(folder, step=7, world_size=2, config_hash="abc")
    assert manifest == read_manifest(folder) == json.loads((folder / MANIFEST_NAME).read_text())
    assert (manifest["step"], manifest["world_size"], manifest["config_sha256"]) == (7, 2, "abc")
    assert manifest["versions"]["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"}
    state = manifest["files"]["trainer_state.json"]
    assert state["size"] == len('{"global_step": 1}')
    assert state["sha256"] == hashlib.sha256((folder / "trainer_state.json").read_bytes()).hexdigest()
    assert not list(folder.glob(".*"))


def test_folders_inside(tmp_path):
    """Shards of FSDP and DeepSpeed lie in folders of their own; names in the manifest hold no separator."""
    folder = make_checkpoint(tmp_path, 1)
    (folder / "optimizer_0" / "deep").mkdir(parents=True)
    (folder / "optimizer_0" / "deep" / "__0_0.distcp").write_bytes(b"shard")
    manifest = write_manifest(folder, step=1, world_size=1)
    assert manifest["folders"]["optimizer_0"]["folders"]["deep"]["files"]["__0_0.distcp"]["size"] == 5
    assert validate_checkpoint(folder) == []
    (folder / "optimizer_0" / "deep" / "__0_0.distcp").write_bytes(b"Shard")
    assert validate_checkpoint(folder) == ["optimizer_0/deep/__0_0.distcp is not what was saved: its SHA-256 differs"]
    (folder / "optimizer_0" / "deep" / "__0_0.distcp").unlink()
    assert validate_checkpoint(folder) == ["optimizer_0/deep/__0_0.distcp is missing"]


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_nothing_incomplete_is_committed(tmp_path, name):
    folder = make_checkpoint(tmp_path, 1)
    (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"checkpoint-1 cannot be committed: {name}"):
        write_manifest(folder, step=1, world_size=1)
    assert not (folder / MANIFEST_NAME).exists()


def test_all_ranks_must_have_written(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    torch.save({}, folder / "rng_state_0.pth")
    with pytest.raises(CheckpointError, match="rng_state_1.pth of rank 1 is missing.*save_on_each_node"):
        write_manifest(folder, step=1, world_size=2, ranks=2)
    torch.save({}, folder / "rng_state_1.pth")
    write_manifest(folder, step=1, world_size=2, ranks=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_that_are_not_finite(tmp_path, bad, dtype):
    folder = make_checkpoint(tmp_path, 1)
    tensors = {"good": torch.ones(3, dtype=dtype), "bad": torch.ones(4, 4, dtype=dtype), "ids": torch.arange(3)}
    tensors["bad"][3, 3] = bad
    save_file(tensors, folder / "model.safetensors")
    assert list(not_finite(folder)) == ["bad in model.safetensors has 1 of 16 values that are not finite"]
    with pytest.raises(NotFiniteError, match="bad in model.safetensors") as raised:
        write_manifest(folder, step=1, world_size=1)
    assert len(raised.value.tensors) == 1 and not (folder / MANIFEST_NAME).exists()


def test_large_weights_are_finite_also_where_their_sum_is_not(tmp_path):
    save_file({"w": torch.full((4,), 3e38)}, make_checkpoint(tmp_path, 1) / "model.safetensors")
    assert list(not_finite(tmp_path / "checkpoint-1")) == []


def test_infinities_of_both_signs(tmp_path):
    tensor = torch.tensor([float("inf"), -float("inf"), 1.0])
    save_file({"w": tensor}, make_checkpoint(tmp_path, 1) / "model.safetensors")
    assert "has 2 of 3 values" in next(not_finite(tmp_path / "checkpoint-1"))


def test_8_bit_weights(tmp_path):
    tensor = torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)
    save_file({"w": tensor}, make_checkpoint(tmp_path, 1) / "model.safetensors")
    assert len(list(not_finite(tmp_path / "checkpoint-1"))) == 1


def test_links_are_not_committed(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    (folder / "notes").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="notes is a link"):
        write_manifest(folder, step=1, world_size=1)


def test_a_link_in_the_place_of_a_file(tmp_path):
    folder = committed(tmp_path, 1)
    (folder / "optimizer.pt").rename(tmp_path / "optimizer.pt")
    (folder / "optimizer.pt").symlink_to(tmp_path / "optimizer.pt")
    assert "is a link to" in validate_checkpoint(folder)[0]


@pytest.mark.parametrize("name", ["../optimizer.pt", "/etc/hostname", "a/b", "a\\b", "..", ""])
def test_names_that_leave_the_folder(tmp_path, name):
    folder = committed(tmp_path, 1)
    manifest = read_manifest(folder)
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert "is not a plain file name" in validate_checkpoint(folder)[0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}', '{"format": 1, "files": {"a": 1}, "folders": {}}'],
)
def test_manifests_that_say_nothing(tmp_path, text):
    committed(tmp_path, 1)
    (committed(tmp_path, 2) / MANIFEST_NAME).write_text(text)
    assert MANIFEST_NAME in validate_checkpoint(tmp_path / "checkpoint-2")[0]
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_files_that_came_later(tmp_path):
    """What a loader would pick up is refused; what lies there for other reasons costs no checkpoint."""
    folder = committed(tmp_path, 1)
    (folder / ".nfs0001").write_bytes(b"x")
    (folder / "notes.txt").write_text("good one")
    assert validate_checkpoint(folder) == []
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert validate_checkpoint(folder) == [f"pytorch_model.bin is not in {MANIFEST_NAME}: remove it"]


def test_sizes_are_told_before_anything_is_read(tmp_path):
    folder = committed(tmp_path, 1)
    size = (folder / "optimizer.pt").stat().st_size
    with (folder / "optimizer.pt").open("ab") as file:
        file.write(b"x")
    (folder / "trainer_state.json").write_text('{"global_step": 2}')
    assert validate_checkpoint(folder) == [f"optimizer.pt has {size + 1} bytes instead of {size}"]


def test_the_disk_refuses_the_manifest(tmp_path):
    folder = make_checkpoint(tmp_path, 1)
    (folder / MANIFEST_NAME).mkdir()
    with pytest.raises(OSError, match="Cannot write manifest.json"):
        write_manifest(folder, step=1, world_size=1)
    assert not list(folder.glob(".*.tmp"))


# --- which checkpoint counts --------------------------------------------------------------------------------------


def test_without_its_manifest_a_newer_checkpoint_does_not_count(tmp_path):
    make_checkpoint(tmp_path, 2)
    committed(tmp_path, 4)
    make_checkpoint(tmp_path, 6)
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-2", "made before there were manifests"


def test_the_run_says_from_when_on_manifests_are_needed(tmp_path):
    make_checkpoint(tmp_path, 2)
    assert manifests_required_after(tmp_path) is None
    require_manifests(tmp_path, after_step=2)
    make_checkpoint(tmp_path, 4)
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    require_manifests(tmp_path, after_step=10)
    assert manifests_required_after(tmp_path) == 2, "what was said once holds"
    (tmp_path / MANIFESTS_NAME).write_text("{")
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_up_to_a_step(tmp_path):
    for step in (2, 4, 6):
        committed(tmp_path, step)
    assert find_last_valid_checkpoint(tmp_path, up_to_step=5) == tmp_path / "checkpoint-4"
    assert find_last_valid_checkpoint(tmp_path, up_to_step=1) is None


def test_a_refused_checkpoint(tmp_path, caplog):
    make_checkpoint(tmp_path, 2)
    write_refusal(make_checkpoint(tmp_path, 4), step=4, reason="w is not finite")
    assert manifest_state(tmp_path / "checkpoint-4") == "refused"
    assert manifest_state(tmp_path / "checkpoint-2") == "absent"
    assert find_last_valid_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert "it was refused when it was saved: w is not finite" in caplog.text


def test_refusals_are_events(tmp_path):
    committed(tmp_path, 2)
    (committed(tmp_path, 4) / "optimizer.pt").unlink()
    assert find_last_valid_checkpoint(tmp_path, log=EventLog(tmp_path)) == tmp_path / "checkpoint-2"
    (event,) = read_events(tmp_path)
    assert (event.component, event.severity, event.step, event.action) == ("checkpoints", "warning", 4, "skip")
    assert event.message == "checkpoint-4 is damaged (optimizer.pt is missing); trying the one before."


def test_links_are_no_checkpoints(tmp_path):
    folder = committed(tmp_path / "elsewhere", 9)
    (tmp_path / "checkpoint-9").symlink_to(folder)
    assert checkpoint_folders(tmp_path) == [] and find_last_valid_checkpoint(tmp_path) is None


def test_names(tmp_path):
    assert checkpoint_step(tmp_path / "checkpoint-12") == 12
    with pytest.raises(ValueError, match="is not the name of a checkpoint"):
        checkpoint_step(tmp_path / "checkpoint-best")


def test_the_pointer(tmp_path):
    assert read_latest(tmp_path) is None
    write_latest(tmp_path, "checkpoint-4")
    assert read_latest(tmp_path) == "checkpoint-4"
    for text in ("../checkpoint-4", "checkpoint-x", ""):
        (tmp_path / LATEST_NAME).write_text(text)
        assert read_latest(tmp_path) is None
    assert os.listdir(tmp_path) == [LATEST_NAME]


def test_a_configuration_is_the_same_under_a_schedule():
    class Config:
        def __init__(self, **values):
            self.values = values

        def to_dict(self):
            return self.values

    base = config_fingerprint(Config(hidden_size=8, num_experts_per_tok=4, transformers_version="5.18.0"))
    assert config_fingerprint(Config(hidden_size=8, num_experts_per_tok=1, transformers_version="5.23.0")) == base
    assert config_fingerprint(Config(hidden_size=9, num_experts_per_tok=4, transformers_version="5.18.0")) != base
