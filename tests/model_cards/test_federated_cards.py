"""The cards of the federated methods: what they say, and that every line a user would copy runs."""

import pytest
import torch
from huggingface_hub import ModelCard

from hf_models.ctr import CtrConfig, CtrForCtrPrediction
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from trainers.recipes.federated_pixel_mlp import PixelMlpConfig, PixelMlpForImageClassification
from trainers.report import read_results, summarise, write_results


PRESETS = {"fed_sub_avg": "evidence", "fed_la_avg": "evidence", "block_cyclic": "block_cyclic_evidence"}
PAPERS = {"fed_sub_avg": "2109.07704", "fed_la_avg": "2002.07399", "block_cyclic": "2002.07454"}


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


def compared(ours, others):
    """`{arm: (values, verdict)}` as baselines of ours."""
    metric = summarise(ours, higher_is_better=True)
    for arm, (values, verdict) in others.items():
        metric.baseline[arm] = summarise(values, higher_is_better=True)
        metric.baseline[arm].verdict = verdict
    return metric


METRICS = {
    "fed_sub_avg": {"lr_auc": compared([0.7, 0.71, 0.69], {"fed_avg": ([0.6, 0.61, 0.59], "holds")})},
    "fed_la_avg": {
        "convex_accuracy": compared(
            [0.92, 0.93, 0.91], {"mifa": ([0.95, 0.96, 0.94], "fails"), "fed_avg": ([0.8, 0.81, 0.79], "holds")}
        ),
        "always_there_accuracy": compared([0.9, 0.9, 0.9], {"fed_avg": ([0.9, 0.91, 0.9], "null")}),
    },
    "block_cyclic": {
        "blocks_accuracy": compared(
            [0.95, 0.94, 0.96], {"fed_avg": ([0.7, 0.7, 0.7], "holds"), "separate": ([0.98, 0.98, 0.98], "fails")}
        )
    },
}


@pytest.fixture(params=PRESETS)
def run(request, tmp_path):
    """A run folder of each method, with a tiny model."""
    folder, method = tmp_path / "run", request.param
    make_run(folder)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    torch.manual_seed(0)
    if method == "fed_sub_avg":
        features = [{"name": name, "vocab_size": 9, "role": name} for name in ("user", "item")]
        features.append({"name": "genres", "kind": "sequence", "role": "item", "vocab_size": 5})
        CtrForCtrPrediction(CtrConfig(features=features, architecture="lr")).save_pretrained(folder)
    else:
        model = PixelMlpForImageClassification(PixelMlpConfig(image_size=4, num_labels=10, hidden_sizes=[4]))
        for part in (folder, folder / "block_0", folder / "block_1")[: 1 if method == "fed_la_avg" else 3]:
            model.save_pretrained(part)
    results = read_results(folder)
    results.method, results.preset = method, PRESETS[method]
    results.metrics = METRICS[method]
    write_results(folder, results)
    return folder


def test_the_card_passes_the_check_and_claims_nothing_of_the_paper(run):
    text, method = build_card(run, repo_id="org/x"), read_results(run).method
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    assert f"https://arxiv.org/abs/{PAPERS[method]}" in text and "not** the authors' model" in text
    assert "none is the paper's" in text and "No differential privacy is claimed" in text
    assert "federated-learning" in ModelCard(text).data.tags


def test_what_is_worse_is_called_worse(run):
    text = build_card(run)
    expected = {
        "fed_sub_avg": ["**Lr auc:** FedSubAvg 0.7000, FedAvg 0.6000; over the seeds FedSubAvg is better."],
        "fed_la_avg": [
            "\n\n**Convex:** FedLaAvg 92 %, FedAvg 80.00 %; over the seeds FedLaAvg is better.",
            "MIFA 95.00 %: FedLaAvg is worse than that.",
            "\n\n**Always there:** FedLaAvg 90 %, FedAvg 90.33 %; over the seeds FedLaAvg is not shown to be either.",
        ],
        "block_cyclic": [
            "**Blocks:** MC-PSGD 95.00 %; one model 70.00 %, over the seeds MC-PSGD is better; a chain for each block "
            "alone 98 %, over the seeds MC-PSGD is worse."
        ],
    }[read_results(run).method]
    for words in expected:
        assert words in text, words


def test_its_examples_run(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    blocks = split_fences(build_card(run.relative_to(run.parent)))[1]
    load, train, remote = [code for name, code in blocks if name == "python"]
    names = {}
    exec(compile(load, "card", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    exec(compile(train, "card", "exec"), names)
    assert len(names["fed"].history) in (2, 4)
    assert 'trust_remote_code": True' in remote and '"revision"' in remote


def test_what_is_said_of_small_runs_is_said_of_small_runs_only(run):
    small = build_card(run)
    results = read_results(run)
    results.preset = "paper"
    write_results(run, results)
    large = build_card(run)
    assert "Tiny models" in small or "small models, trained for minutes" in small
    assert "Tiny models" not in large and "small models, trained for minutes" not in large
