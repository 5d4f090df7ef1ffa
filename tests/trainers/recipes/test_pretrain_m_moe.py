"""M-MoE beside specialists: arms, the measures that decide its claims, and the recipe in small, anew and continued."""

import json
import math

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModelForCausalLM

from hf_models.moe import MMoeConfig, MMoeForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from model_cards.build import build_card
from model_cards.markdown import results_table
from tests.trainers.recipes.tiny_comparison import (
    TINY,
    add_tiny_preset,
    arguments_of,
    command_line,
    times_of_fits,
    write_corpus,
)
from trainers.data import train_tokenizer
from trainers.evaluation import ElasticCurve, ElasticPoint
from trainers.recipes import pretrain_m_moe as recipe
from trainers.recipes.comparison import Job
from trainers.recipes.pretrain_m_moe import (
    SAMPLED_ARMS,
    MMoeArguments,
    arm_config,
    build_arm,
    fixed_k,
    main,
    require_measurable,
)
from trainers.report import read_results


HOST = SigmaMoeConfig(**TINY)


# --- presets and arms ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    name, comparison, args, data, training = arguments_of(recipe, MMoeArguments, "--preset", preset, "--bf16", "false")
    assert name == preset and comparison.arms[0] == "layer"
    config = SigmaMoeConfig.from_preset(args.model_preset, vocab_size=data.tokenizer_vocab_size)
    require_measurable(comparison.arms, config, args)
    assert training.warmup_steps < training.max_steps


def test_the_evidence_has_the_draws_of_the_paper_and_a_specialist_at_each_of_its_numbers():
    _, comparison, args, *_ = arguments_of(recipe, MMoeArguments, "--preset", "evidence")
    assert comparison.arms[:4] == ["layer", "layer_raw", "micro_batch", "global_batch"]
    assert [fixed_k(arm) for arm in comparison.arms[4:]] == [1, 2, 4, 6]
    assert {1, 2, 4, 6} <= set(args.evaluate_at) and (args.k_min, args.k_max) == (1, 6)
    assert len(comparison.seeds) >= 3


def test_the_paper_preset_on_the_meta_device():
    _, comparison, args, data, _ = arguments_of(recipe, MMoeArguments, "--preset", "paper", "--bf16", "false")
    host = SigmaMoeConfig.from_preset(args.model_preset, vocab_size=data.tokenizer_vocab_size)
    config = arm_config(comparison.arms[0], host, args)
    with torch.device("meta"):
        model = MMoeForCausalLM(config)
    assert (config.num_hidden_layers, config.num_experts, config.k_range) == (56, 96, (1, 6))
    assert 19.5e9 < model.num_parameters() < 20.5e9
    at = {}
    for k in (1, 4, 6):
        model.set_active_experts(k)
        at[k] = model.num_active_parameters()
    expert = 3 * 768 * 1536
    assert at[1] == 536_924_160 and at[4] - at[1] == 56 * 3 * expert and at[6] - at[4] == 56 * 2 * expert


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("layer", None),
        ("micro_batch", None),
        ("global_batch", None),
        ("capacity", None),
        ("fixed_k1", 1),
        ("fixed_k12", 12),
    ],
)
def test_names_of_arms(arm, expected):
    assert fixed_k(arm) == expected


@pytest.mark.parametrize("arm", ["fixed_k", "fixed_k-1", "fixed", "k4", "a_fixed_k4", "fixed_k2x", ""])
def test_other_names_are_refused(arm):
    with pytest.raises(
        ValueError, match="is not known. Choose from layer, layer_raw, micro_batch, global_batch, capacity, fixed"
    ):
        fixed_k(arm)


def test_arms_draw_as_their_names_say():
    args = MMoeArguments(k_min=2, k_max=5, default_k=3)
    configs = {arm: arm_config(arm, HOST, args) for arm in SAMPLED_ARMS}
    assert all(isinstance(c, MMoeConfig) and c.k_range == (2, 5) for c in configs.values())
    assert [c.k_sampling for c in configs.values()] == ["layer", "layer", "micro_batch", "global_batch", "layer"]
    assert [c.k_distribution for c in configs.values()] == ["uniform"] * 4 + ["capacity"]
    assert [c.norm_top1_prob for c in configs.values()] == [True, False, True, True, True]
    assert {c.num_experts_per_tok for c in configs.values()} == {3}
    fixed = arm_config("fixed_k5", HOST, args)
    assert type(fixed) is SigmaMoeConfig and fixed.top_k_per_layer == [5, 5] and fixed.k_sampling == "none"


def test_a_specialist_on_the_shape_of_a_drawn_model_draws_nothing():
    drawn = MMoeConfig(**TINY | {"num_experts_per_tok_per_layer": [2, 1], "k_max": 4})
    fixed = arm_config("fixed_k3", drawn, MMoeArguments())
    assert (fixed.k_sampling, fixed.k_min, fixed.k_max) == ("none", None, None) and fixed.top_k_per_layer == [3, 3]
    again = arm_config("layer", drawn, MMoeArguments())
    assert again.k_range == (1, 6) and again.num_experts_per_tok_per_layer is None


def test_arms_of_one_seed_start_from_the_same_weights_and_draw_by_their_seed():
    build = {
        (arm, seed): build_arm(Job(arm, seed, 1e-3, 1), None, config=HOST, args=MMoeArguments())
        for arm, seed in (("layer", 0), ("layer", 1), ("fixed_k2", 0))
    }
    (model, callbacks), (other, _), (fixed, fixed_callbacks) = build.values()
    assert model.config.k_seed == 0 and other.config.k_seed == 1
    assert all(torch.equal(t, fixed.state_dict()[name]) for name, t in model.state_dict().items())
    assert not torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert [type(c).__name__ for c in callbacks] == ["MatryoshkaExpertsCallback", "ExpertBalanceCallback"]
    assert [type(c).__name__ for c in fixed_callbacks] == ["ExpertBalanceCallback"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_unknown_arms_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="--arms: arm 'fixed_kx' is not known"):
        main(["--arms", "layer", "fixed_kx"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arms", "fields", "error", "message"),
    [
        (["layer"], {"evaluate_at": [1, 9, 0]}, ValueError, r"evaluate_at has \[9, 0\].*num_experts=8"),
        (["layer"], {"k_max": 9}, StrictDataclassError, "k_max=9"),
        (["layer", "fixed_k9"], {}, StrictDataclassError, "num_experts_per_tok=9"),
        (["layer"], {"layer_budget": 1.3}, ValueError, "not a whole number"),
        (["layer"], {"layer_budget": 7.0}, ValueError, r"lies outside 1\.\.6"),
    ],
)
def test_what_would_fail_after_training_fails_before(arms, fields, error, message):
    with pytest.raises(error, match=message):
        require_measurable(arms, HOST, MMoeArguments(**fields))


def test_a_budget_that_is_not_searched_need_not_fit():
    with pytest.raises(ValueError, match="1.3"):
        require_measurable(["layer"], HOST, MMoeArguments(layer_budget=1.3))
    for arms, budget in ((["layer"], 0.0), (["fixed_k2", "layer"], 1.3)):
        assert require_measurable(arms, HOST, MMoeArguments(layer_budget=budget)) is None


# --- metrics ---------------------------------------------------------------------------------------------------------


def curve(*perplexities: float) -> ElasticCurve:
    """Perplexities at k = 1, 2, ..."""
    points = [
        ElasticPoint((k, k), float(k), math.log(p), p, 1.0, 1000 * k, k / len(perplexities))
        for k, p in enumerate(perplexities, start=1)
    ]
    return ElasticCurve(tuple(points), 100)


CURVES = {
    "layer": [curve(10.0, 8.0), curve(10.2, 8.2), curve(10.4, 8.4)],
    "fixed_k1": [curve(10.0, 30.0), curve(10.1, 31.0), curve(10.4, 32.0)],
    "fixed_k2": [curve(20.0, 7.0), curve(21.0, 7.1), curve(22.0, 7.2)],
}


def test_metrics_of_curves_by_hand():
    metrics = recipe._elastic_metrics(CURVES, MMoeArguments(evaluate_at=[1, 2]))
    assert list(metrics) == [
        "perplexity_at_1_experts",
        "over_specialist_at_1_experts",
        "perplexity_at_2_experts",
        "over_specialist_at_2_experts",
    ]
    one, over_one, two, over_two = metrics.values()
    assert one.value == pytest.approx(10.2) and one.baseline["fixed_k2"].value == pytest.approx(21.0)
    assert {arm: b.verdict for arm, b in one.baseline.items()} == {"fixed_k1": "null", "fixed_k2": "holds"}
    assert {arm: b.verdict for arm, b in two.baseline.items()} == {"fixed_k1": "holds", "fixed_k2": "fails"}
    assert over_one.values == pytest.approx([1.0, 10.2 / 10.1, 1.0])
    assert over_one.baseline["target"].value == recipe.TARGET == 1.03
    assert over_one.baseline["target"].verdict == "holds", "within the target, at the level of the spread"
    assert over_two.values == pytest.approx([8 / 7, 8.2 / 7.1, 8.4 / 7.2])
    assert over_two.baseline["target"].verdict == "fails"


def test_a_specialist_is_not_compared_with_specialists_and_an_absent_one_with_nobody():
    fixed_first = {arm: CURVES[arm] for arm in ("fixed_k2", "layer")}
    metrics = recipe._elastic_metrics(fixed_first, MMoeArguments(evaluate_at=[1, 2]))
    assert list(metrics) == ["perplexity_at_1_experts", "perplexity_at_2_experts"]
    metrics = recipe._elastic_metrics(
        {arm: CURVES[arm] for arm in ("layer", "fixed_k2")}, MMoeArguments(evaluate_at=[1])
    )
    assert list(metrics) == ["perplexity_at_1_experts"]


@pytest.mark.parametrize("arms", [("layer", "fixed_k1", "fixed_k2"), ("layer",), ("fixed_k1",), ("layer", "fixed_k7")])
def test_figures_of_curves(tmp_path, arms):
    curves = {arm: CURVES.get(arm, CURVES["fixed_k2"]) for arm in arms}
    (figure,) = recipe._figures(curves, tmp_path)
    assert (tmp_path / figure.path).read_bytes().startswith(b"\x89PNG")


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    add_tiny_preset(monkeypatch)
    write_corpus(tmp_path / "corpus")
    return tmp_path


SMALL = {
    "max_steps": 8,
    "lr_scheduler_kwargs": {"num_decay_steps": 3},
    "learning_rates": [4e-3],
    "evaluate_at": [1, 2, 8],
    "k_max": 4,
    "default_k": 2,
    "layer_budget": 1.5,
}


@pytest.mark.slow
def test_three_seeds_give_verdicts_a_budget_and_a_card_and_a_repetition_trains_nothing(workplace):
    arms = ["layer", "global_batch", "fixed_k1", "fixed_k2"]
    argv = ["--preset", "evidence", *command_line(**SMALL, arms=arms)]
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("m_moe", "evidence", [0, 1, 2])
    quality = results.metrics["held_out_bits_per_character"]
    assert quality.n == 3 and list(quality.baseline) == arms[1:]
    for k in (1, 2, 8):
        at_k = results.metrics[f"perplexity_at_{k}_experts"]
        assert at_k.n == 3 and all(b.verdict in ("holds", "null", "fails") for b in at_k.baseline.values())
    assert {name for name in results.metrics if name.startswith("over")} == {
        f"over_specialist_at_{k}_experts" for k in (1, 2)
    }
    budget = results.metrics["layer_budget_perplexity"]
    assert list(budget.baseline) == ["uniform", "front", "back"] and "found [[" in budget.note
    assert results.evidence["k_range"] == [1, 4] and results.model.base is None

    model = AutoModelForCausalLM.from_pretrained("run")
    assert isinstance(model, MMoeForCausalLM) and model.config.top_k_per_layer == [2, 2]
    assert (model.config.k_sampling, model.config.k_range) == ("layer", (1, 4))
    assert results.model.parameters_active == model.num_active_parameters()
    specialist = AutoModelForCausalLM.from_pretrained(Job("fixed_k1", 0, 4e-3, 8).folder(workplace / "run"))
    assert type(specialist) is SigmaMoeForCausalLM and specialist.config.top_k_per_layer == [1, 1]
    draws = json.loads((Job("layer", 0, 4e-3, 8).folder(workplace / "run") / "fit.json").read_text())["fit"]["history"]
    assert any("moe/mean_k" in row for row in draws)

    text = build_card(workplace / "run")
    assert "num_active_experts=1" in text and "**unchecked**" in text and "from scratch with the evidence" in text
    assert str(workplace) not in text + json.dumps(results.evidence) + results.command

    written = times_of_fits(workplace / "run")
    assert len(written) == 3 * len(arms)
    main(argv)
    assert times_of_fits(workplace / "run") == written and read_results("run").metrics == results.metrics


@pytest.mark.slow
def test_a_trained_model_is_continued_with_its_own_tokenizer(workplace):
    text = "".join(file.read_text() for file in (workplace / "corpus").iterdir())
    tokenizer = train_tokenizer([text], vocab_size=280, show_progress=False)
    tokenizer.save_pretrained("base")
    torch.manual_seed(3)
    fields = {"vocab_size": 320, "num_experts_per_tok": 1, "scoring_func": "sigmoid", "max_position_embeddings": 64}
    base = SigmaMoeForCausalLM(SigmaMoeConfig(**TINY | fields))
    base.bfloat16().save_pretrained("base")

    options = SMALL | {"evaluate_at": [1, 2], "layer_budget": 0, "max_steps": 2, "model_preset": None}
    options |= {"lr_scheduler_kwargs": {"num_decay_steps": 1}, "warmup_steps": 0, "learning_rates": [1e-9]}
    main(["--preset", "demo", *command_line(**options, init_from="base")])
    results = read_results("run")
    assert "layer_budget_perplexity" not in results.metrics
    assert results.evidence["continued_from"] == "base" and results.model.base is None
    assert all(b.verdict == "null" for b in results.metrics["perplexity_at_1_experts"].baseline.values())
    for arm in ("layer", "fixed_k4"):
        model = AutoModelForCausalLM.from_pretrained(Job(arm, 0, 1e-9, 2).folder(workplace / "run"))
        assert model.dtype == torch.float32 and model.config.scoring_func == "sigmoid"
        assert model.config.vocab_size == 320
        for name, tensor in base.state_dict().items():  # a step of 1e-9 moves nothing that bf16 would show
            torch.testing.assert_close(model.state_dict()[name].to(tensor), tensor, rtol=1e-2, atol=1e-6)
    card = build_card(workplace / "run")
    assert "Continued from a model in a local folder (base)" in card and "starts from scratch" not in card
    table = results_table(results)
    assert table in card  # beside that of the committed evidence, which has verdicts
    assert "null" not in table, "one seed has no verdict"
