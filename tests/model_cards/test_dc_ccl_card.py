"""The card of DC-CCL: what it says, and that every line a user would copy runs."""

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig

from hf_models.dc_ccl import DcCclForImageClassification, split_vertically
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from trainers.report import read_results, summarise, write_results


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


@pytest.fixture
def run(tmp_path):
    """A run folder with a tiny model and, on one of two tasks, a small FedAvg that wins."""
    make_run(tmp_path / "run")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "run" / name).unlink(missing_ok=True)
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1], "layer_type": "basic"}
    torch.manual_seed(0)
    config = split_vertically(AutoConfig.for_model("resnet", num_channels=1, num_labels=10, **sizes), 0.25)
    DcCclForImageClassification(config).save_pretrained(tmp_path / "run")
    results = read_results(tmp_path / "run")
    results.method, results.preset = "dc_ccl", "evidence"
    for task, ours, fedavg, verdict in (
        ("digits", [0.95, 0.94, 0.96], [0.97, 0.96, 0.98], "fails"),
        ("fashion_mnist", [0.8, 0.81, 0.79], [0.7, 0.71, 0.69], "holds"),
    ):
        metric = summarise(ours, higher_is_better=True)
        metric.baseline = {"fedavg_small": summarise(fedavg, higher_is_better=True)}
        metric.baseline["fedavg_small"].verdict = verdict
        results.metrics[f"{task}_served_accuracy"] = metric
    results.evidence["tasks"] = {
        "digits": {"family": "resnet", "device_budget": {"max_bytes": 100_000}},
        "fashion_mnist": {"family": "vit", "device_budget": None},
    }
    write_results(tmp_path / "run", results)
    return tmp_path / "run"


def test_the_card_passes_the_check_and_claims_nothing_of_the_paper(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.pipeline_tag == "image-classification" and "dc_ccl" in card.data.tags
    assert "https://arxiv.org/abs/2303.10361" in text and "not** the authors' model" in text
    assert "Of the paper we could read the abstract" in text and "none is the paper's" in text
    assert "No differential privacy is claimed" in text


def test_it_says_where_the_small_model_alone_wins(run):
    text = build_card(run)
    assert (
        "**Digits:** the small model alone, averaged (`fedavg_small`, 97.00 %), serves **better** than DC-CCL" in text
    )
    assert "over the seeds DC-CCL against it: worse" in text
    assert (
        "**Fashion mnist:** DC-CCL serves 80.00 %, the small model alone, averaged (`fedavg_small`), 70.00 %" in text
    )
    assert "over the seeds DC-CCL against it: better" in text


def test_it_names_the_families_and_the_budgets(run):
    text = build_card(run)
    assert "are parts of one ResNet; a device may hold 100,000 bytes." in text
    assert "**Fashion mnist:** both submodels and the control model are parts of one ViT.\n" in text
    results = read_results(run)
    del results.evidence["tasks"]
    write_results(run, results)
    assert "parts of one" not in build_card(run)


def test_its_examples_run_and_agree(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    blocks = split_fences(build_card(run.relative_to(run.parent)))[1]
    load, package, remote = [code for name, code in blocks if name == "python"]
    names = {}
    exec(compile(load, "card", "exec"), names)
    assert "tensor" in capsys.readouterr().out and names["served"].shape == (2, 10)
    exec(compile(package, "card", "exec"), names)
    assert not [key for key in names["phone"].state_dict() if "cloud" in key]
    assert 'trust_remote_code": True' in remote and '"revision"' in remote


def test_what_is_said_of_small_runs_is_said_of_small_runs_only(run):
    small = build_card(run)
    results = read_results(run)
    results.preset = "paper"
    write_results(run, results)
    large = build_card(run)
    for words in (", and was not trained", "Tiny models on tiny images"):
        assert words in small and words not in large
