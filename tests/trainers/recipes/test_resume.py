import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from trainers.recipes.resume import last_complete_checkpoint


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
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "not there") is None
    (tmp_path / "checkpoint-best").mkdir()
    assert last_complete_checkpoint(tmp_path) is None


def test_newest_by_number(tmp_path):
    for step in (9, 100, 20):
        make_checkpoint(tmp_path, step)
    assert last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-100"


@pytest.mark.parametrize("keep", [0, 4, 8, 30, -1])
def test_weights_cut_off(tmp_path, keep):
    make_checkpoint(tmp_path, 1)
    file = make_checkpoint(tmp_path, 2) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "trainer_state.json"])
@pytest.mark.parametrize("keep", [0, 10, -1])
def test_other_files_cut_off(tmp_path, name, keep):
    make_checkpoint(tmp_path, 1)
    file = make_checkpoint(tmp_path, 2) / name
    file.write_bytes(file.read_bytes()[:keep])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_files_missing(tmp_path, name):
    make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / name).unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards(tmp_path):
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    make_checkpoint(tmp_path, 1, shards=names)
    folder = make_checkpoint(tmp_path, 2, shards=names)
    assert last_complete_checkpoint(tmp_path) == folder
    (folder / names[2]).unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards_without_the_end_of_their_index(tmp_path):
    make_checkpoint(tmp_path, 1)
    folder = make_checkpoint(tmp_path, 2, shards=["a.safetensors", "b.safetensors"])
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text()[:-5])
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_shards_of_fsdp(tmp_path):
    folder = make_checkpoint(tmp_path, 1, shards=())
    assert last_complete_checkpoint(tmp_path) is None
    (folder / "pytorch_model_fsdp_0").mkdir()
    assert last_complete_checkpoint(tmp_path) is None
    (folder / "pytorch_model_fsdp_0" / ".metadata").write_bytes(b"\x80")  # written after all shards
    assert last_complete_checkpoint(tmp_path) == folder


def test_a_checkpoint_without_optimizer_is_whole(tmp_path):
    """`save_only_model=True`."""
    folder = make_checkpoint(tmp_path, 1)
    (folder / "optimizer.pt").unlink()
    assert last_complete_checkpoint(tmp_path) == folder


def test_a_header_that_promises_more_than_there_is(tmp_path):
    file = make_checkpoint(tmp_path, 1) / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**60) + b"{")
    assert last_complete_checkpoint(tmp_path) is None


def test_the_reason_is_told(tmp_path, caplog):
    (make_checkpoint(tmp_path, 2) / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) is None
    assert "checkpoint-2 is incomplete (trainer_state.json is missing or cut off)" in caplog.text
