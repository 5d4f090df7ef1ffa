"""MoNE beside its baselines: what is equal between the arms, what the metrics say, and the recipe in small."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_models.moe import MoneConfig, MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from model_cards.build import build_card
from tests.trainers.recipes.tiny_comparison import (
    TINY,
    add_tiny_preset,
    arguments_of,
    command_line,
    finished,
    times_of_fits,
    write_corpus,
)
from trainers.recipes import pretrain_mone as recipe
from trainers.recipes.comparison import Job
from trainers.recipes.pretrain_mone import ARMS, MoneArguments, arm_config, build_arm, main, require_measurable
from trainers.report import read_results


def on_meta(config) -> MoneForCausalLM | SigmaMoeForCausalLM:
    with torch.device("meta"):
        return (MoneForCausalLM if isinstance(config, MoneConfig) else SigmaMoeForCausalLM)(config)


def active(arm: str, config: SigmaMoeConfig, **options) -> int:
    return on_meta(arm_config(arm, config, MoneArguments(**options))).num_active_parameters()


# --- presets and arms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    # bf16 is asked of a GPU, which is not here
    name, comparison, args, data, training = arguments_of(recipe, MoneArguments, "--preset", preset, "--bf16", "false")
    assert name == preset and set(comparison.arms) <= set(ARMS) and comparison.arms[0] == "mone"
    config = SigmaMoeConfig.from_preset(args.model_preset, vocab_size=data.tokenizer_vocab_size)
    require_measurable(comparison.arms, config, args)
    assert training.warmup_steps < training.max_steps


def test_the_evidence_has_every_arm_three_seeds_and_one_grid():
    _, comparison, args, *_ = arguments_of(recipe, MoneArguments, "--preset", "evidence")
    assert set(comparison.arms) == set(ARMS) and len(comparison.seeds) >= 3
    assert args.pruned_shares == [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95]


def test_the_paper_preset_on_the_meta_device():
    _, comparison, args, data, _ = arguments_of(recipe, MoneArguments, "--preset", "paper", "--bf16", "false")
    host = SigmaMoeConfig.from_preset(args.model_preset, vocab_size=data.tokenizer_vocab_size)
    mone, moe = (on_meta(arm_config(arm, host, args)) for arm in ("mone", "moe"))
    assert comparison.arms == ["mone"]
    assert mone.num_parameters() == moe.num_parameters() and 19.5e9 < mone.num_parameters() < 20.5e9
    spared = 56 * 2 * (768 - 384) * 1536  # rows of up and columns of down of one expert a layer
    assert mone.num_active_parameters() == moe.num_active_parameters() - spared
    assert moe.num_active_parameters() == 536_924_160


@pytest.mark.parametrize("preset", ["evidence", "evidence-small", "demo"])
def test_arms_of_equal_cost_are(preset):
    config = SigmaMoeConfig.from_preset(preset)
    assert active("mone_2k_quarter", config) == active("moe", config)
    assert active("mone_unbalanced", config) == active("mone", config)
    assert active("mone_2k", config) > active("moe", config) > active("mone", config)
    # an expert is a multiple of 8 wide: at most 4 neurons off
    off = abs(active("moe_narrow", config) - active("mone", config))
    assert off <= config.num_hidden_layers * config.num_experts_per_tok * 3 * config.hidden_size * 4


def test_a_narrow_expert_is_as_large_as_the_share_that_is_used():
    config = SigmaMoeConfig(**TINY | {"moe_intermediate_size": 48})
    narrow = arm_config("moe_narrow", config, MoneArguments(neuron_ratio=0.5))
    assert narrow.moe_intermediate_size == 32 == (1 + 2 * 0.5) / 3 * 48
    assert active("moe_narrow", config, neuron_ratio=0.5) == active("mone", config, neuron_ratio=0.5)
    assert arm_config("moe_narrow", config, MoneArguments(neuron_ratio=0.25)).moe_intermediate_size == 24


def test_arms_differ_in_what_their_names_say():
    config = SigmaMoeConfig(**TINY)
    args = MoneArguments(neuron_ratio=0.4, neuron_aux_loss_coef=0.01)
    fields = {arm: arm_config(arm, config, args) for arm in ARMS}
    assert type(fields["moe"]) is type(fields["moe_narrow"]) is SigmaMoeConfig
    own = {arm: f for arm, f in fields.items() if isinstance(f, MoneConfig)}
    assert {arm: f.neuron_ratio for arm, f in own.items()} == {
        "mone": 0.4,
        "mone_unbalanced": 0.4,
        "mone_2k": 0.5,
        "mone_2k_quarter": 0.25,
    }
    assert {arm: f.num_experts_per_tok for arm, f in fields.items()} == dict.fromkeys(ARMS, 2) | {
        "mone_2k": 4,
        "mone_2k_quarter": 4,
    }
    assert [arm for arm, f in own.items() if f.neuron_aux_loss_coef == 0.0] == ["mone_unbalanced"]
    trunk = {"num_hidden_layers", "hidden_size", "num_experts", "vocab_size", "router_aux_loss_coef", "scoring_func"}
    for name in trunk:
        assert {getattr(f, name) for f in fields.values()} == {getattr(config, name)}


def test_a_model_is_a_function_of_its_seed():
    config = SigmaMoeConfig(**TINY)
    build = [build_arm(Job("mone", seed, 1e-3, 1), None, config=config, args=MoneArguments()) for seed in (0, 0, 1)]
    weights = [model.lm_head.weight for model, _ in build]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    moe, _ = build_arm(Job("moe", 0, 1e-3, 1), None, config=config, args=MoneArguments())
    assert torch.equal(moe.lm_head.weight, weights[0]), "arms of one shape start from the same weights"


# --- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_arms_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--arms dense: not known. Choose from mone, mone_unbalanced, moe"):
        main(["--arms", "mone", "dense"])
    with pytest.raises(ValueError, match="arm 'dense' is not known"):
        arm_config("dense", SigmaMoeConfig(**TINY), MoneArguments())
    assert list(tmp_path.iterdir()) == []


def test_what_would_fail_after_training_fails_before():
    config = SigmaMoeConfig(**TINY)
    with pytest.raises(ValueError, match=r"pruned_shares has \[1.0, -0.1\]"):
        require_measurable(["mone"], config, MoneArguments(pruned_shares=[0.5, 1.0, -0.1]))
    with pytest.raises(StrictDataclassError, match="num_experts_per_tok=10"):
        require_measurable(["mone_2k"], SigmaMoeConfig(**TINY | {"num_experts_per_tok": 5}), MoneArguments())


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_of_curves_by_hand():
    args = MoneArguments(pruned_shares=[0.0, 0.95])
    curves = {
        "mone": [[2.0, 2.5], [2.1, 2.6], [2.2, 2.7]],
        "moe": [[1.9, 4.0], [2.0, 4.1], [2.1, 4.2]],
    }
    metrics = recipe._metrics(curves, {"mone": [0.1, 0.2, 0.3], "mone_unbalanced": [0.4, 0.6, 0.8]}, args)
    assert list(metrics) == ["pruned_00_percent", "pruned_95_percent", "unused_neurons"]
    whole, sparse, unused = metrics.values()
    assert (whole.value, whole.baseline["moe"].value) == (pytest.approx(2.1), pytest.approx(2.0))
    assert whole.baseline["moe"].verdict == "fails" and sparse.baseline["moe"].verdict == "holds"
    assert "95%" in sparse.note and sparse.spread == pytest.approx(0.1)
    assert unused.value == pytest.approx(0.2) and unused.baseline["mone_unbalanced"].verdict == "holds"
    assert recipe._metrics({}, {}, args) == {}


def test_figures_of_curves(tmp_path):
    comparison = finished(tmp_path, {"mone": [2.0, 2.1], "moe": [1.9, 2.2]})
    args = MoneArguments(pruned_shares=[0.0, 0.5])
    files = recipe._figures(comparison, {"mone": [[2.0, 2.5], [2.1, 2.6]]}, args)
    assert [figure.path for figure in files] == ["figures/quality.png", "figures/pruned.png"]
    assert all((tmp_path / figure.path).read_bytes().startswith(b"\x89PNG") for figure in files)
    assert len(recipe._figures(comparison, {}, args)) == 1


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_seeds_of_every_arm_give_a_card_and_a_repetition_trains_nothing(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    add_tiny_preset(monkeypatch)
    write_corpus(tmp_path / "corpus")
    decay = {"num_decay_steps": 3}
    shares = [0.0, 0.5, 0.95]
    argv = command_line(
        max_steps=8, lr_scheduler_kwargs=decay, pruned_shares=shares, learning_rates=[4e-3], arms=list(ARMS)
    )
    main(["--preset", "evidence", *argv])
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("mone", "evidence", [0, 1, 2])
    quality = results.metrics["held_out_bits_per_character"]
    assert quality.n == 3 and list(quality.baseline) == list(ARMS[1:])
    assert all(b.n == 3 and b.verdict in ("holds", "null", "fails") for b in quality.baseline.values())
    for share in shares:
        curve = results.metrics[f"pruned_{round(100 * share):02d}_percent"]
        assert list(curve.baseline) == ["mone_unbalanced", "moe"]
    # half of the neurons, as trained: the curve and the training report the same loss
    assert results.metrics["pruned_50_percent"].values == pytest.approx(quality.values, rel=1e-6)
    whole = results.metrics["pruned_00_percent"].baseline["moe"].values
    assert whole == pytest.approx(quality.baseline["moe"].values, rel=1e-6)
    assert 0 <= results.metrics["unused_neurons"].value <= 1
    counts = results.evidence["active_parameters"]
    assert counts["mone"] == counts["moe_narrow"] < counts["moe"] == counts["mone_2k_quarter"] < counts["mone_2k"]

    model = AutoModelForCausalLM.from_pretrained("run")
    assert isinstance(model, MoneForCausalLM) and results.model.parameters_active == model.num_active_parameters()
    first = AutoModelForCausalLM.from_pretrained(Job("mone", 0, 4e-3, 8).folder(tmp_path / "run"))
    assert all(torch.equal(t, first.state_dict()[name]) for name, t in model.state_dict().items())
    assert len(AutoTokenizer.from_pretrained("run")) <= model.config.vocab_size

    text = build_card(tmp_path / "run")
    assert "(1 + 2 r) / 3" in text and "2407.19985" in text and "| moe\\_narrow |" in text
    assert str(tmp_path) not in text + json.dumps(results.evidence) + results.command

    written = times_of_fits(tmp_path / "run")
    assert len(written) == 3 * len(ARMS)
    main(["--preset", "evidence", *argv])
    again = read_results("run")
    assert times_of_fits(tmp_path / "run") == written and again.metrics == results.metrics
    assert again.wall_seconds > results.wall_seconds
