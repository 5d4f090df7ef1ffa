"""Anonymous personalisation as a recipe: presets, arms, the trade-off in small, and what a killed run goes on from."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hf_models.personal_lm import PersonalLmConfig, PersonalLmForSequenceClassification, UserDistribution
from trainers.device_cloud.user_embeddings import AnonymousUserCollator, text_key
from trainers.evaluation.privacy_figure import plot_tradeoff
from trainers.recipes import anonymous_arms
from trainers.recipes import personalize_anonymously as recipe
from trainers.recipes.anonymous_data import review_data, table_data, unit_tokenizer
from trainers.recipes.anonymous_measures import accuracies, worst_decile
from trainers.recipes.anonymous_results import against_on_device, entropy_record, study_metrics, study_record
from trainers.recipes.anonymous_study import (
    ArmFit,
    DesignArguments,
    OtherSettingsError,
    Study,
    arm_settings,
    keep,
    parse_arm,
    read_kept,
    stage1_settings,
)
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.personalize_anonymously import AnonymousArguments, base_config, main
from trainers.report import read_results


ROOT = Path(__file__).parents[3]
ARMS = ["mixture_k2", "central", "static", "on_device", "gaussian_r2", "gaussian_r2_reader", "beta_4"]
ARMS += ["mixture_k2_random"]
TINY = [
    *("--users", "6", "--stage1_steps", "4", "--max_steps", "4", "--device_steps", "4", "--alone_steps", "2"),
    *("--alone_learning_rates", "1e-4", "--output_dir", "run"),
]


def arguments_of(*argv):
    types = (AnonymousArguments, DesignArguments, RecipeTrainingArguments)
    return parse_arguments(types, recipe.PRESETS, list(argv), default_preset="demo")


# --- presets and arms


@pytest.mark.parametrize("preset", recipe.PRESETS)
def test_presets_are_options_of_the_recipe(preset):
    # bf16 is asked of a GPU, which is not here
    name, (args, designs, training_args) = arguments_of("--preset", preset, "--bf16", "false")
    assert name == preset and args.shape in recipe.SHAPES and training_args.max_grad_norm == 5.0
    assert [parse_arm(arm) for arm in (*args.arms, *args.speech_arms)]
    assert designs.std == 0.2 and training_args.weight_decay == 0.05


def test_the_evidence_has_every_design_three_seeds_one_grid_and_like_beside_like():
    _, (args, designs, _) = arguments_of("--preset", "evidence")
    assert len(args.seeds) >= 3 and len(args.learning_rates) >= 2 and args.arms[0] == "mixture_k5"
    assert {"central", "static", "on_device", "gaussian_r1", "gaussian_r2", "gaussian_free", "beta_80"} < set(
        args.arms
    )
    assert {"mixture_k5", "mixture_k16", "mixture_k5_random"} < set(args.arms)
    for volunteers in (True, False):  # the mixture, Gaussian and Beta of either reader
        kinds = {
            parse_arm(arm).kind.removesuffix("_random") for arm in args.arms if parse_arm(arm).volunteers == volunteers
        }
        assert {"mixture", "gaussian", "beta"} <= kinds
    assert len(designs.alone_learning_rates) >= len(args.learning_rates)


def test_the_paper_preset_has_gpt_2_s_shapes_and_the_authors_numbers():
    _, (args, designs, training_args) = arguments_of("--preset", "paper", "--bf16", "false")
    assert min(training_args.max_steps, args.stage1_steps) > training_args.warmup_steps == 1000
    assert (designs.initial_mean, designs.device_warmup_steps, designs.alone_learning_rates) == (0.1, 100, [5e-5])
    assert "on_device" in args.arms and designs.device_steps > designs.device_warmup_steps
    with torch.device("meta"):
        model = PersonalLmForSequenceClassification(
            PersonalLmConfig(base_config=base_config(args.shape, None), num_labels=2)
        )
    layer = 7_087_872
    assert model.num_parameters() == 50_257 * 768 + 1024 * 768 + 12 * layer + 2 * 768 + 2 * 768
    assert (model.config.num_user_tokens, model.config.user_token_position) == (1, "suffix")
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 1000


@pytest.mark.parametrize(
    ("arm", "expected"),
    [
        ("central", ("central", None, False)),
        ("gaussian_free", ("gaussian", None, False)),
        ("gaussian_free_reader", ("gaussian", None, True)),
        ("gaussian_r0.5", ("gaussian", 0.5, False)),
        ("gaussian_r2_reader", ("gaussian", 2, True)),
        ("beta_20", ("beta", 20, False)),
        ("beta_20_reader", ("beta", 20, True)),
        ("mixture_k16", ("mixture", 16, True)),
        ("mixture_k5_random", ("mixture_random", 5, False)),
    ],
)
def test_arms_are_what_their_names_say(arm, expected):
    assert parse_arm(arm) == expected


@pytest.mark.parametrize("arm", ["gaussian", "gaussian_r0", "beta_", "mixture_k0", "mixture_k5_reader", "laplace"])
def test_unknown_arms_are_named_before_anything_is_read(arm, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=f"arm '{arm}' is not known"):
        main(["--arms", arm])
    assert list(tmp_path.iterdir()) == []


def test_unknown_shapes_are_named():
    with pytest.raises(ValueError, match="shape 'huge' is not known. Choose from gpt2"):
        base_config("huge", None)


# --- data


def test_reviews_as_rows_and_a_table_of_one_s_own(tmp_path):
    data = review_data(5, 0)
    assert (data.num_users, data.num_labels, len(data.train), len(data.test)) == (5, 3, 300, 300)
    assert set(data.train[0]) == {"input_ids", "labels", "user"} and not data.is_language_model
    rows = [{"text": "a b c", "label": "up" if i % 2 else "down", "user": f"u{i % 2}", "time": i} for i in range(20)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    unit_tokenizer(["a b c"], words=True).save_pretrained(tmp_path / "tokenizer")
    options = {"license": "CC0-1.0", "language": "en", "max_length": 8}
    mine = table_data(str(tmp_path / "mine.jsonl"), str(tmp_path / "tokenizer"), **options)
    assert (mine.num_users, mine.num_labels, len(mine.train), len(mine.test)) == (2, 2, 12, 4)
    assert mine.description.name == "mine.jsonl" and mine.collator()([{"input_ids": [2, 3], "labels": 1}])
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="no column label, user"):
        table_data(str(tmp_path / "other.jsonl"), str(tmp_path / "tokenizer"), **options)


def test_character_tokens_are_characters():
    tokenizer = unit_tokenizer(["To be,\nor not"], words=False)
    ids = tokenizer("be, or\nno")["input_ids"]
    assert len(ids) == 9 and tokenizer.unk_token_id not in ids
    assert tokenizer("z")["input_ids"] == [tokenizer.unk_token_id]


# --- results


def fit_of(arm: str, seed: int, accuracy: float, attribution: float, **privacy) -> ArmFit:
    given = {"attribution": attribution, "chance": 0.1, "users": 10} | privacy
    own = {"validation": accuracy, "accuracy_worst_decile": accuracy, "accuracy_volunteers": accuracy + 0.1}
    own |= {"accuracy_others": accuracy - 0.1, "seconds": 1.0, "membership_auc": 0.5, "bytes_per_text": 100.0}
    return ArmFit(arm, seed, 1e-3, accuracy, **own, privacy=given, hits=[1.0, 0.0])


def test_metrics_by_hand_have_the_privacy_beside_them():
    drawn = {"linkage_auc": 0.7, "attribution_linked": {"4": 0.5}}
    fits = {
        "gaussian_r2": [
            fit_of("gaussian_r2", s, 0.6 + s / 100, 0.3, epsilon=8.0, delta=1e-5, **drawn) for s in range(3)
        ],
        "central": [fit_of("central", s, 0.5 + s / 100, 0.1) for s in range(3)],
        "static": [fit_of("static", s, 0.7 + s / 100, 1.0) for s in range(3)],
        "on_device": [fit_of("on_device", s, 0.4 + s / 100, 0.1) for s in range(3)],
    }
    metrics = study_metrics(fits, "x_")
    accuracy = metrics["x_accuracy"]
    assert accuracy.value == pytest.approx(0.61) and "attribution 0.300 (guessing 0.100)" in accuracy.note
    assert "epsilon 8.0 at delta 1e-05" in accuracy.note
    assert [accuracy.baseline[arm].verdict for arm in ("central", "static")] == ["holds", "fails"]
    assert (
        "identifier" in accuracy.baseline["static"].note and "uploads nothing" in accuracy.baseline["on_device"].note
    )
    assert metrics["x_attribution"].baseline["static"].verdict == "holds"
    assert metrics["x_attribution_of_4_linked_uploads"].value == 0.5 and not metrics["x_linkage_auc"].baseline
    assert study_record(fits)["static"]["privacy"]["attribution"] == 1.0
    assert entropy_record(fits, 3) == []
    fits["gaussian_r2"][0].user_predictions = [[0, 0], [0, 1]]
    bins = entropy_record(fits, 3)
    assert [b["texts"] for b in bins] == [1, 0, 0, 1, 0, 0] and bins[0]["accuracy"]["central"] == 1.0


def test_volunteers_and_the_others_are_told_apart():
    drawn = {"linkage_auc": 0.7, "attribution_linked": {"4": 0.5}, "attribution_volunteers": 1.0}
    drawn |= {"attribution_all_users": 0.65}
    fits = {
        "mixture_k5": [fit_of("mixture_k5", seed, 0.6, 0.3, **drawn) for seed in range(3)],
        "central": [fit_of("central", seed, 0.5 + seed / 100, 0.1) for seed in range(3)],
    }
    metrics = study_metrics(fits)
    assert metrics["attribution"].value == 0.3 and metrics["attribution_volunteers"].value == 1.0
    assert metrics["attribution_all_users"].value == 0.65 and not metrics["attribution_all_users"].baseline
    assert metrics["accuracy_of_who_may_volunteer"].value == pytest.approx(0.7)
    assert metrics["accuracy_of_who_never_volunteers"].baseline["central"].value == pytest.approx(0.41)
    assert (
        "attribution 0.300 (guessing 0.100) of who did not volunteer, 1 of the volunteers" in metrics["accuracy"].note
    )


def test_every_anonymous_arm_is_held_against_the_device():
    fits = {
        "mixture_k5": [fit_of("mixture_k5", seed, 0.6 + seed / 100, 0.3) for seed in range(3)],
        "on_device": [fit_of("on_device", seed, 0.8 + seed / 100, 0.1) for seed in range(3)],
        "beta_20": [fit_of("beta_20", seed, 0.9 + seed / 90, 0.4) for seed in range(3)],
        "central": [fit_of("central", seed, 0.5, 0.1) for seed in range(3)],
    }
    found = against_on_device(fits)
    assert found["mixture_k5"] == {"difference": -0.2, "verdict": "fails", "attribution": 0.3}
    assert set(found) == {"mixture_k5", "beta_20"} and found["beta_20"]["verdict"] == "holds"
    assert against_on_device({arm: fits[arm] for arm in ("mixture_k5", "central")}) == {}


def study_of(folder: Path, *argv: str, users: int = 12, steps: int = 6) -> Study:
    _, (args, designs, training_args) = arguments_of("--output_dir", str(folder), *argv)
    data = review_data(users, 0)
    base = base_config("tiny", data)
    return Study("main", folder, data, base, designs, training_args, 3, args.stage1_learning_rate, steps)


def test_accuracies_of_volunteers_and_of_the_others_by_hand(tmp_path):
    study = study_of(tmp_path, users=4)
    hits = [1.0 if row["user"] < 2 else 0.25 for row in study.data.test]
    found = accuracies(study, hits, [1] * len(hits))
    assert study.volunteers == 2 and found["accuracy"] == pytest.approx(0.625)
    assert (found["accuracy_volunteers"], found["accuracy_others"]) == (1.0, 0.25)


# --- what is uploaded


@pytest.mark.parametrize("arm", ["mixture_k2_random", "gaussian_r1"])
def test_a_run_of_several_epochs_keeps_its_bound_against_all_uploads_of_a_text(arm, tmp_path, monkeypatch):
    """The attacker puts everything together that was uploaded with one text, in whatever turn and epoch."""
    uploads, training = {}, []
    real_call, real_train = AnonymousUserCollator.__call__, anonymous_arms._train

    def call(self, rows):
        batch = real_call(self, rows)
        if training:
            for row, embeds in zip(rows, batch["user_embeds"]):
                own = uploads.setdefault((row["user"], text_key(row)), {})
                own[embeds.numpy().tobytes()] = (embeds, self.distribution)
        return batch

    def train(*args, **kwargs):
        training.append(True)
        real_train(*args, **kwargs)
        training.clear()

    monkeypatch.setattr(AnonymousUserCollator, "__call__", call)
    monkeypatch.setattr(anonymous_arms, "_train", train)
    fit = anonymous_arms.run_arm(study_of(tmp_path, "--device_steps", "20", steps=36), arm, 0, 1e-3)
    named, texts = 0.0, len(uploads)
    for (user, _), own in uploads.items():
        scores = sum(table.log_prob(embeds[None])[0] for embeds, table in own.values())
        ties = scores >= scores.max() - 1e-9 * scores.max().abs().clamp_min(1.0)
        named += float(ties[user]) / float(ties.sum())
    assert texts == 12 * 60 and sum(map(len, uploads.values())) == texts
    noise = 3 * (0.25 / texts) ** 0.5
    assert named / texts < fit.privacy["attribution"] + noise and named / texts < fit.privacy["bound"] + noise
    assert fit.privacy["bound"] <= 2 / 12 or arm == "gaussian_r1"


def test_volunteers_are_counted_as_identified_and_the_others_hide_among_themselves(tmp_path):
    study = study_of(tmp_path)
    fit = anonymous_arms.run_arm(study, "mixture_k2", 0, 1e-3)
    assert study.volunteers == 6 and fit.privacy["users"] == 6 and fit.privacy["chance"] == 1 / 6
    assert fit.privacy["attribution_volunteers"] == 1.0 and fit.privacy["bound"] <= 2 / 6
    assert fit.privacy["attribution_all_users"] == pytest.approx((6 + 6 * fit.privacy["attribution"]) / 12)
    assert "attribution_volunteers" not in anonymous_arms.run_arm(study, "mixture_k2_random", 0, 1e-3).privacy
    files = sorted(path.name for path in (tmp_path / "runs/main/volunteers/lr0.001-seed0").iterdir() if path.is_file())
    assert "volunteers.safetensors" in files and not [name for name in files if "tmp" in name]


# --- records


def test_a_record_of_other_settings_is_refused_by_name(tmp_path):
    study = study_of(tmp_path)
    settings = arm_settings(study, "central", 0, 1e-3)
    path = tmp_path / "fit.json"
    assert read_kept(path, settings) is None
    assert keep(path, settings, {"a": (1,)}) == {"a": [1]} == read_kept(path, settings)
    others = {
        "designs.std: 0.2 there, 5.0 now": study._replace(designs=DesignArguments(std=5.0)),
        "max_steps: 6 there, 7 now": study._replace(steps=7),
        "stage1_steps: 3 there, 4 now": study._replace(stage1_steps=4),
        "data: ": study._replace(data=review_data(12, 1)),
        "base_model.n_embd: 32 there, 64 now": study._replace(base=study.base | {"n_embd": 64}),
        "training.per_device_train_batch_size: 64 there, 8 now": study_of(
            tmp_path, "--per_device_train_batch_size", "8"
        ),
    }
    for message, other in others.items():
        with pytest.raises(OtherSettingsError, match=message):
            read_kept(path, arm_settings(other, "central", 0, 1e-3))
    moved = study_of(tmp_path / "elsewhere", "--logging_steps", "7")
    assert arm_settings(moved, "central", 0, 1e-3) == settings, "where it is kept and what is printed do not matter"
    assert stage1_settings(study._replace(steps=7), 0) == stage1_settings(study, 0)
    path.write_text(json.dumps({"arm": "central"}))
    with pytest.raises(OtherSettingsError, match="no settings"):
        read_kept(path, settings)


def test_a_repeated_command_with_other_settings_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["--arms", "gaussian_r2", "central", *TINY])
    before = Path("run/results.json").read_bytes()
    assert UserDistribution.from_design("run/user_design.json").config.max_radius == pytest.approx(0.4)
    for other, named in ((["--std", "5.0"], "designs.std"), (["--users", "9"], "data"), (["--seeds", "1"], None)):
        if named is None:
            main(["--arms", "gaussian_r2", "central", *TINY, *other])  # another run, beside the first
            continue
        with pytest.raises(SystemExit, match=f"made with other settings.*{named}"):
            main(["--arms", "gaussian_r2", "central", *TINY, *other])
        assert Path("run/results.json").read_bytes() == before
    for arm in ("mixture_k2", "on_device"):  # which were not run yet: stage 1 was
        with pytest.raises(SystemExit, match="stage1_steps: 4 there, 5 now"):
            main(["--arms", arm, *TINY, "--stage1_steps", "5"])
    main(["--arms", "central", *TINY])
    assert not Path("run/user_design.json").exists(), "nobody draws for the model of `central`"


def test_the_worst_tenth_of_users():
    rows = [{"user": user} for user in (0, 0, 1, 1, 2, 2)]
    assert worst_decile([1, 1, 0.5, 0.5, 1, 0], [1] * 6, rows, 3) == 0.5


def test_the_figure_is_a_png_and_needs_an_arm(tmp_path):
    path = plot_tradeoff(
        {"central": [(0.1, 0.5)], "beta_20": [(0.3, 0.6), (0.4, 0.5)]}, tmp_path / "f.png", chance=0.1
    )
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="empty"):
        plot_tradeoff({}, path, chance=0.1)


# --- the recipe


@pytest.mark.slow
def test_every_arm_runs_and_a_repetition_trains_nothing(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    argv = ["--arms", *ARMS, "--seeds", "0", "1", "--learning_rates", "1e-3", "2e-3", *TINY]
    main(argv)
    results = read_results("run")
    assert (results.method, results.preset, results.seeds) == ("anonymous_user_embeddings", "demo", [0, 1])
    accuracy = results.metrics["accuracy"]
    assert [*accuracy.baseline] == ARMS[1:] and all(b.n == 2 for b in accuracy.baseline.values())
    assert all("attribution" in m.note or "uploads nothing" in m.note for m in (accuracy, *accuracy.baseline.values()))
    bound = results.evidence["main"]["mixture_k2"]["privacy"]
    assert bound["attribution"] <= bound["bound"] + 0.1 and bound["bound"] <= 2 / 3
    assert set(results.evidence["against_on_device"]) == set(ARMS) - {"central", "static", "on_device"}
    assert results.evidence["published"] == {"arm": "mixture_k2", "design": "mixture", "file": "user_design.json"}
    assert UserDistribution.from_design("run/user_design.json").components.shape == (2, 1, 32)
    assert results.evidence["randomness_of_draws"] == "simulation=True, seeds"
    assert results.evidence["main"]["gaussian_r2"]["privacy"]["radius_over_std_max"] <= 2 + 1e-4
    assert Path("run/figures/tradeoff.png").exists()
    model = AutoModelForSequenceClassification.from_pretrained("run")
    assert model.config.model_type == "personal_lm"
    private = sorted(Path("run").rglob("users.safetensors"))
    assert len(private) == 3 * 5 and all(path.parent != Path("run") for path in private)
    assert UserDistribution.load(private[0]).num_users == 6
    written = {path: path.stat().st_mtime_ns for path in Path("run").rglob("fit.json")}
    assert len(written) == 7 * 3 + 2  # each arm on two rates and, at one of them, another seed
    main(argv)
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("fit.json")} == written
    assert read_results("run").metrics == results.metrics


def start(folder: Path, *argv: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "trainers.recipes.personalize_anonymously", *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_where_it_would_have(tmp_path):
    """SIGKILL after the second finished run, whatever the third was at."""
    argv = ["--arms", "gaussian_r2", "central", "beta_4", "mixture_k3", *TINY]
    for name in ("killed", "whole"):
        (tmp_path / name).mkdir()
    process = start(tmp_path / "killed", *argv)
    until = time.monotonic() + 900
    while len(done := list((tmp_path / "killed").rglob("fit.json"))) < 2 and time.monotonic() < until:
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in done}
    assert len(kept) >= 2 and not (tmp_path / "killed" / "run" / "results.json").exists()
    for name in ("killed", "whole"):
        assert start(tmp_path / name, *argv).wait(timeout=900) == 0
    assert all(path.stat().st_mtime_ns == times for path, times in kept.items())
    found = [read_results(tmp_path / name / "run") for name in ("killed", "whole")]
    assert found[0].metrics == found[1].metrics


@pytest.mark.slow
def test_the_trade_off(tmp_path, monkeypatch):
    """Acceptance test 6 of the digest: the order of the designs, and a mixture that beats no personalisation by .1
    while nobody can be named with a probability above K / N."""
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    main(
        [
            "--arms",
            "mixture_k5_random",
            "mixture_k5",
            "central",
            "static",
            "gaussian_free",
            "gaussian_r1",
            "--learning_rates",
            "3e-3",
            "--output_dir",
            "run",
        ]
    )
    results = read_results("run")
    found = results.metrics["accuracy"].baseline
    accuracy = {"mixture_k5_random": results.metrics["accuracy"].value} | {arm: m.value for arm, m in found.items()}
    assert (
        accuracy["static"] >= accuracy["gaussian_free"] - 0.02 and accuracy["gaussian_free"] > accuracy["gaussian_r1"]
    )
    assert accuracy["mixture_k5_random"] > accuracy["central"] + 0.1 and accuracy["mixture_k5"] > accuracy["central"]
    attribution = results.metrics["attribution"]
    assert attribution.value <= 5 / 40 + 0.01
    assert attribution.baseline["mixture_k5"].value <= 5 / 20 + 0.01, "of who did not volunteer"
