"""The recipe of MSign: the paper's set-ups as models and groups, what each arm is, and a small run of all of them."""

import math

import pytest
import torch
from transformers import TrainingArguments

from tests.trainers.recipes.tiny_comparison import command_line, write_corpus
from trainers.data import train_tokenizer
from trainers.optimizers import MSign, MuonAdamW
from trainers.recipes import stability_msign as recipe
from trainers.recipes.arguments import DataArguments, RecipeTrainingArguments, parse_arguments
from trainers.recipes.comparison import ComparisonArguments, Job
from trainers.recipes.stability_models import SHAPES, build_model, parameter_groups
from trainers.recipes.stability_msign import ARMS, ArmOptimizer, StabilityArguments, main
from trainers.report import read_results


TYPES = (ComparisonArguments, StabilityArguments, DataArguments, RecipeTrainingArguments)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["def f(x):\n    return x\n"] * 3, vocab_size=261, show_progress=False)


@pytest.fixture(scope="module")
def proxy(tokenizer):
    return build_model("proxy", tokenizer, 32, 0)


# --- models ----------------------------------------------------------------------------------------------------------


def test_the_proxy_has_the_paper_s_blocks_and_nothing_else_that_learns(proxy):
    trained = {name: p for name, p in proxy.named_parameters() if p.requires_grad}
    blocks = sum(p.numel() for name, p in trained.items() if ".h." in name and p.ndim == 2)
    assert blocks == 24 * 27_648  # 3 d^2 + d^2 + 8 d^2 at d = 48
    assert not any(name.endswith("bias") or "wpe" in name for name in trained)
    frozen = [p for p in proxy.parameters() if not p.requires_grad]
    assert frozen and not any(p.any() for p in frozen)
    assert proxy.lm_head.weight is not proxy.transformer.wte.weight


def test_position_makes_no_difference(proxy):
    tokens = torch.tensor([[5, 6, 7, 5, 6, 7, 9]])
    with torch.no_grad():
        logits, others = (proxy.eval()(tokens, position_ids=at).logits for at in (None, torch.arange(7, 0, -1)[None]))
    assert torch.equal(logits, others)


def test_the_weights_start_as_the_appendix_says(proxy):
    block = proxy.transformer.h[3]
    queries, keys, values = block.attn.c_attn.weight.split(48, dim=1)
    assert not queries.any()
    for matrix, std in (
        (torch.cat([keys, values]), 0.08),
        (block.mlp.c_fc.weight, 0.08),
        (block.attn.c_proj.weight, 0.08 / math.sqrt(48)),
        (block.mlp.c_proj.weight, 0.08 / math.sqrt(48)),
        (proxy.lm_head.weight, 0.02),
    ):
        assert matrix.std().item() == pytest.approx(std, rel=0.05)


def test_groups_learn_at_the_muP_rates_and_hold_everything_once(proxy):
    groups = {g["name"]: g for g in parameter_groups(proxy, "proxy", learning_rate=6e-4, weight_decay=0.1)}
    assert {name: g["lr"] for name, g in groups.items()} == pytest.approx(
        {"layers": 9.6e-3, "embeddings": 2.4e-3, "norms": 6e-4}
    )
    assert {name: g["weight_decay"] for name, g in groups.items()} == {"layers": 0.1, "embeddings": 0.1, "norms": 0.0}
    held = [id(p) for g in groups.values() for p in g["params"]]
    assert sorted(held) == sorted(id(p) for p in proxy.parameters() if p.requires_grad)
    assert len(groups["layers"]["params"]) == 24 * 4 and len(groups["embeddings"]["params"]) == 2


@pytest.mark.parametrize(
    ("shape", "parameters"),
    [
        ("nanogpt-5m", 24 * (27_648 + 2 * 48) + 48 + 2 * 50_304 * 48),
        ("llama-1b", 16 * (4 * 2048**2 + 3 * 2048 * 5440 + 2 * 2048) + 2048 + 2 * 32_000 * 2048),
        (
            "llama-moe-3b",
            16 * (4 * 2048**2 + 16 * (3 * 2048 * 1360 + 2048) + 2 * 2048) + 2048 + 2 * 32_000 * 2048,
        ),
    ],
)
def test_the_paper_s_sizes(shape, parameters):
    class Vocabulary:
        bos_token_id = eos_token_id = pad_token_id = 0

        def __len__(self):
            return {"nanogpt-5m": 50_304}.get(shape, 32_000)

    with torch.device("meta"):
        model = build_model(shape, Vocabulary(), 256, 0)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


# --- arms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ARMS)
def test_arms_are_what_their_names_say(arm, proxy, tmp_path):
    args = RecipeTrainingArguments(str(tmp_path), use_cpu=True, report_to="none", weight_decay=0.1, msign_period=7)
    optimizer = ArmOptimizer()(proxy, arm=arm, shape="proxy", learning_rate=1e-3, args=args)
    base = optimizer.base if isinstance(optimizer, MSign) else optimizer
    assert isinstance(optimizer, MSign) == ("msign" in arm) and isinstance(base, MuonAdamW) == ("muon" in arm)
    names = {t.name.split(".")[3] for t in optimizer.targets} if isinstance(optimizer, MSign) else set()
    expected = {
        "msign": {"attn", "mlp"},
        "muon_msign": {"attn", "mlp"},
        "msign_attention": {"attn"},
        "msign_mlp": {"mlp"},
    }
    assert names == expected.get(arm, set())
    if isinstance(optimizer, MSign):
        assert optimizer.param_groups[0]["msign_period"] == 7
        assert len(optimizer.targets) == 24 * (4 if arm in ("msign", "muon_msign") else 2)


def test_only_plain_adamw_goes_unclipped(tokenizer, tmp_path):
    args = RecipeTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")

    class Data:
        validation = [{"input_ids": [0] * 8}]

    Data.tokenizer = tokenizer
    starts = {
        arm: recipe.build_arm(Job(arm, 0, 1e-3, 1), Data, args=StabilityArguments(), training_args=args)
        for arm in ("msign", "adamw", "adamw_clip")
    }
    assert {arm: dict(start.arguments) for arm, start in starts.items()} == {
        "msign": {},
        "adamw": {"max_grad_norm": 0.0},
        "adamw_clip": {},
    }
    first, *others = (start.model.state_dict() for start in starts.values())
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


# --- presets and the whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    argv = ("--preset", preset, "--use_cpu", "true", "--bf16", "false")
    name, (comparison, args, data, training) = parse_arguments(TYPES, recipe.PRESETS, argv, default_preset="demo")
    assert name == preset and set(comparison.arms) <= set(ARMS) and args.shape in SHAPES
    assert comparison.arms[0] == "msign" and "adamw_clip" in comparison.arms
    assert training.lr_scheduler_kwargs["num_decay_steps"] + training.warmup_steps == training.max_steps
    assert isinstance(training, TrainingArguments) and data.sequence_length > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"arms": ["msign", "sgd"]}, "--arms.*sgd.*Choose from msign"), ({"shape": "gpt-5"}, "--shape.*gpt-5.*proxy")],
)
def test_unknown_names_end_at_once(options, message):
    argv = [
        word
        for name, value in options.items()
        for word in (f"--{name}", *([value] if isinstance(value, str) else value))
    ]
    with pytest.raises(SystemExit, match=message):
        main(argv)


@pytest.mark.slow
def test_a_small_run_of_every_arm(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    monkeypatch.setitem(
        recipe.SHAPES,
        "proxy",
        recipe.SHAPES["proxy"].__class__(
            recipe.SHAPES["proxy"].model_class, recipe.SHAPES["proxy"].fields | {"n_layer": 4}, 16, 4
        ),
    )
    options = {"model_preset": None, "warmup_steps": 1, "tokenizer_vocab_size": 261}
    argv = command_line(
        **options,
        arms=list(ARMS),
        seeds=[0, 1],
        learning_rates=[1e-3],
        max_steps=6,
        msign_period=3,
        logging_steps=1,
        lr_scheduler_kwargs={"num_decay_steps": 5, "min_lr_ratio": 0.1},
        aggressive_learning_rate=2e-3,
    )
    main(argv)
    results = read_results(tmp_path / "run")
    assert results.method == "msign" and results.evidence["msign_period"] == 3
    loss, hard = results.metrics["held_out_loss"], results.metrics["held_out_loss_driven_hard"]
    assert list(loss.baseline) == list(hard.baseline) == list(ARMS)[1:] and loss.values != hard.values
    assert "msign 0.001" in loss.note and "0.002" in hard.note
    # logged before each step: at the last two, one and two steps after the application at step 3
    assert results.metrics["stable_rank_of_v"].value > results.metrics["stable_rank_of_v"].baseline["adamw"].value
    assert (tmp_path / "run" / "figures" / "stable_rank.png").stat().st_size > 1000
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "runs").rglob("fit.json")}
    assert len(first) == len(ARMS) * 2 * 2
    main(argv)
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "runs").rglob("fit.json")}
