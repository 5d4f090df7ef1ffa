import json

import pytest
from transformers import TrainingArguments

from model_cards.build import build_card
from trainers.recipes.arguments import DataArguments, parse_arguments
from trainers.recipes.compare_sigma_moe import PRESETS, CompareArguments, Job, compare
from trainers.recipes.pretrain_sigma_moe import SigmaMoeArguments
from trainers.report import read_results


TYPES = (CompareArguments, SigmaMoeArguments, DataArguments, TrainingArguments)
SMALL = "--max_steps 10 --warmup_steps 1 --eval_steps 5 --logging_steps 1 --sequence_length 32 --workers 1".split()
SMALL += "--tokenizer_vocab_size 300 --max_eval_blocks 8 --per_device_train_batch_size 2 --use_cpu true".split()
SMALL += ["--lr_scheduler_kwargs", json.dumps({"num_decay_steps": 3})]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n" * 8)
    return str(folder)


def run(tmp_path, corpus, *argv):
    argv = [*SMALL, "--dataset_name", corpus, "--held_out_fraction", "0.2", *argv]
    argv += ["--output_dir", str(tmp_path / "run")]
    _, (args, model, data, training) = parse_arguments(TYPES, PRESETS, argv, default_preset="evidence")
    return compare(args, model, data, training)


@pytest.mark.slow
def test_three_seeds_give_verdicts_and_a_repetition_trains_nothing(tmp_path, corpus):
    argv = ("--arms", "progressive", "lbl_top1", "dense", "--seeds", "0", "1", "2", "--learning_rates", "1e-3", "4e-3")
    results = run(tmp_path, corpus, *argv)
    assert read_results(tmp_path / "run") == results
    quality = results.metrics["held_out_bits_per_character"]
    assert quality.n == 3 and set(quality.baseline) == {"lbl_top1", "dense", "dense_equal_seconds"}
    assert all(b.n == 3 and b.verdict in ("holds", "null", "fails") for b in quality.baseline.values())
    assert results.metrics["layer0_max_deviation"].baseline["lbl_top1"].n == 3
    assert results.metrics["loss_before_switch"].n == 3
    chosen = results.evidence["learning_rate_chosen"]
    assert chosen["dense_equal_seconds"] == chosen["dense"] in (1e-3, 4e-3)

    fits = sorted((tmp_path / "run").rglob("fit.json"))
    # two rates on the first seed and the chosen one on two more, for three arms; dense_equal_seconds on three seeds
    assert len(fits) == 3 * (2 + 2) + 3
    content = json.loads((Job("progressive", 0, 1e-3, 10).folder(tmp_path / "run") / "fit.json").read_text())["fit"]
    other = json.loads((Job("progressive", 0, 4e-3, 10).folder(tmp_path / "run") / "fit.json").read_text())["fit"]
    best = min((content, other), key=lambda fit: fit["nats_per_token"])
    assert best["learning_rate"] == chosen["progressive"]
    assert best["bits_per_character"] == pytest.approx(quality.values[0])

    written = {fit: fit.stat().st_mtime_ns for fit in fits}
    again = run(tmp_path, corpus, *argv)
    assert {fit: fit.stat().st_mtime_ns for fit in sorted((tmp_path / "run").rglob("fit.json"))} == written
    assert again.metrics == results.metrics and again.wall_seconds > results.wall_seconds
    assert "no weights" in build_card(tmp_path / "run")


def test_the_grid_is_the_same_for_every_arm():
    _, (args, *_) = parse_arguments(TYPES, PRESETS, [], default_preset="evidence")
    assert args.arms[0] == "progressive" and len(args.seeds) >= 3 and len(args.learning_rates) >= 3
