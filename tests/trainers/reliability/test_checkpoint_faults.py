"""What a checkpoint must survive, done to real runs in real processes."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import TrainerCallback

from tests.trainers.reliability.interrupted_run import (
    SERVER,
    in_process,
    same_weights,
    tiny_model,
    tiny_trainer,
    train,
)
from trainers.callbacks.validated_checkpoint import ValidatedCheckpointCallback
from trainers.reliability.checkpoints import (
    MANIFEST_NAME,
    checkpoint_folders,
    find_last_valid_checkpoint,
    read_latest,
    validate_checkpoint,
    write_manifest,
)
from trainers.reliability.events import read_events


KILLED = -signal.SIGKILL
BITWISE = "the run ends with the weights of the uninterrupted run, bitwise"
PREVIOUS = "the error is named, and the checkpoint before is used"


def fault(name: str, survived_if: str = BITWISE):
    return pytest.mark.fault(name, survived_if=survived_if)


def saves_lost(folder: Path, every: int = 2) -> int:
    """How many saves had begun, and are not there to go on from."""
    begun = max((int(path.name.split("-")[1]) for path in checkpoint_folders(folder)), default=0)
    found = find_last_valid_checkpoint(folder)
    return (begun - (0 if found is None else int(found.name.split("-")[1]))) // every


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert in_process(train, folder) == 0
    return folder


def finish(folder: Path, uninterrupted: Path, *, start: int, **options) -> None:
    """Go on, and see that it is from `checkpoint-{start}` and comes to the weights of the uninterrupted run."""
    found = find_last_valid_checkpoint(folder)
    assert (0 if found is None else int(found.name.split("-")[1])) == start
    assert in_process(train, folder, **options) == 0
    assert same_weights(folder, uninterrupted)
    assert find_last_valid_checkpoint(folder).name == read_latest(folder) == "checkpoint-10"


# --- killed at a step ---------------------------------------------------------------------------------------------


@fault("SIGKILL between two saves")
def test_killed_once(tmp_path, uninterrupted, survived):
    assert in_process(train, tmp_path, kill_at_step=5, background=False) == KILLED
    survived(lost=saves_lost(tmp_path))
    finish(tmp_path, uninterrupted, start=4)


@pytest.mark.slow
@fault("SIGKILL at random steps, five a run")
@pytest.mark.parametrize("seed", range(3))
def test_killed_five_times_at_random_steps(tmp_path, uninterrupted, seed, survived):
    """A kill one step after a save may come before its commit in the background: then one checkpoint earlier."""
    draw, reached, lost = random.Random(seed), 0, 0
    for _ in range(5):
        step = draw.randint(reached, min(reached + 4, 9))
        assert in_process(train, tmp_path, kill_at_step=step) == KILLED
        found = find_last_valid_checkpoint(tmp_path)
        reached = 0 if found is None else int(found.name.split("-")[1])
        assert reached >= step - step % 2 - 2
        lost = max(lost, saves_lost(tmp_path))
    assert in_process(train, tmp_path) == 0
    assert same_weights(tmp_path, uninterrupted)
    survived(5, lost=lost)


@pytest.mark.slow
@fault("SIGKILL from outside at random moments, a save each step")
def test_killed_from_outside_at_random_moments(tmp_path, uninterrupted, survived):
    """Runs are started again until they come to their end, and new ones until ten kills have hit.

    A moment is drawn from the time of a whole run on this machine, so that a fast one is hit as often as a slow one.
    """
    start = time.perf_counter()
    assert in_process(train, tmp_path / "timed", save_steps=1) == 0
    whole_run = time.perf_counter() - start
    draw, killed, ended, lost = random.Random(0), 0, 0, 0
    while killed < 10:
        folder = tmp_path / str(ended)
        process = SERVER.Process(target=train, args=(folder,), kwargs={"save_steps": 1})
        process.start()
        process.join(draw.uniform(0, whole_run))
        if process.exitcode is None:
            process.kill()
            process.join()
            killed += 1
            lost = max(lost, saves_lost(folder, every=1))
        else:
            assert process.exitcode == 0 and same_weights(folder, uninterrupted)
            ended += 1
            assert ended < 50, f"{killed} of 10 kills have hit"
    assert in_process(train, tmp_path / str(ended), save_steps=1) == 0
    assert same_weights(tmp_path / str(ended), uninterrupted)
    survived(killed, lost=lost)


# --- killed in the middle of a save -------------------------------------------------------------------------------


def killed_in_the_save_of_step_4(folder: Path, number: int, **options) -> bool:
    """Whether there was such a file operation; if so, nothing that was committed is lost."""
    code = in_process(train, folder, kill_at_file=("checkpoint-4", number), **options)
    if code == 0:
        return False
    assert code == KILLED
    found = find_last_valid_checkpoint(folder)
    if found is None:  # the commit of checkpoint-2 was still under way beside training
        assert options.get("background", True) and not (folder / "checkpoint-2" / MANIFEST_NAME).exists()
    else:
        assert found.name in ("checkpoint-2", "checkpoint-4", "checkpoint-6")
        if found.name == "checkpoint-6":  # the limit was applied to checkpoint-4
            return options["save_total_limit"] == 1
    assert (folder / "checkpoint-4" / MANIFEST_NAME).exists() == (found is not None and found.name == "checkpoint-4")
    return True


# The folder, the state, a file that is hashed, and of the manifest its temporary name, its rename, what comes after.
@pytest.mark.parametrize(("number", "start"), [(1, 2), (8, 2), (15, 2), (22, 2), (23, 2), (24, 4)])
def test_killed_in_the_middle_of_a_save(tmp_path, number, start):
    assert killed_in_the_save_of_step_4(tmp_path, number, background=False)
    assert find_last_valid_checkpoint(tmp_path).name == f"checkpoint-{start}"


@fault("SIGKILL while the weights or the optimizer are being written")
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt"])
def test_killed_in_the_middle_of_a_file(tmp_path, name, uninterrupted, survived):
    assert in_process(train, tmp_path, kill_at=f"checkpoint-4/{name}", background=False) == KILLED
    survived(lost=saves_lost(tmp_path))
    finish(tmp_path, uninterrupted, start=2)


@pytest.mark.slow
@fault("SIGKILL before each file operation of a save")
@pytest.mark.parametrize("options", [{"background": False}, {"save_total_limit": 1, "background": False}, {}], ids=str)
def test_killed_at_every_file_operation_of_a_save(tmp_path, options, uninterrupted, survived):
    number, lost = 1, 0
    while killed_in_the_save_of_step_4(tmp_path / str(number), number, **options):
        lost = max(lost, saves_lost(tmp_path / str(number)))
        assert in_process(train, tmp_path / str(number), **options) == 0
        assert same_weights(tmp_path / str(number), uninterrupted)
        number += 1
    assert number > 20
    survived(number - 1, lost=lost)


def test_killed_between_the_save_and_its_commit_without_an_earlier_one(tmp_path, uninterrupted):
    """The run says that it writes manifests before it saves anything: the first save is not trusted for its looks."""
    assert in_process(train, tmp_path, kill_at_file=(f"checkpoint-2/.{MANIFEST_NAME}", 1)) == KILLED
    assert not validate_checkpoint(tmp_path / "checkpoint-2")  # by its looks it is whole
    finish(tmp_path, uninterrupted, start=0)


def test_a_limit_of_one_keeps_the_committed_checkpoint_until_the_next_is(tmp_path, uninterrupted):
    options = {"save_total_limit": 1, "background": False}
    assert in_process(train, tmp_path, kill_at_file=(f"checkpoint-4/.{MANIFEST_NAME}", 1), **options) == KILLED
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-2", "checkpoint-4"]
    finish(tmp_path, uninterrupted, start=2, **options)
    assert [folder.name for folder in checkpoint_folders(tmp_path)] == ["checkpoint-10"]


def test_without_manifests_a_kill_in_a_save_is_survived_too(tmp_path, uninterrupted):
    options = {"manifests": False}
    assert in_process(train, tmp_path, kill_at_file=("checkpoint-4/trainer_state.json", 1), **options) == KILLED
    assert find_last_valid_checkpoint(tmp_path).name == "checkpoint-2"
    assert in_process(train, tmp_path, **options) == 0
    assert same_weights(tmp_path, uninterrupted)


# --- damaged ------------------------------------------------------------------------------------------------------


@pytest.fixture
def four_steps(tmp_path, uninterrupted):
    for name in ("checkpoint-2", "checkpoint-4"):
        shutil.copytree(uninterrupted / name, tmp_path / name)
    return tmp_path


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 2)  # the last byte of a text is only the end of its line


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[random.Random(file.name).randrange(len(content))] ^= 1
    file.write_bytes(content)


DAMAGED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", MANIFEST_NAME]


@fault("A file of the newest checkpoint cut off, one bit of it flipped, or deleted", PREVIOUS)
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(four_steps, damage, name, caplog, survived):
    assert find_last_valid_checkpoint(four_steps).name == "checkpoint-4"
    damage(four_steps / "checkpoint-4" / name)
    assert find_last_valid_checkpoint(four_steps).name == "checkpoint-2"
    assert "checkpoint-4 is" in caplog.text and name in caplog.text
    survived(lost=saves_lost(four_steps))


def test_a_run_goes_on_from_before_a_damaged_checkpoint(four_steps, uninterrupted):
    flip_a_bit(four_steps / "checkpoint-4" / "model.safetensors")
    finish(four_steps, uninterrupted, start=2)
    assert validate_checkpoint(four_steps / "checkpoint-4") == []  # written anew


# --- the disk -----------------------------------------------------------------------------------------------------

LARGE = {"hidden_size": 64, "intermediate_size": 256}  # weights of 0.5 MB, an optimizer of 1 MB


def train_and_report(folder: Path, report: Path, limit: int | None = None) -> None:
    """With files of at most `limit` bytes; the error, if it ends by one, goes to `report`."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        train(folder, model=tiny_model(**LARGE))
    except Exception as error:
        report.write_text(str(error))
        raise


@fault("A limit to the size of files, reached in a save", PREVIOUS)
def test_files_must_not_grow(tmp_path, survived):
    folder, report = tmp_path / "run", tmp_path / "error"
    assert in_process(train, folder, model=tiny_model(**LARGE), max_steps=2) == 0
    before = {p.name: p.read_bytes() for p in (folder / "checkpoint-2").iterdir()}
    assert in_process(train_and_report, folder, report, 100_000) == 1
    assert "File too large" in report.read_text()
    assert {p.name: p.read_bytes() for p in (folder / "checkpoint-2").iterdir()} == before
    assert find_last_valid_checkpoint(folder).name == "checkpoint-2"
    survived(lost=saves_lost(folder))
    assert in_process(train, folder, model=tiny_model(**LARGE)) == 0
    assert find_last_valid_checkpoint(folder).name == "checkpoint-10"


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@fault("The disk full in a save", PREVIOUS)
def test_a_full_disk(small_disk, tmp_path, survived):
    """The second checkpoint does not fit; the first stays, and with space the run goes on from it."""
    report = tmp_path / "error"
    assert in_process(train_and_report, small_disk, report) == 1
    assert "No space left" in report.read_text() or "unexpected pos" in report.read_text()
    assert find_last_valid_checkpoint(small_disk).name == "checkpoint-2"
    survived(lost=saves_lost(small_disk))
    subprocess.run(["mount", "-o", "remount,size=30m", str(small_disk)], check=True)
    assert in_process(train, small_disk, model=tiny_model(**LARGE)) == 0
    assert find_last_valid_checkpoint(small_disk).name == "checkpoint-10"


class NoRoomForTheManifest(TrainerCallback):
    """A folder in its place makes the rename fail, as the disk would."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            (Path(args.output_dir) / "checkpoint-4" / MANIFEST_NAME).mkdir()


@fault("The manifest of a checkpoint cannot be written", PREVIOUS)
def test_the_manifest_cannot_be_written(tmp_path, survived):
    """The run goes on, the checkpoint does not count."""
    tiny_trainer(tmp_path, ValidatedCheckpointCallback(), NoRoomForTheManifest(), max_steps=4).train()
    (event,) = read_events(tmp_path)
    assert (event.severity, event.step) == ("error", 4) and "checkpoint-4 was not committed" in event.message
    assert find_last_valid_checkpoint(tmp_path).name == read_latest(tmp_path) == "checkpoint-2"
    survived(lost=saves_lost(tmp_path))


@pytest.mark.slow
def test_what_a_manifest_costs(tmp_path, record_property):
    """Seconds for a GB that is in the page cache; the number is for the report, the bound against a blunder."""
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    save_file({f"w{i}": torch.randn(2**22) for i in range(16)}, folder / "model.safetensors")
    (folder / "trainer_state.json").write_text(json.dumps({}))
    start = time.perf_counter()
    write_manifest(folder, step=1, world_size=1)
    seconds = (time.perf_counter() - start) / (16 * 2**24 / 1e9)
    record_property("seconds_per_gigabyte", seconds)
    print(f"{seconds:.2f} s per GB")
    assert seconds < 60
