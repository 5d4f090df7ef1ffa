"""The card of m3BERT: what it says, and that every line a user would copy runs."""

import pytest
import torch
from huggingface_hub import ModelCard

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from trainers.data import train_encoder_tokenizer
from trainers.report import read_results, write_results


TEXTS = ["Show the ruler", "Where do I see the ruler?"] * 2


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


@pytest.fixture
def run(tmp_path, request):
    """A run folder with a tiny model of the class `request.param`, by default an encoder of sentences."""
    make_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    tokenizer = train_encoder_tokenizer(TEXTS, vocab_size=300, show_progress=False)
    config = M3BertConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        mrl_layers=[1, 2],
        mrl_dims=[8, 32],
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    getattr(request, "param", M3BertForSentenceEmbedding)(config).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    results = read_results(tmp_path / "run")
    results.method = "m3bert"
    write_results(tmp_path / "run", results)
    return tmp_path / "run"


def test_the_card_passes_the_check_and_says_whose_it_is(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.pipeline_tag == "sentence-similarity" and "m3bert" in card.data.tags
    assert "https://arxiv.org/abs/2605.19568" in text and "not** the authors' model" in text
    assert "| Depths that it can be cut to (layers) | 1, 2 |" in text
    assert "| Widths that it can be cut to (entries) | 8, 32 |" in text


def test_its_examples_run_and_agree(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    blocks = split_fences(build_card(run.relative_to(run.parent)))[1]
    load, cut, encode, remote = [code for name, code in blocks if name == "python"]
    names = {}
    exec(compile(load, "card", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    embeddings = names["embeddings"]
    assert embeddings.shape == (2, 8)
    truncate, from_files = cut.splitlines()
    for line in (truncate, from_files):
        exec(compile(line, "card", "exec"), names)
        with torch.no_grad():
            assert torch.equal(names["small"].eval()(**names["batch"]).embeddings, embeddings)
    assert len(names["small"].model.layers) == 1
    assert 'trust_remote_code": True' in remote and '"revision"' in remote
    pytest.importorskip("sentence_transformers")
    exec(compile(encode, "card", "exec"), names)
    torch.testing.assert_close(torch.as_tensor(names["vectors"]), embeddings[:1].detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", [M3BertForMaskedLM], indirect=True)
def test_a_masked_language_model_has_examples_of_its_own(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    text = build_card(run.relative_to(run.parent))
    assert ModelCard(text).data.pipeline_tag == "fill-mask" and "M3BertSentenceTransformer" not in text
    load, cut, _ = [code for name, code in split_fences(text)[1] if name == "python"]
    names = {}
    exec(compile(load, "card", "exec"), names)
    exec(compile(cut, "card", "exec"), names)
    assert "300" in capsys.readouterr().out


def test_what_is_said_of_small_runs_is_said_of_small_runs_only(run):
    results = read_results(run)
    results.preset = "paper"
    write_results(run, results)
    large = build_card(run)
    results.preset = "evidence"
    write_results(run, results)
    small = build_card(run)
    for words in (", and was not trained", "it is tiny"):
        assert words in small and words not in large
