"""The planner as its users call it."""

import json

import pytest
import torch
from transformers import LlamaConfig

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.plan import main
from trainers.planning import PRESETS, planned_model
from trainers.recipes import pretrain_m3bert, pretrain_m_moe, pretrain_mone, pretrain_sigma_moe


def run(capsys, *argv):
    code = main([str(each) for each in argv])
    screen = capsys.readouterr()
    return code, screen.out, screen.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with nothing in it but a config."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    ).save_pretrained(path)  # fmt: skip
    return path


def test_the_command_of_the_readme(capsys, tmp_path):
    file = tmp_path / "plan.json"
    code, out, _ = run(capsys, "--preset", "sigma-moe-tiny", "--gpus", 64, "--tokens", "1e12", "--json", file)
    plan = json.loads(file.read_text())
    assert code == 0
    memory, run_of = plan["memory"], plan["throughput"]
    with torch.device("meta"):
        model = SigmaMoeForCausalLM(SigmaMoeConfig.from_preset("sigma-moe-tiny"))
    assert plan["parameters"] == sum(p.numel() for p in model.parameters())
    assert memory["total"] == sum(value for name, value in memory.items() if name not in ("total", "moment"))
    # Of 96 experts the fullest of 64 ranks has 2, a third more than its share.
    assert 4 * plan["parameters"] / 64 < memory["parameters"] < 4 * plan["parameters"] / 64 * 4 / 3
    assert memory["optimizer"] == 2 * memory["parameters"]
    # Whole gradients in bf16, while they are accumulated.
    assert memory["gradients"] == 2 * plan["parameters"]
    assert run_of["tokens_per_step"] == 64 * 16 * 4096 and run_of["cost"] is None
    # 90 % of the tokens with the initial experts, the rest with one.
    assert sum(run_of["flops_per_token"].values()) == pytest.approx(0.9 * 7.8577e9 + 0.1 * 7.1781e9, rel=1e-4)
    assert run_of["days"][0] > run_of["days"][1] > 0
    for words in ("9.86% to 21.08%, reported [S]", "not seen in print", "--sync-each-batch", "not given"):
        assert words in out


def test_synchronised_accumulation_and_expert_parallelism_need_less(capsys, tmp_path):
    totals = {}
    for name, extra in {"plain": [], "sync": ["--sync-each-batch"], "ep": ["--sync-each-batch", "--ep", 8]}.items():
        file = tmp_path / f"{name}.json"
        argv = ("--preset", "sigma-moe-demo", "--gpus", 8, "--tokens", "1e9", "--gradient-accumulation", 4)
        assert run(capsys, *argv, *extra, "--json", file)[0] == 0
        totals[name] = json.loads(file.read_text())["memory"]
    assert totals["sync"]["gradients"] < totals["plain"]["gradients"] / 4
    assert totals["ep"]["buffers"] < totals["sync"]["buffers"]


def test_presets_are_those_of_the_recipes():
    recipes = {
        "sigma-moe-tiny": pretrain_sigma_moe.PRESETS["paper"],
        "sigma-moe-demo": pretrain_sigma_moe.PRESETS["demo"],
        "mone": pretrain_mone.PRESETS["paper"],
        "m-moe": pretrain_m_moe.PRESETS["paper"],
        "m3bert": pretrain_m3bert.PRESETS["paper"],
    }
    assert {*recipes, "sigma-v2-200b"} == PRESETS.keys()
    for name, recipe in recipes.items():
        training = planned_model(name).training
        assert training.sequence_length == recipe["sequence_length"]
        assert training.gradient_accumulation == recipe.get("gradient_accumulation_steps", 1)
        assert training.checkpointing == recipe.get("gradient_checkpointing", False)
        assert sum(share for share, _ in training.stages) == pytest.approx(1 if training.stages else 0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_build(name):
    model = planned_model(name)
    with torch.device("meta"):
        built = model.build(model.largest_stage())
    assert sum(p.numel() for p in built.parameters()) == model.parameters
    assert bool(model.num_experts) == (name != "m3bert")


def test_a_folder_of_somebody_else(capsys, folder, tmp_path):
    file = tmp_path / "plan.json"
    argv = ("--preset", folder, "--gpus", 2, "--tokens", "1e6", "--sharding", "ddp", "--batch-size", 2)
    code, out, _ = run(capsys, *argv, "--price-per-gpu-hour", 3, "--mfu", 0.2, 0.4, "--json", file)
    plan = json.loads(file.read_text())
    assert code == 0 and "given by --mfu" in out and plan["sequence_length"] == 128
    assert plan["throughput"]["cost"] == pytest.approx([3 * hours for hours in plan["throughput"]["gpu_hours"]])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sharding", "ddp"], ["gpu: H100", "a rank needs", "--sharding fsdp2"]),
        (["--no-checkpointing", "--batch-size", "4"], ["gpu: H100", "--checkpointing (then", "--sync-each-batch"]),
        (["--ep", "7"], ["ep: 7 must divide", "Choose one of 2, 4, 8, 16, 32"]),
        (["--replicas", "3"], ["replicas: 3 does not divide gpus=64"]),
        (["--sequence-length", "8192"], ["sequence_length: 8192", "4096 positions"]),
        (["--gpu-memory", "40"], ["gpu_memory, peak_flops"]),
        (["--batch-size", "0"], ["batch_size: 0"]),
        (["--tokens", "0"], ["tokens: 0.0"]),
        (["--mfu", "0.5", "0.1"], ["mfu: 0.5 to 0.1"]),
        (["--headroom", "1"], ["headroom: 1.0"]),
        (["--price-per-gpu-hour", "-1"], ["price_per_gpu_hour: -1.0"]),
    ],
)
def test_refused(capsys, argv, words):
    code, out, error = run(capsys, "--preset", "sigma-moe-tiny", "--gpus", 64, "--tokens", "1e12", *argv)
    assert (code, out) == (2, "")
    assert all(word in error for word in words), error


def test_a_name_that_is_none(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for name, words in (("sigma-tiny!", "no preset, folder"), (tmp_path / "empty", "without a usable config.json")):
        code, _, error = run(capsys, "--preset", name, "--gpus", 8, "--tokens", "1e9")
        assert code == 2 and words in error and "sigma-moe-tiny, sigma-moe-demo" in error
