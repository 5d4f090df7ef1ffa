"""The recipe on a few drawn users: every arm measured, nothing done twice, a kill between users loses nothing."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from trainers.data import CtrRows
from trainers.data.drifted_clicks import draw_drifted_clicks
from trainers.federated.core import RoundStore
from trainers.recipes import finetune_on_device as recipe
from trainers.recipes.finetune_on_device import ALL_ARMS, PRESETS, correction_of, main
from trainers.recipes.on_device_evidence import _some_users, drawn_arms
from trainers.report import read_results


OPTIONS = {
    "data_name": "drifted-clicks",
    "output_dir": "run",
    "architectures": ["lr", "din"],
    "arms": ["scale_global", "cloud", "plain", "offset_model", "bias"],
    "seeds": [0, 1],
    "device_learning_rates": [0.1, 0.5],
    "tune_users": 5,
    "history_length": 3,
    "cold_share": 0.5,
    "min_samples": 4,
    "device_steps": 2,
    "max_chunk_bytes": 20000,
    "embedding_dim": 4,
    "hidden_sizes": [4],
    "num_train_epochs": 1,
    "per_device_train_batch_size": 64,
    "use_cpu": "true",
    "report_to": "none",
    "disable_tqdm": "true",
}


def few_users(**options):
    return draw_drifted_clicks(num_users=8, num_items=40, num_local=20, num_test=1, dim=2, **options)


def command_line(**options):
    argv = []
    for name, value in (OPTIONS | options).items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recipe, "draw_drifted_clicks", few_users)
    recipe.load_data.cache_clear()
    yield
    recipe.load_data.cache_clear()


def cell(path):
    return json.loads((Path("run/cells") / path).read_text())["found"]


def written(root):
    return {file: file.stat().st_mtime_ns for file in sorted(Path(root).rglob("*")) if file.is_file()}


def test_every_arm_is_measured_and_a_second_call_repeats_nothing(tmp_path):
    main(command_line())
    results = read_results("run")
    assert results.method == "label_correction" and results.seeds == [0, 1]
    gauc = results.metrics["gauc"]
    assert list(gauc.baseline) == ["cloud", "plain", "offset_model", "bias"] and gauc.n == 2
    assert {"gauc_lr", "log_loss_din", "harm_rate", "bytes_down_per_user", "users_per_second_lr"} <= set(
        results.metrics
    )
    assert "cloud" not in results.metrics["harm_rate"].baseline
    for seed in (0, 1):
        plain, cloud = cell(f"din-seed{seed}/plain/measured.json"), cell(f"din-seed{seed}/cloud/untuned.json")
        assert plain["users"] == cloud["users"] and plain["learning_rate"] in (0.1, 0.5)
        assert plain["wire"]["up"] == 0
        assert 0.8 < plain["wire"]["down"] / (8 * 4 * plain["cost"]["parameters"]) < 3, "headers, and no others' rows"
    files = [[f"{name}-seed{seed}/plain/measured.json" for name in ("lr", "din")] for seed in (0, 1)]
    mean = [np.mean([cell(file)["gauc"] for file in seed]) for seed in files]
    assert gauc.baseline["plain"].values == pytest.approx(mean)
    record = results.evidence
    assert set(record["learning_rate_chosen"]) == {
        f"{a} {arm}" for a in ("lr", "din") for arm in ("scale_global", "plain", "offset_model", "bias")
    }
    assert record["drift_of_the_training_rows"]["share_of_users_off_by_more_than_0.1"] > 0
    assert str(tmp_path) not in json.dumps(record) + results.command
    assert {figure.path for figure in results.figures} == {
        "figures/users_lr.png",
        "figures/users_din.png",
        "figures/log_loss.png",
        "figures/gauc.png",
    }
    assert AutoModelForSequenceClassification.from_pretrained("run").config.architecture == "lr"
    assert {"auc_cold_users_lr", "device_peak_bytes_din", "device_seconds_per_user_lr"} <= set(results.metrics)
    assert set(results.metrics["auc_cold_users_lr"].baseline) == set(gauc.baseline)
    assert results.metrics["auc_cold_users_lr"].note == "4 users" and record["users_that_no_cloud_has_seen"] == 4
    peak = results.metrics["device_peak_bytes_din"]
    assert peak.baseline == {} and peak.note == "the same for all that fine-tune"
    before = written("run/cells")
    main(command_line())
    assert written("run/cells") == before and read_results("run").metrics == results.metrics


FEW = {"architectures": ["lr"], "arms": ["scale_global", "plain", "cloud"], "seeds": [0]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_steps": 5}, r"rates/scale_global.json is of other settings \(device.device_steps: 2, now 5\)"),
        ({"drift": 0.0}, r"cloud/fit.json is of other settings \(cloud_data"),
        ({"learning_rate": 0.5}, r"cloud/fit.json is of other settings \(cloud.learning_rate: 0.003, now 0.5\)"),
        ({"num_train_epochs": 2}, "cloud/fit.json is of other settings"),
        ({"device_learning_rates": [0.2, 0.5]}, r"other settings \(device.device_learning_rate: \[0.1, 0.5\], now"),
        ({"save_users": "false"}, r"measured.json is of other settings \(device.save_users: True, now False\)"),
        ({"cold_share": 0.25}, "cloud/fit.json is of other settings"),
    ],
)
def test_results_of_other_settings_are_not_passed_off(options, message, finished_run):
    before = written("run")
    with pytest.raises(SystemExit, match=message + ".*Give another --output_dir, or delete it"):
        main(command_line(**(FEW | options)))
    assert written("run").keys() == before.keys() and read_results("run").seeds == [0]


def test_results_that_do_not_say_what_they_are_of_are_refused(finished_run):
    file = Path("run/cells/lr-seed0/plain/measured.json")
    file.write_text(json.dumps(json.loads(file.read_text())["found"]))
    with pytest.raises(SystemExit, match="plain/measured.json does not say what it was made of"):
        main(command_line(**FEW))


def test_more_arms_and_seeds_go_on_in_the_same_folder(finished_run):
    before = written("run/cells")
    main(command_line(**(FEW | {"arms": [*FEW["arms"], "bias"], "seeds": [0, 1]})))
    assert before.items() <= written("run/cells").items()


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    """A finished run to copy."""
    root = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(recipe, "draw_drifted_clicks", few_users)
        recipe.load_data.cache_clear()
        main(command_line(**FEW))
    return root / "run"


@pytest.fixture
def finished_run(one_run):
    shutil.copytree(one_run, "run")


def test_a_rate_at_which_users_diverge_is_not_chosen():
    """Who diverges serves the cloud's model, which may well be the better one."""
    chosen = FEW | {"architectures": ["wide_deep"], "arms": ["plain", "cloud"]}
    main(command_line(**(chosen | {"device_learning_rates": [0.1, 1e15]})))
    rates = json.loads(Path("run/cells/wide_deep-seed0/rates/plain.json").read_text())["found"]
    assert rates["1e+15"] is None and 0 <= rates["0.1"] <= 1
    assert read_results("run").evidence["learning_rate_chosen"] == {"wide_deep plain": 0.1}
    with pytest.raises(SystemExit, match="users diverge at every learning rate"):
        main(command_line(**(chosen | {"device_learning_rates": [1e15, 1e16]}), output_dir="other"))


def test_the_cloud_is_drawn_wherever_it_stands():
    arms = [arm for arm in ALL_ARMS if arm != "cloud"] + ["cloud"]
    drawn = drawn_arms(arms)
    assert drawn[-1] == "cloud" and len(drawn) == 7 and not any(arm.endswith("_smoothed") for arm in drawn)
    assert drawn_arms(["plain", "cloud", "bias"]) == ["plain", "cloud", "bias"]
    main(command_line(**(FEW | {"arms": arms, "device_learning_rates": [0.1]})))
    assert Path("run/figures/users_lr.png").exists()


def test_the_rates_are_chosen_on_the_same_users():
    train = CtrRows({"labels": torch.zeros(10)}, torch.arange(10))
    validation = CtrRows({"labels": torch.zeros(5)}, torch.tensor([1, 3, 5, 6, 9]))
    parts = _some_users(train, validation, 4)
    assert [part.users.tolist() for part in parts] == [[0, 3, 6, 9], [3, 6, 9]]


KILLED = """
import os, signal, sys
from trainers.recipes import finetune_on_device as recipe
from trainers.federated.core import RoundStore
from tests.trainers.recipes import test_finetune_on_device as test
recipe.draw_drifted_clicks = test.few_users
commit, calls = RoundStore.commit, []
def dying(self, *args, **kwargs):
    calls.append(0)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return commit(self, *args, **kwargs)
RoundStore.commit = dying
recipe.main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.fault(
    "kill -9 between the users of a fine-tuning on devices", survived_if="finished users are not redone"
)
def test_a_kill_between_users_loses_nothing(tmp_path, survived):
    chosen = {"architectures": ["lr"], "arms": ["plain", "cloud"], "seeds": [0], "device_learning_rates": [0.3]}
    argv = command_line(**chosen, max_chunk_bytes=1)
    main([*argv, "--output_dir", "whole"])
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", KILLED, *argv], env=environment, capture_output=True)
    assert ended.returncode == -signal.SIGKILL
    users = Path("run/cells/lr-seed0/plain/users")
    kept = {path: path.stat().st_mtime_ns for path in users.glob("round-*/*")}
    assert RoundStore(users).rounds() == [0, 1]
    main(argv)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(RoundStore(users).rounds()) > 2
    ours, whole = read_results("run").metrics, read_results("whole").metrics
    assert ours["gauc_lr"] == whole["gauc_lr"] and ours["log_loss_lr"] == whole["log_loss_lr"]
    survived()


def test_arms_by_name():
    assert correction_of("plain", 0.4, 5).name == "plain" and correction_of("bias", 0.4, 5).free_intercept
    found = correction_of("offset_smoothed", 0.4, 5)
    assert (found.method, found.prior, found.global_ctr, found.strength) == ("offset", "smoothed", 0.4, 5)
    for arm in ALL_ARMS:
        if arm != "cloud":
            assert correction_of(arm, 0.4, 5).name == arm
    assert PRESETS["evidence"]["arms"][:3] == ["scale_global", "cloud", "plain"]
    assert "grid of device learning rates" in PRESETS["evidence"]["note"], "what was changed after results were seen"


@pytest.mark.parametrize(
    ("options", "message"), [({"arms": ["guess_global"]}, "guess_global"), ({"data_name": "mine"}, "'mine'")]
)
def test_what_is_not_known_is_said(options, message):
    with pytest.raises(SystemExit, match=message):
        main(command_line(**options))
