"""The recipe as users start it: the demo in a shrunken form, killed and repeated, on one process and on two."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_models.moe import configuration_sigma_moe
from model_cards.build import build_card
from tests.forked import run_python
from tests.trainers.recipes.test_language_model import TINY, losses, write_corpus
from trainers.recipes import pretrain_sigma_moe
from trainers.recipes.language_model import Fit
from trainers.recipes.pretrain_sigma_moe import main, steps_in_equal_seconds
from trainers.report import read_results


ROOT = Path(__file__).parents[3]
SEQUENCE = 192  # room for a prompt and its completion
# A shape small enough for a test; everything else is the demo preset's.
DRIVER = """
import os, sys
import torch
torch.set_num_threads(1)
from hf_models.moe import configuration_sigma_moe
from trainers.recipes.pretrain_sigma_moe import main
configuration_sigma_moe.PRESETS["tiny"] = configuration_sigma_moe.PRESETS["demo"] | {tiny!r}
if "EXPECTED_WORLD" in os.environ:
    from accelerate import PartialState
    assert PartialState(cpu=True).num_processes == int(os.environ["EXPECTED_WORLD"])
main(sys.argv[1:])
"""


def arguments(**options):
    values = {
        "preset": "demo",
        "model_preset": "tiny",
        "dataset_name": "corpus",
        "held_out_fraction": 0.2,
        "output_dir": "run",
        "max_steps": 12,
        "sequence_length": SEQUENCE,
        "tokenizer_vocab_size": 300,
        "per_device_train_batch_size": 2,
        "initial_top_k": [2, 1],
        "use_cpu": True,
        "eval_steps": 6,
        "save_steps": 4,
        "logging_steps": 1,
        "num_completions": 3,
        "ngram_order": 3,
        "warmup_steps": 2,
        "lr_scheduler_kwargs": '{"num_decay_steps": 4}',
        "max_eval_blocks": 8,
    } | options
    argv = []
    for name, value in values.items():
        argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return argv


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    torch.set_num_threads(1)
    shape = configuration_sigma_moe.PRESETS["demo"] | TINY
    monkeypatch.setitem(configuration_sigma_moe.PRESETS, "tiny", shape)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The folder in which the demo ran to its end, and what it printed."""
    home = tmp_path_factory.mktemp("demo")
    write_corpus(home / "corpus")
    with pytest.MonkeyPatch.context() as patch, (home / "screen.txt").open("w") as screen:
        patch.chdir(home)
        patch.setattr(sys, "stdout", screen)
        patch.setitem(configuration_sigma_moe.PRESETS, "tiny", configuration_sigma_moe.PRESETS["demo"] | TINY)
        main(arguments())
    return home, (home / "screen.txt").read_text()


def fit_of(folder) -> Fit:
    return Fit(**json.loads((folder / "fit.json").read_text())["fit"])


# --- the demo --------------------------------------------------------------------------------------------------------


def test_results(demo):
    home, _ = demo
    results = read_results(home / "run")
    assert (results.method, results.preset, results.seeds) == ("sigma_moe", "demo", [42])
    quality = results.metrics["held_out_bits_per_character"]
    assert set(quality.baseline) == {"lbl_top1", "dense", "dense_equal_seconds", "3gram"}
    assert 0 < quality.value < 20
    for metric in ("layer0_max_deviation", "layer0_min_deviation", "layer0_dead_experts"):
        assert set(results.metrics[metric].baseline) == {"lbl_top1"}
    for when in ("before_switch", "after_switch", "at_end"):
        assert 0 < results.metrics[f"loss_{when}"].value < 10
    assert results.metrics["completions_that_parse"].n == 3 == len(results.samples)
    assert results.evidence["tokens_per_step"] == 2 * SEQUENCE
    assert results.evidence["initial_top_k"] == [2, 1]
    assert str(home) not in (home / "run" / "results.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(home / "run")
    assert results.model.parameters_total == sum(p.numel() for p in model.parameters())
    assert results.model.parameters_active == model.num_active_parameters()


def test_figures(demo):
    home, _ = demo
    listed = {figure.path for figure in read_results(home / "run").figures}
    assert listed == {"figures/balance.png", "figures/expert_load.png", "figures/loss.png"}
    for path in listed:
        assert (home / "run" / path).read_bytes().startswith(b"\x89PNG")


def test_equal_seconds(demo):
    home, _ = demo
    main_run, dense, equal = (
        fit_of(home / "run" / name) for name in ("", "baselines/dense", "baselines/dense_equal_seconds")
    )
    assert (main_run.steps, dense.steps) == (12, 12) and main_run.tokens == dense.tokens
    assert equal.steps == steps_in_equal_seconds(main_run, dense)
    assert equal.steps == max(1, round(12 * main_run.train_seconds / dense.train_seconds))


def test_the_folder_is_a_repository(demo):
    home, _ = demo
    model = AutoModelForCausalLM.from_pretrained(home / "run")
    tokenizer = AutoTokenizer.from_pretrained(home / "run")
    assert model.config.top_k_per_layer == [1, 1]
    out = model.generate(**tokenizer("def scale", return_tensors="pt"), max_new_tokens=5)
    assert tokenizer.decode(out[0]).startswith("def scale")
    last = load_file(home / "run" / "checkpoint-12" / "model.safetensors")
    for name, tensor in load_file(home / "run" / "model.safetensors").items():
        assert torch.equal(tensor, last[name])


def test_the_card_passes_its_own_check(demo, tmp_path):
    home, _ = demo
    for flags in ([], ["--check"]):
        done = run_python("-m", "model_cards.build", *flags, "run", cwd=home)
        assert done.returncode == 0, done.stderr
    assert (home / "run" / "README.md").read_text().strip() == build_card(home / "run").strip()


def test_the_last_screen(demo):
    home, screen = demo
    screen = screen[screen.index("Sigma-MoE is trained") :]
    made, following = screen.split("Next:")
    for line in (line for line in made.splitlines() if line.rstrip("/").split("/")[0].endswith("run")):
        assert (home / line.split()[-1]).exists(), line
    for name in ("sigma_moe", "lbl_top1", "dense", "dense_equal_seconds", "3gram"):
        assert f"  {name} " in made
    card, generate, publish = [shlex.split(line, comments=True) for line in following.strip().splitlines()]
    assert card == ["python", "-m", "model_cards.build", "run"]
    assert generate[:2] == ["python", "-c"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        exec(generate[2], {"print": (written := []).append})
    assert written[0].startswith("def read(path):")

    assert publish[:4] == ["python", "-m", "model_cards.publish", "run"]
    done = run_python(*publish[1:], "--dry-run", cwd=home)
    assert done.returncode == 0, done.stderr
    goes, stays = done.stdout.split("stay here: ")
    for name in ("model.safetensors", "tokenizer.json", "results.json", "figures/loss.png", "modeling_sigma_moe.py"):
        assert f"  {name} " in goes
    assert "training_args.bin" in stays and "baselines/" in stays


def test_repeating_the_command_trains_nothing(demo, monkeypatch, capsys):
    home, _ = demo
    kinds = ("*.safetensors", "fit.json", "balance.jsonl", "switch.json", "trainer_state.json")
    files = [path for kind in kinds for path in (home / "run").rglob(kind)]
    before = {path: path.stat().st_mtime_ns for path in files}
    results = read_results(home / "run")
    monkeypatch.chdir(home)
    main(arguments())
    assert {path: path.stat().st_mtime_ns for path in files} == before
    again = read_results(home / "run")
    assert again.samples == results.samples and again.metrics == results.metrics
    assert "Sigma-MoE is trained" in capsys.readouterr().out


def test_other_options_are_refused(demo, monkeypatch):
    home, _ = demo
    monkeypatch.chdir(home)
    for option in ({"switch_at": 0.5}, {"initial_top_k": [4, 1]}, {"seed": 1}, {"sequence_length": 64}):
        with pytest.raises(ValueError, match="other options"):
            main(arguments(**option))


# --- other ways to start it ------------------------------------------------------------------------------------------


def plain(**options):
    """Without what takes time and is looked at above."""
    return arguments(**({"baselines": [], "num_completions": 0, "ngram_order": 0, "max_steps": 4} | options))


def test_prose_in_an_absolute_folder(tmp_path, monkeypatch):
    """The demo's completions are of Python functions, which other people's text does not hold."""
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"Chapter {i}. It was a bright cold day in April. " * 20)
    monkeypatch.chdir(tmp_path)
    main(plain(dataset_name=tmp_path / "text", num_completions=5, baselines=["loss_free", "qwen3_moe"]))
    results = read_results(tmp_path / "run")
    assert "completions_that_parse" not in results.metrics and results.data.name == "text"
    assert set(results.metrics["held_out_bits_per_character"].baseline) == {"loss_free", "qwen3_moe"}
    build_card(tmp_path / "run")


def test_top1_from_the_start(tmp_path, monkeypatch):
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    main(plain(initial_top_k=[], max_steps=2, sequence_length=32, num_completions=2))  # no room for a completion
    results = read_results(tmp_path / "run")
    assert "loss_before_switch" not in results.metrics and "completions_that_parse" not in results.metrics


@pytest.mark.parametrize("baselines", [["dense_equal_seconds"], ["dense_equal_seconds", "dense"]])
def test_equal_seconds_needs_the_dense_run(baselines):
    with pytest.raises(SystemExit, match="needs dense before it"):
        main(arguments(baselines=baselines))


def test_a_misspelt_baseline_is_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="dens: not known. Choose from .*dense"):
        main(arguments(baselines=["dens"]))
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotADirectoryError, match="choose an --output_dir that you may write to"):
        main(arguments(output_dir="file/run"))


@pytest.mark.parametrize("initial_top_k", [[2], [2, 9], [2, 0]])
def test_a_schedule_that_does_not_fit(tmp_path, monkeypatch, initial_top_k):
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give one value per layer, each in 1..num_experts"):
        main(plain(initial_top_k=initial_top_k))


def test_a_run_too_short_to_time():
    timed = Fit("a", 0, 3, 3, 1e-3, 0.0, 1.0, 1.0, 1, [])
    with pytest.raises(ValueError, match="Raise --max_steps"):
        steps_in_equal_seconds(timed, timed)


def test_interrupted(tmp_path, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretrain_sigma_moe, "pretrain", interrupt)
    with pytest.raises(SystemExit) as error:
        main(arguments())
    assert error.value.code == 130
    assert "The same command goes on from the last checkpoint in run" in capsys.readouterr().out


# --- processes -------------------------------------------------------------------------------------------------------


def start(home, launcher, *argv, **environment):
    driver = home / "driver.py"
    driver.write_text(DRIVER.format(tiny=TINY))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    with (home / "out.txt").open("a") as out:
        return subprocess.Popen(
            [sys.executable, *launcher, str(driver), *argv], cwd=home, env=environment, stdout=out, stderr=out
        )


@pytest.mark.slow
def test_killed_and_repeated(tmp_path, monkeypatch):
    homes = [tmp_path / name for name in ("killed", "whole")]
    options = {"max_steps": 300, "save_steps": 5, "save_total_limit": 2, "eval_steps": 150}
    options |= {"baselines": ["dense"]}
    for home in homes:
        write_corpus(home / "corpus")
    for milestone in ("run/checkpoint-20", "run/baselines/dense/checkpoint-20"):
        process = start(homes[0], [], *plain(**options))
        deadline = time.monotonic() + 200
        while not (homes[0] / milestone).exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (homes[0] / "out.txt").read_text()[-3000:]
        assert not (homes[0] / "run" / "results.json").exists()
    assert "fit" in json.loads((homes[0] / "run" / "fit.json").read_text())
    assert "fit" not in json.loads((homes[0] / "run" / "baselines" / "dense" / "fit.json").read_text())
    process = start(homes[0], [], *plain(**options))
    assert process.wait(timeout=300) == 0, (homes[0] / "out.txt").read_text()[-3000:]

    monkeypatch.chdir(homes[1])
    main(plain(**options))
    for name in ("model.safetensors", "baselines/dense/model.safetensors", "logs/balance.jsonl", "logs/switch.json"):
        assert (homes[0] / "run" / name).read_bytes() == (homes[1] / "run" / name).read_bytes(), name
    for name in ("", "baselines/dense"):
        ours, theirs = (fit_of(home / "run" / name) for home in homes)
        assert losses(ours.history) == losses(theirs.history)


LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_are_one(tmp_path, monkeypatch, launcher):
    homes = [tmp_path / name for name in ("two", "one")]
    for home in homes:
        write_corpus(home / "corpus")
    options = {"max_steps": 6, "save_steps": 3, "eval_steps": 3, "baselines": ["dense"]}
    process = start(homes[0], LAUNCHERS[launcher], *plain(**options), ACCELERATE_USE_CPU="true", EXPECTED_WORLD="2")
    assert process.wait(timeout=500) == 0, (homes[0] / "out.txt").read_text()[-5000:]

    monkeypatch.chdir(homes[1])
    main(plain(per_device_train_batch_size=4, **options))
    for name in ("", "baselines/dense"):
        two, one = (fit_of(home / "run" / name) for home in homes)
        assert (two.steps, two.tokens) == (one.steps, one.tokens) == (6, 6 * 4 * SEQUENCE)
        for a, b in zip(losses(two.history), losses(one.history), strict=True):
            assert a.keys() == b.keys()
            for field in ("loss", "eval_loss", "grad_norm", "moe/max_violation", "moe/load_balancing_loss"):
                if field in b:
                    assert a[field] == pytest.approx(b[field], rel=2e-5), (name, a["step"], field)
        assert two.nats_per_token == pytest.approx(one.nats_per_token, rel=1e-5)
    two, one = (load_file(home / "run" / "model.safetensors") for home in homes)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=2e-3)
    rows = [(home / "run" / "logs" / "balance.jsonl").read_text().splitlines() for home in homes]
    assert len(rows[0]) == len(rows[1])
    assert (homes[0] / "out.txt").read_text().count("Sigma-MoE is trained") == 1
