"""The card of anonymous personalisation: what it says, and that every line a user would copy runs."""

import pytest
import torch
from huggingface_hub import ModelCard

from hf_models.personal_lm import (
    PersonalLmConfig,
    PersonalLmForCausalLM,
    PersonalLmForSequenceClassification,
    UserDistribution,
    UserDistributionConfig,
)
from hf_models.personal_lm.user_distribution import DESIGN_FILE
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import make_run
from trainers.recipes.anonymous_data import unit_tokenizer
from trainers.report import read_results, write_results


WORDS = ["quite good bad dull"]


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


@pytest.fixture
def run(tmp_path, request):
    """A run folder with a tiny model of the class `request.param`, by default a classifier."""
    kind = getattr(request, "param", PersonalLmForSequenceClassification)
    make_run(tmp_path / "run")
    (tmp_path / "run" / "model.safetensors").unlink()
    tokenizer = unit_tokenizer(WORDS, words=True)
    base = {
        "model_type": "gpt2",
        "n_embd": 16,
        "n_layer": 1,
        "n_head": 2,
        "n_positions": 32,
        "vocab_size": len(tokenizer),
    }
    base |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    task = "causal_lm" if kind is PersonalLmForCausalLM else "sequence_classification"
    torch.manual_seed(0)
    kind(PersonalLmConfig(base_config=base, task=task, num_labels=3)).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    results = read_results(tmp_path / "run")
    results.method = "anonymous_user_embeddings"
    write_results(tmp_path / "run", results)
    publish(tmp_path / "run", "mixture")
    return tmp_path / "run"


def publish(folder, design: str | None) -> None:
    """The public design beside the model, as the recipe puts it there, and its word in the results."""
    (folder / DESIGN_FILE).unlink(missing_ok=True)
    results = read_results(folder)
    designs = {"device_learning_rate": 0.02, "device_steps": 3, "beta_learning_rate": 0.02}
    arm = {"mixture": "mixture_k2", "gaussian": "gaussian_r2", "beta": "beta_4_reader", None: "central"}[design]
    results.evidence |= {"designs": designs, "published": {"arm": arm, "design": design, "file": None}}
    if design:
        tokens = 5 if PersonalLmConfig.from_pretrained(folder).task == "causal_lm" else 1
        config = UserDistributionConfig(16, tokens, design=design, std=0.3, num_components=2)
        public = {"components": torch.randn(2, tokens, 16)} if design == "mixture" else {}
        UserDistribution(config, 7, **public).save_design(folder)
        results.evidence["published"]["file"] = DESIGN_FILE
    write_results(folder, results)


def test_the_card_passes_the_check_and_says_how_anonymous_it_is(run):
    text = build_card(run, repo_id="org/x")
    assert check_card(text, read_results(run), run) == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.pipeline_tag == "text-classification" and "privacy" in card.data.tags
    assert "https://arxiv.org/abs/2501.06062" in text and "not** the authors' model" in text
    for words in (
        '"Anonymous" is a matter of degree',
        "are ours",
        "The text is not protected",
        "no number of it is quoted",
    ):
        assert words in text


@pytest.mark.parametrize("run", [PersonalLmForSequenceClassification, PersonalLmForCausalLM], indirect=True)
@pytest.mark.parametrize("design", ["mixture", "gaussian", "beta", None])
def test_its_examples_run_with_the_design_of_the_training(run, design, monkeypatch, capsys):
    publish(run, design)
    monkeypatch.chdir(run.parent)
    load, *fit, remote = [
        code for name, code in split_fences(build_card(run.relative_to(run.parent)))[1] if name == "python"
    ]
    names = {}
    exec(compile(load, "card", "exec"), names)
    assert "tensor" in capsys.readouterr().out
    assert 'trust_remote_code": True' in remote and '"revision"' in remote
    if design is None:
        assert "mine" not in names and not fit
        return
    trained = UserDistribution.from_design(run / DESIGN_FILE)
    assert names["mine"].config == trained.config and names["mine"].config.std == 0.3
    for name, tensor in trained.named_buffers():
        assert torch.equal(dict(names["mine"].named_buffers())[name], tensor)
    exec(compile(fit[0], "card", "exec"), names)
    if names["model"].config.task == "causal_lm":
        return
    rows = [{"input_ids": [2, 3], "labels": 1, "user": 0}] * 4

    def collate(batch):
        ids = torch.tensor([row["input_ids"] for row in batch])
        return {
            "input_ids": ids,
            "attention_mask": ids.ne(0).long(),
            "labels": torch.tensor([r["labels"] for r in batch]),
        }

    names["fit"](*([rows] if design == "mixture" else [rows, rows]), collate)
    assert UserDistribution.load("mine.safetensors").num_users == 1


def against(**verdicts: str) -> dict:
    gains = {"holds": 0.1, "fails": -0.2, "null": 0.0}
    return {arm: {"difference": gains[v], "verdict": v, "attribution": 0.25} for arm, v in verdicts.items()}


def test_the_card_says_where_the_device_alone_wins_and_loses(run):
    results = read_results(run)
    results.seeds = [0, 1, 2]
    said = {
        "wins": "it **wins** against mixture\\_k5 (-0.200, attribution 0.250)",
        "loses": "it **loses** to beta\\_80 (+0.100, attribution 0.250)",
        "open": "3 seeds do not decide about gaussian\\_r2",
        "none": "no anonymous design is shown to be worth its uploads",
        "both": "attribution 0.250), beta\\_20 (-0.200",
        "absent": "has no arm `on_device`",
    }
    for found, expected in (
        (against(mixture_k5="fails", gaussian_r2="null", beta_80="holds"), {"wins", "loses", "open"}),
        (against(mixture_k5="fails", gaussian_r2="null", beta_20="fails"), {"wins", "open", "none", "both"}),
        ({}, {"absent"}),
    ):
        results.evidence["against_on_device"] = found
        write_results(run, results)
        text = build_card(run)
        assert {name for name, words in said.items() if words in text} == expected


def test_the_card_tells_of_volunteers_uploads_and_other_starts(run):
    results, text = read_results(run), build_card(run)
    for words in (
        "A text is one upload",
        "Volunteers are identified",
        "Like beside like",
        "begins at (2, 5) with one",
    ):
        assert words in text
    assert "Parts are split by time" not in text
    results.evidence["shakespeare"] = {"mixture_k5": {}}
    write_results(run, results)
    assert "Parts are split by time" in build_card(run)


def test_what_is_said_of_small_runs_is_said_of_small_runs_only(run):
    results = read_results(run)
    results.preset = "paper"
    write_results(run, results)
    large = build_card(run)
    results.preset = "evidence"
    write_results(run, results)
    small = build_card(run)
    for words in ("and was not run", "good for nothing else"):
        assert words in small and words not in large
