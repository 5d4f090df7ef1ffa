"""The card of MSign: transformers' own model, loaded without code of ours, and an optimizer example that trains."""

import re

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from tests.model_cards.tiny_run import TEXTS
from trainers.data import train_tokenizer
from trainers.optimizers import MSign
from trainers.report import read_results, write_results


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "run")
    train_tokenizer(TEXTS, vocab_size=300, show_progress=False).save_pretrained(tmp_path / "run")
    results = read_results(tmp_path / "run")
    results.method = "msign"
    write_results(tmp_path / "run", results)
    return tmp_path / "run"


def test_the_card_passes_the_check_and_promises_no_rescue(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-generation" and "msign" in card.data.tags
    assert "https://arxiv.org/abs/2602.01734" in text and "not** one of the authors' models" in text
    assert "nothing on this card says that MSign prevents it" in text and "**not measured here**" in text
    assert "trust_remote_code" not in text


def test_its_examples_run(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    load, train = [code for name, code in split_fences(build_card(run.relative_to(run.parent)))[1] if name == "python"]
    names = {}
    exec(compile(load, "card", "exec"), names)
    assert capsys.readouterr().out.startswith("def area(")
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    args = TrainingArguments(
        str(run.parent / "trained"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    names |= {"args": args, "my_dataset": rows}
    exec(compile(train.replace("period=100", "period=2"), "card", "exec"), names)
    names["trainer"].train()
    optimizer = names["trainer"].optimizer
    assert isinstance(getattr(optimizer, "optimizer", optimizer), MSign)
    s = torch.linalg.svdvals(names["model"].transformer.h[0].attn.c_proj.weight.detach())
    torch.testing.assert_close(s, s.mean().expand_as(s), rtol=1e-3, atol=0)


def test_the_options_on_the_card_are_those_of_the_recipes(run):
    from trainers.recipes.arguments import RecipeTrainingArguments

    named = set(re.findall(r"--(\w+)", build_card(run).split("Every recipe of hf-sigma takes")[1].split("\n")[0]))
    assert named == {"optimizer", "msign_period", "msign_targets", "optim"}
    assert named <= set(RecipeTrainingArguments.__dataclass_fields__)
