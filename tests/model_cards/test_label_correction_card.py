"""The card of label correction: what it owns to, and that every line a user would copy runs."""

import pytest
import torch
from huggingface_hub import ModelCard

from hf_models.ctr import CtrConfig, CtrForCtrPrediction
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from trainers.report import read_results, write_results


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


@pytest.fixture
def run(tmp_path):
    """A run folder with a tiny model that has features of every kind."""
    make_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    features = [
        {"name": "user", "role": "user", "vocab_size": 5},
        {"name": "item", "role": "item", "vocab_size": 7},
        {"name": "age", "kind": "numeric", "role": "user"},
        {"name": "history", "kind": "sequence", "role": "user", "shares": "item"},
    ]
    torch.manual_seed(0)
    CtrForCtrPrediction(CtrConfig(features=features, embedding_dim=4, hidden_sizes=[4])).save_pretrained(
        tmp_path / "run"
    )
    results = read_results(tmp_path / "run")
    results.method, results.data.name = "label_correction", "MovieLens 100k, positive from 4 stars"
    write_results(tmp_path / "run", results)
    return tmp_path / "run"


def test_the_card_passes_the_check_and_says_what_is_ours(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    assert "**This is our reading.**" in text and "https://arxiv.org/abs/2211.01163" in text
    assert "we have not seen the paper's full text, and quote no number of it" in text
    assert "ctr" in ModelCard(text).data.tags and "may not be passed on" in text
    assert "On MovieLens users drift, too. The" in text and "drift as much" not in text
    results = read_results(run)
    drift = {"sd_of_local_ctr": 0.1774, "sd_of_local_ctr_of_drawn_clicks": 0.3251}
    results.evidence["drift_of_the_training_rows"] = drift
    write_results(run, results)
    assert "their own shares is 0.18, of the drawn users 0.33. The table" in build_card(run)
    assert '"only changes' not in text, "the paper's words are not known to us"
    results.data.name = "drawn clicks, drift 3"
    write_results(run, results)
    drawn = build_card(run)
    assert "On MovieLens" not in drawn and "drawn by a generator" in drawn


def test_its_examples_run(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    blocks = [code for name, code in split_fences(build_card(run.relative_to(run.parent)))[1] if name == "python"]
    load, correct, tune, remote = blocks
    names = {}
    for code in (load, correct, tune):
        exec(compile(code, "card", "exec"), names)
    out = capsys.readouterr().out
    assert "0.8000" in out and names["results"].users.tolist() == [0, 1]
    assert names["results"].logits["again"].shape == (4,)
    assert 'trust_remote_code": True' in remote and '"revision"' in remote


def test_without_weights_it_says_so(run):
    (run / "model.safetensors").unlink()
    text = build_card(run)
    assert "no weights come with them" in text and "from_pretrained" not in text
