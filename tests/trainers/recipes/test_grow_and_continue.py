"""Growth beside what it competes with: budgets, what each arm starts as, whose numbers the metrics are, the recipe."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.growth import grow_config
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
from trainers.data import train_tokenizer
from trainers.recipes import grow_and_continue as recipe
from trainers.recipes.comparison import Job
from trainers.recipes.grow_and_continue import (
    PLANS,
    GrowthArguments,
    build_arm,
    build_grown,
    flops_per_token,
    main,
    require_points_of_growth,
    steps_of,
)
from trainers.report import read_results


CONFIG = SigmaMoeConfig(**TINY | {"vocab_size": 300})


# --- presets and budgets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    name, comparison, args, _, training = arguments_of(recipe, GrowthArguments, "--preset", preset, "--bf16", "false")
    assert name == preset
    require_points_of_growth(args)
    if preset == "paper":
        assert comparison.arms == ["grown"] and args.source is None and training.warmup_steps < training.max_steps
    else:
        config = SigmaMoeConfig.from_preset(args.model_preset)
        assert all(steps_of(arm, config, args) > training.warmup_steps for arm in comparison.arms)
    assert training.lr_scheduler_type == "constant_with_warmup"


def test_the_evidence_has_every_arm_a_sweep_and_three_seeds():
    _, comparison, args, *_ = arguments_of(recipe, GrowthArguments, "--preset", "evidence")
    assert comparison.arms[0] == "interposition" and len(comparison.seeds) >= 3
    assert {"stack", "scratch_depth", "width", "scratch_width", "continued"} <= set(comparison.arms) <= set(PLANS)
    assert len(args.sweep) >= 2 and args.sunk_steps not in args.sweep
    groups = {*recipe.DEPTH_ARMS, *recipe.WIDTH_ARMS}
    assert groups == set(PLANS), "every arm is compared in one of the groups"


def test_the_family_s_20b_shape_grows_on_the_meta_device():
    config = SigmaMoeConfig.from_preset("sigma-moe-tiny")
    sizes = {}
    for name, plan in (("base", None), ("depth", PLANS["interposition"]), ("width", PLANS["width"])):
        with torch.device("meta"):
            model = SigmaMoeForCausalLM(config if plan is None else grow_config(config, plan))
        sizes[name] = (model.config.num_hidden_layers, model.config.num_experts, model.num_parameters())
    outer = 2 * 200064 * 1536 + 1536
    assert sizes["base"][:2] == (56, 96) and sizes["depth"][:2] == (112, 96) and sizes["width"][:2] == (56, 192)
    assert sizes["depth"][2] - outer == 2 * (sizes["base"][2] - outer)
    experts = 56 * 96 * 3 * 768 * 1536
    # rows of the routers, and the biases of a loss-free balance, which are no parameters
    assert sizes["width"][2] - sizes["base"][2] == experts + 56 * 96 * 1536


def test_flops_are_6_for_each_parameter_that_a_token_passes_through():
    attention = 16 * 8 * (2 + 1 + 1 + 2) + 2 * 8  # q, k, v, o and the two norms of heads
    layer = attention + 2 * 16 + 8 * 16 + 2 * 3 * 16 * 24  # norms, router, two experts
    assert flops_per_token(CONFIG) == 6 * (2 * layer + 16 + 300 * 16)


@pytest.mark.parametrize("config", [CONFIG, SigmaMoeConfig.from_preset("evidence-small")])
def test_every_arm_spends_the_same_flops_within_a_step(config):
    args = GrowthArguments(sunk_steps=1000, extra_share=0.5)
    budget = 500 * flops_per_token(config)
    steps = {arm: steps_of(arm, config, args) for arm in PLANS}
    assert steps["continued"] == 500 and steps["interposition"] == steps["stack"] == steps["scratch_depth"] < 500
    assert steps["width"] == steps["width_exact"] == steps["scratch_width"] < 500
    for arm, plan in PLANS.items():
        flops = flops_per_token(config if plan is None else grow_config(config, plan))
        assert abs(steps[arm] * flops - budget) <= flops / 2


def test_a_sweep_fixes_the_extra_or_the_total():
    args = GrowthArguments(sunk_steps=1000, extra_share=0.5, sweep=[200, 600])
    base, grown = flops_per_token(CONFIG), flops_per_token(grow_config(CONFIG, PLANS["interposition"]))
    latest = steps_of("interposition", CONFIG, args)
    for at in args.sweep:
        assert steps_of(f"interposition@{at}", CONFIG, args) == latest
        total = at * base + steps_of(f"interposition_total@{at}", CONFIG, args) * grown
        assert abs(total - 1500 * base) <= grown / 2
    assert steps_of("continued", CONFIG, GrowthArguments(sunk_steps=1, extra_share=0.01)) == 1, "at least one"


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--arms", "interposition", "lego"], "--arms lego: not known here. Choose from interposition, stack"),
        (["--source", "x", "--arms", "width"], "--arms width: not known here. Choose from grown"),
        (["--preset", "paper", "--bf16", "false"], "--arms grown needs the model that is to be grown: --source"),
        (["--sweep", "350", "--arms", "stack"], "--sweep needs the arm interposition"),
        (["--sweep", "300", "--sunk_steps", "700"], "must be multiples of the smallest"),
        (["--sweep", "200", "300", "--sunk_steps", "1000"], "must be multiples of the smallest"),
        (["--sweep", "1400", "--sunk_steps", "700"], "must lie between 0 and sunk_steps=700"),
        (["--sweep", "0", "--sunk_steps", "700"], "must lie between 0 and"),
        (["--sunk_steps", "0"], "must lie between 0 and"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_read(argv, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        main(argv)
    assert list(tmp_path.iterdir()) == []


# --- what each arm starts as -----------------------------------------------------------------------------------------


TOKENS = torch.arange(24).reshape(2, 12)
SUNK = GrowthArguments(sunk_steps=8, sweep=[4])


@pytest.fixture
def base(tmp_path):
    """The base of seed 0 after 4 and after 8 steps."""
    models = {}
    for step in (4, 8):
        torch.manual_seed(step)
        models[step] = SigmaMoeForCausalLM(CONFIG).eval()
        models[step].save_pretrained(Job("base", 0, 2e-3, 0).folder(tmp_path) / f"checkpoint-{step}")
    return models


def started(root, arm, seed=0, **options):
    args = dataclasses.replace(SUNK, **options)
    job = Job(arm, seed, 1e-3, 1)
    return build_arm(job, None, config=CONFIG, root=root, base_rate=2e-3, args=args)[0].eval()


@torch.no_grad()
def drift(model, other) -> float:
    return (model(TOKENS).logits - other(TOKENS).logits).abs().max().item()


def test_arms_start_as_the_table_says(base, tmp_path):
    models = {arm: started(tmp_path, arm) for arm in PLANS}
    assert {arm: (m.config.num_hidden_layers, m.config.num_experts) for arm, m in models.items()} == {
        **dict.fromkeys(("interposition", "stack", "zero_output", "scratch_depth"), (4, 8)),
        **dict.fromkeys(("width", "width_exact", "scratch_width"), (2, 16)),
        "continued": (2, 8),
    }
    assert models["width"].config.num_experts_per_tok == 4
    changed = {arm: drift(model, base[8]) for arm, model in models.items()}
    assert changed["continued"] == 0.0 and max(changed["zero_output"], changed["width_exact"]) < 1e-5
    assert 1e-5 < changed["width"] < min(changed["interposition"], changed["stack"])
    query = base[8].model.layers[0].self_attn.q_proj.weight
    layers = [[torch.equal(m.self_attn.q_proj.weight, query) for m in models[arm].model.layers] for arm in PLANS]
    assert layers[0] == [True, True, False, False] and layers[1] == [True, False, True, False]
    scratch = models["scratch_depth"], models["scratch_width"]
    assert all(drift(model, base[8]) > 0.01 and not any(row) for model, row in zip(scratch, (layers[3], layers[6])))


def test_the_sweep_grows_from_where_it_says(base, tmp_path):
    for arm in ("interposition@4", "interposition_total@4"):
        grown = started(tmp_path, arm)
        embeddings = grown.get_input_embeddings().weight
        assert torch.equal(embeddings, base[4].get_input_embeddings().weight) and grown.config.num_hidden_layers == 4


def test_noise_and_initialisation_are_functions_of_the_seed_and_noise_can_be_chosen(base, tmp_path):
    again = [drift(started(tmp_path, arm), started(tmp_path, arm)) for arm in ("width", "scratch_width")]
    assert again == [0.0, 0.0]
    assert drift(started(tmp_path, "scratch_width"), started(tmp_path, "scratch_width", seed=1)) > 0
    loud, quiet = (drift(started(tmp_path, "width", noise_alpha=alpha), base[8]) for alpha in (0.3, 0.0))
    assert quiet < 1e-5 < drift(started(tmp_path, "width"), base[8]) < loud
    assert drift(started(tmp_path, "width_exact", noise_alpha=0.3), base[8]) < 1e-5


def test_a_given_source_is_grown_in_fp32(tmp_path):
    torch.manual_seed(0)
    host = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{k: v for k, v in TINY.items() if k != "scoring_func"})).bfloat16()
    host.save_pretrained(tmp_path / "host")
    args = GrowthArguments(source=str(tmp_path / "host"), depth_factor=1, width_factor=2, noise_alpha=0.0)
    grown, callbacks = build_grown(Job("grown", 0, 1e-3, 1), None, args=args)
    assert grown.dtype == torch.float32 and grown.config.num_experts == 16 and callbacks == []
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "host", dtype=torch.float32)
    assert drift(grown.eval(), same.eval()) < 1e-5


# --- metrics ---------------------------------------------------------------------------------------------------------


BITS = {
    "interposition": [2.0, 2.1, 2.2],
    "stack": [2.3, 2.4, 2.5],
    "continued": [1.8, 1.9, 2.0],
    "width": [2.2, 2.3, 2.4],
    "scratch_width": [3.0, 3.1, 3.2],
}


def test_depth_and_width_are_compared_with_their_own(tmp_path):
    comparison = finished(tmp_path, BITS)
    metrics = recipe._quality(comparison)
    assert list(metrics) == ["held_out_bits_per_character", "held_out_bits_depth", "held_out_bits_width"]
    headline, depth, width = metrics.values()
    assert headline.values == depth.values == BITS["interposition"] and headline.baseline == {}
    assert {arm: b.verdict for arm, b in depth.baseline.items()} == {"stack": "holds", "continued": "fails"}
    assert width.values == BITS["width"]
    assert {arm: b.verdict for arm, b in width.baseline.items()} == {"scratch_width": "holds", "continued": "fails"}
    assert "12k parameters, 10 steps at 0.001" in depth.note
    assert recipe._measured_on(comparison, {}) == {"held_out_bits_width": "width"}


def test_one_arm_alone_is_compared_with_nothing(tmp_path):
    comparison = finished(tmp_path, {"grown": [2.0]})
    assert list(recipe._quality(comparison)) == ["held_out_bits_per_character"]
    assert recipe._measured_on(comparison, {}) == {}


def test_the_sweep_is_compared_with_the_latest_growth(tmp_path, base):
    args = GrowthArguments(sunk_steps=8, sweep=[4])
    comparison = finished(tmp_path, {"interposition": [2.0, 2.1, 2.2]})
    sweep = finished(tmp_path, {"interposition@4": [2.1, 2.2, 2.3], "interposition_total@4": [1.9, 2.0, 2.1]})
    trained = finished(tmp_path, {"base": [2.5]})
    trained.jobs["base"] = [Job("base", 0, 2e-3, 0)]
    base[8].save_pretrained(trained.folders("base")[0])
    metrics = recipe._metrics(trained, comparison, sweep, args)
    extra, total = metrics["grown_at_4_fixed_extra"], metrics["grown_at_4_fixed_total"]
    assert extra.values == [2.1, 2.2, 2.3] and extra.baseline["grown_at_8"].values == [2.0, 2.1, 2.2]
    assert (extra.baseline["grown_at_8"].verdict, total.baseline["grown_at_8"].verdict) == ("fails", "holds")
    assert "grown at step 4 of the base, total FLOPs fixed" in total.note
    assert metrics["base_bits_per_character"].value == 2.5 and metrics["norm_seam_of_stacking"].value > 0
    assert recipe._measured_on(comparison, metrics) == {
        "base_bits_per_character": "base",
        "norm_seam_of_stacking": "base",
        "grown_at_4_fixed_extra": "grown_at_4",
        "grown_at_4_fixed_total": "grown_at_4",
    }


def test_the_rules_of_thumb_are_held_against_the_run(tmp_path, base):
    trained = finished(tmp_path, {"base": [2.5]}, steps=10)
    args = GrowthArguments(sunk_steps=10, extra_share=2.0)

    class Arms:
        arms = ["interposition", "continued"]

    plan = recipe._plan(CONFIG, trained, Arms, args)
    active = base[8].num_active_parameters()
    assert plan["sunk_over_chinchilla_flops"] == round(1000 / (20 * active), 3)
    assert plan["steps_after_growth"] == {arm: steps_of(arm, CONFIG, args) for arm in Arms.arms}
    assert plan["advice"][0].startswith("kept: spend at least about as much") and plan["sunk_tokens"] == 1000
    assert plan["advice"][1].startswith("not kept: interposition shows its advantage beyond 1 F_c")
    json.dumps(plan)


# --- the recipe ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    add_tiny_preset(monkeypatch)
    write_corpus(tmp_path / "corpus")
    return tmp_path


@pytest.mark.slow
def test_three_seeds_of_every_arm_a_sweep_and_a_card_and_a_repetition_trains_nothing(workplace):
    argv = ["--preset", "evidence", *command_line(sunk_steps=8, sweep=[4], learning_rates=[4e-3], arms=list(PLANS))]
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("growth", "evidence", [0, 1, 2])
    depth, width = (results.metrics[f"held_out_bits_{name}"] for name in ("depth", "width"))
    assert list(depth.baseline) == ["stack", "zero_output", "scratch_depth", "continued"]
    assert list(width.baseline) == ["width_exact", "scratch_width", "continued"]
    assert all(b.n == 3 and b.verdict for metric in (depth, width) for b in metric.baseline.values())
    assert results.metrics["grown_at_4_fixed_total"].baseline["grown_at_8"].values == depth.values
    steps = results.evidence["steps_after_growth"]
    assert list(steps) == list(PLANS) and results.evidence["steps"] == steps["interposition"] > 0
    assert results.evidence["measured_on"]["held_out_bits_width"] == "width"
    assert results.evidence["sunk_tokens"] == 8 * 2 * 32 and len(results.evidence["advice"]) == 5
    assert [figure.path for figure in results.figures] == [f"figures/{n}.png" for n in ("quality", "sweep", "norms")]

    model = AutoModelForCausalLM.from_pretrained("run")
    assert type(model) is SigmaMoeForCausalLM and model.config.num_hidden_layers == 4
    assert results.model.parameters_active == model.num_active_parameters()

    text = build_card(workplace / "run")
    assert "Grown from a model that the same run trained from scratch" in text
    assert "| Held out bits width ↓ | **width** |" in text and "| Base bits per character ↓ | **base** |" in text
    index = text.split("\n---\n")[0]
    assert "held_out_bits_depth" in index and "held_out_bits_width" not in index and "base_bits" not in index
    assert "measured" not in text.split("Fixed before any result")[1].split("```")[0].lower()
    assert str(workplace) not in text + json.dumps(results.evidence) + results.command

    written = times_of_fits(workplace / "run")
    assert len(written) == 3 * (1 + len(PLANS) + 2)
    main(argv)
    assert times_of_fits(workplace / "run") == written and read_results("run").metrics == results.metrics


@pytest.mark.slow
def test_a_model_that_is_there_is_grown_and_trained_on_with_its_own_tokenizer(workplace):
    text = "".join(file.read_text() for file in (workplace / "corpus").iterdir())
    tokenizer = train_tokenizer([text], vocab_size=280, show_progress=False)
    tokenizer.save_pretrained("host")
    torch.manual_seed(0)
    fields = {k: v for k, v in TINY.items() if k != "scoring_func"} | {"vocab_size": 320}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**fields)).save_pretrained("host")
    options = {"model_preset": None, "max_steps": 3, "learning_rates": [1e-3], "arms": ["grown"], "source": "host"}
    main(["--preset", "demo", *command_line(**options, depth_factor=2, width_factor=2)])
    results = read_results("run")
    grown = AutoModelForCausalLM.from_pretrained("run")
    assert type(grown) is Qwen3MoeForCausalLM and grown.config.vocab_size == 320
    assert (grown.config.num_hidden_layers, grown.config.num_experts, grown.config.num_experts_per_tok) == (4, 16, 4)
    assert list(results.metrics) == ["held_out_bits_per_character"] and results.evidence["steps"] == 3
    assert results.evidence["source"] == "host" and results.evidence["width_factor"] == 2
    assert results.model.parameters_total == grown.num_parameters() > results.model.parameters_active
    assert len(json.loads((workplace / "run" / "tokenizer.json").read_text())["model"]["vocab"]) == len(tokenizer)
    card = build_card(workplace / "run")
    assert "Grown from a model in a local folder" in card and "trained from scratch" not in card
