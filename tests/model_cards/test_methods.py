"""The cards of MoNE, M-MoE and growth: what they say, what their examples do, and whose numbers they show."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_models.moe import MMoeConfig, MMoeForCausalLM, MoneConfig, MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from hf_models.moe.elastic import experts_in_force
from model_cards import build
from model_cards.build import build_card
from model_cards.markdown import results_table, split_fences
from model_cards.metadata import check_card
from tests.model_cards.test_build import CONFIG, INERT, make_run, structure
from tests.model_cards.tiny_run import TEXTS
from trainers.data import train_tokenizer
from trainers.report import Data, Model, read_results, summarise, verdict, write_results


ROOT = Path(__file__).parents[2]
METHODS = ("mone", "m_moe", "growth")
SHAPE = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
ARXIV = {"mone": "2510.05781", "m_moe": "2509.26520", "growth": "2510.08008"}
MODELS = {
    "mone": lambda: MoneForCausalLM(MoneConfig(**SHAPE)),
    "m_moe": lambda: MMoeForCausalLM(MMoeConfig(**SHAPE)),
    "growth": lambda: SigmaMoeForCausalLM(SigmaMoeConfig(**SHAPE)),
}


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


def write_run(folder: Path, method: str, **fields):
    """A run folder with a tiny model of the method, its tokenizer and made-up results."""
    make_run(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    MODELS[method]().save_pretrained(folder)
    train_tokenizer(TEXTS, vocab_size=300, show_progress=False).save_pretrained(folder)
    results = read_results(folder)
    results.method = method
    for name, value in fields.items():
        setattr(results, name, value)
    write_results(folder, results)
    return results


def blocks_of(text: str, language: str = "python") -> list[str]:
    return [code for name, code in split_fences(text)[1] if name == language]


# --- every card ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_a_card_of_each_method_passes_the_hub_client_and_the_check(method, tmp_path):
    results = write_run(tmp_path / "run", method)
    text = build_card(tmp_path / "run", repo_id="org/x")
    assert check_card(text, results, tmp_path / "run") == [] and str(ModelCard(text)) == text
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    assert {"mixture-of-experts", "moe", "hf-sigma"} <= set(card.data.tags)
    assert f"https://arxiv.org/abs/{ARXIV[method]}" in text
    (entry,) = [block for block in blocks_of(text, "bibtex")]
    assert ARXIV[method] in entry and entry.count("{") == entry.count("}")
    assert "not** the authors' model" in text or "not** one of the authors' models" in text
    assert "**not measured here**" in text and "none is the paper's" in text
    headings = re.findall(r"^## (.+)$", split_fences(text)[0], re.MULTILINE)
    assert headings == re.findall(r"^## (.+)$", split_fences(card_of_sigma_moe(tmp_path / "other"))[0], re.MULTILINE)


def card_of_sigma_moe(folder) -> str:
    make_run(folder)
    return build_card(folder)


@pytest.mark.parametrize("method", METHODS)
def test_the_load_example_of_each_method_runs(method, tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "run", method)
    monkeypatch.chdir(tmp_path)
    with_package, without = blocks_of(build_card(Path("run")))[:2]
    names = {}
    exec(compile(with_package, "card", "exec"), names)
    assert capsys.readouterr().out.startswith("def area(")
    assert type(names["model"]).__name__ == type(MODELS[method]()).__name__
    assert '"trust_remote_code": True' in without and '"revision": "COMMIT"' in without
    code = [line for line in without.splitlines() if line.strip()]
    assert len(code) <= 5 and any("AutoModelForCausalLM.from_pretrained" in line for line in code)


@pytest.mark.parametrize("method", METHODS)
def test_no_template_turns_text_of_others_into_markup(method, tmp_path):
    def card(folder, text):
        metric = summarise([1.0, 1.1, 1.2], unit=text, higher_is_better=False, note=text)
        metric.baseline[text] = summarise([2.0, 2.1, 2.2], unit=text, note=text)
        write_run(
            folder,
            method,
            **{"title": text, "preset": text, "device": text},
            metrics={"loss": metric, "base_loss": summarise([1.0])},
            evidence={"continued_from": text, "source": text, "measured_on": {"base_loss": text}, "k": [text]},
            data=Data(name=text, fingerprint="0", license=text, language=["en"], note=text),
            model=Model(parameters_total=2, parameters_active=1, parameters_non_embedding=1, base=None, note=text),
        )
        return build_card(folder, repo_id="o/r")

    plain, evil = card(tmp_path / "plain", "x"), card(tmp_path / "evil", INERT)
    assert structure(evil) == structure(plain)
    assert set(ModelCard(evil).data.to_dict()) == set(ModelCard(plain).data.to_dict())


@pytest.mark.parametrize("method", METHODS)
def test_measurements_without_weights_promise_none(method, tmp_path):
    write_run(tmp_path, method)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    text = build_card(tmp_path)
    assert "no weights come with them" in text and "AutoModelForCausalLM.from_pretrained" not in text


# --- what each method's card says and shows --------------------------------------------------------------------------


def test_mone_tells_itself_from_others_and_counts_the_gate(tmp_path):
    write_run(tmp_path, "mone")
    text = build_card(tmp_path)
    assert "Nested" in text and "2407.19985" in text and "Novice" in text and "2507.00390" in text
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 5
    for ratio, share in rows:
        assert float(share) == pytest.approx((1 + 2 * float(ratio)) / 3, abs=5e-4)
    assert "**No training speed-up.**" in text
    assert "| Neurons of an active expert that a token uses | 8 of 16 |" in text


def test_the_mone_example_runs(tmp_path, monkeypatch):
    write_run(tmp_path / "run", "mone")
    example = blocks_of(build_card(tmp_path / "run"))[2]
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).save_pretrained(tmp_path / "host")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example.replace("ORG/MODEL", "host"), "card", "exec"), names)
    assert names["mone"].config.neuron_ratio == 0.25 and names["mone"].config.host_config.model_type == "qwen3_moe"
    assert names["output"].shape[-1] <= 9


def test_the_m_moe_examples_run(tmp_path):
    write_run(tmp_path, "m_moe")
    text = build_card(tmp_path)
    ours, others = blocks_of(text)[2:]
    model = MODELS["m_moe"]().eval()
    exec(compile(ours, "card", "exec"), {"model": model})
    assert experts_in_force(model) == [2, 2]
    other = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE)).eval()
    names = {"other": other}
    exec(compile(others, "card", "exec"), names)
    assert names["other"] is other and experts_in_force(other) == [2, 2]
    for unchecked in ("--hf-overrides", "--override-kv"):
        (line,) = [line for line in text.splitlines() if unchecked in line]
        assert "from memory and **unchecked**" in line
    assert "| Active experts in training | 1 to 4, drawn for each layer of each micro-batch |" in text


def test_a_continued_m_moe_says_so(tmp_path):
    write_run(tmp_path / "a", "m_moe")
    fresh = build_card(tmp_path / "a")
    assert "Trained from scratch" in fresh and "this run starts from scratch" in fresh
    write_run(tmp_path / "b", "m_moe", evidence={"continued_from": "old_model"})
    local = build_card(tmp_path / "b")
    assert "Continued from a model in a local folder (old\\_model)" in local and "from scratch" not in local
    model = Model(parameters_total=2, parameters_active=1, parameters_non_embedding=1, base="org/base")
    write_run(tmp_path / "c", "m_moe", evidence={"continued_from": "org/base"}, model=model)
    hub = build_card(tmp_path / "c")
    assert "Trained from the weights of org/base" in hub and ModelCard(hub).data.base_model == "org/base"


def test_the_growth_example_runs_and_its_command_is_one_line(tmp_path, capsys):
    write_run(tmp_path, "growth")
    text = build_card(tmp_path)
    example = blocks_of(text)[2]
    model = MODELS["growth"]().eval()
    names = {"model": model}
    exec(compile(example, "card", "exec"), names)
    assert names["grown"].config.num_hidden_layers == 4 and names["grown"].config.num_experts == 8
    assert model.config.num_experts == 4 and "Recommendation(" in capsys.readouterr().out
    assert "python -m hf_models.moe.growth SOURCE DESTINATION --depth-factor 2 --width-factor 2" in blocks_of(
        text, "bash"
    )


def test_where_a_grown_model_comes_from(tmp_path):
    sizes = {"parameters_total": 2, "parameters_active": 1, "parameters_non_embedding": 1}
    metrics = {"bits": summarise([1.0])}
    write_run(tmp_path / "a", "growth", metrics=metrics | {"base_bits_per_character": summarise([2.0])})
    assert "Grown from a model that the same run trained from scratch, and" in build_card(tmp_path / "a")
    write_run(tmp_path / "b", "growth", metrics=metrics, model=Model(**sizes))
    assert "Grown from a model in a local folder, and" in build_card(tmp_path / "b")
    write_run(tmp_path / "c", "growth", metrics=metrics, model=Model(**sizes, base="org/base"))
    assert "Grown from the weights of org/base, and" in build_card(tmp_path / "c")


# --- whose numbers ---------------------------------------------------------------------------------------------------


def run_with_metrics_of_another_model(folder: Path):
    width, scratch = [2.0, 2.1, 2.2], [3.0, 3.1, 3.2]
    metric = summarise(width, unit="bits", higher_is_better=False)
    metric.baseline["scratch_width"] = summarise(scratch)
    metric.baseline["scratch_width"].verdict = verdict(width, scratch, False)
    metrics = {"held_out_bits": summarise([1.0, 1.1, 1.2], higher_is_better=False), "bits_of_width": metric}
    evidence = {"steps": 3, "measured_on": {"bits_of_width": "width"}}
    return write_run(folder, "growth", metrics=metrics, evidence=evidence)


def test_a_number_of_another_model_carries_its_name_and_stays_out_of_the_index(tmp_path):
    results = run_with_metrics_of_another_model(tmp_path)
    text = build_card(tmp_path)
    assert "| Held out bits ↓ | **this model** | 1.10 ± 0.10 | 3 |  |" in text
    assert "| Bits of width ↓ | **width** | 2.10 ± 0.10 bits | 3 |  |" in text
    assert "|  | scratch\\_width | 3.10 ± 0.10 bits | 3 | holds |" in text
    assert [entry.metric_type for entry in ModelCard(text).data.eval_results] == ["held_out_bits"]
    assert "is not *this model*" in text and "Measured on" not in text and "| Steps | 3 |" in text
    assert check_card(text, results, tmp_path) == []
    claimed = text.replace("- type: held_out_bits\n", "- type: bits_of_width\n")
    problems = check_card(claimed, results, tmp_path)
    assert "model-index: `bits_of_width` was measured on 'width'" in problems
    assert any(
        "the table is not" in p for p in check_card(text.replace("**width**", "**this model**"), results, tmp_path)
    )


@pytest.mark.parametrize("value", [None, "width", ["width"], {"gone": "x"}])
def test_other_values_under_that_name_change_nothing(tmp_path, value):
    results = make_run(tmp_path, evidence={"measured_on": value})
    assert "**this model**" in build_card(tmp_path) and str(results_table(results)) in build_card(tmp_path)


def test_one_run_has_no_verdict(tmp_path):
    metric = summarise([1.0], higher_is_better=False)
    metric.baseline["other"] = summarise([2.0])
    metric.baseline["other"].verdict = verdict([1.0], [2.0], False)
    make_run(tmp_path, metrics={"bits": metric})
    assert "|  | other | 2 | 1 |  |" in build_card(tmp_path)


@pytest.mark.parametrize(
    ("fields", "row"),
    [
        ({"neuron_top_k": 32, "moe_intermediate_size": 128}, "32 of 128"),
        ({"neuron_top_k": 200, "moe_intermediate_size": 128}, "128 of 128"),
        ({"neuron_ratio": 0.25, "moe_intermediate_size": 128}, "32 of 128"),
        ({"neuron_ratio": 0.001, "moe_intermediate_size": 128}, "1 of 128"),
        ({"neuron_ratio": [0.5, 1.0, 0.25, 1.0]}, "0.5, 1.0, 0.25, 1.0 (share, one a layer)"),
        ({"neuron_top_k": [3, 4, 5, 6]}, "3, 4, 5, 6 (neurons, one a layer)"),
        ({"neuron_top_k": None, "neuron_ratio": None}, None),
        ({"k_sampling": "global_batch", "k_min": 2, "k_max": 6}, "2 to 6, drawn for each optimizer step"),
        ({"k_sampling": "micro_batch"}, "1 to 4, drawn for each micro-batch"),
        ({"k_sampling": "none", "k_max": 6}, None),
    ],
)
def test_details_of_what_moves(tmp_path, fields, row):
    make_run(tmp_path, config={**CONFIG, **fields})
    details = build_card(tmp_path).split("## Model details")[1].split("## Training")[0]
    assert ("that a token uses" in details or "in training" in details) == (row is not None)
    assert row is None or f"| {row} |" in details


# --- what is committed -----------------------------------------------------------------------------------------------


COMMITTED = sorted(file.parent.name for file in (ROOT / "model_cards").glob("*/results.json"))


def test_every_folder_with_results_has_a_card_and_no_card_is_without(monkeypatch):
    cards = sorted(file.parent.name for file in (ROOT / "model_cards").glob("*/README.md"))
    # Rendered from tables with tests of their own: test_faults.py, test_matrix.py.
    assert cards == sorted([*COMMITTED, "compatibility", "reliability"])
    assert "sigma_moe" in COMMITTED and {file.stem for file in build.TEMPLATES.glob("*.md")} >= {*COMMITTED, *METHODS}


@pytest.mark.parametrize("method", COMMITTED)
def test_committed_evidence_carries_its_verdicts(method):
    """Byte equality of card and files is in test_compatibility.py."""
    folder = ROOT / "model_cards" / method
    results = read_results(folder)
    assert results.method == method and results.preset.endswith("evidence") and len(results.seeds) >= 3
    known = {"README.md", "results.json", "config.json", "compatibility.json", "figures"}
    assert {path.name for path in folder.iterdir()} <= known
    figures = {figure.path for figure in results.figures}
    assert figures == {path.relative_to(folder).as_posix() for path in (folder / "figures").iterdir()}
    compared = [m for m in results.metrics.values() if m.baseline and m.higher_is_better is not None]
    assert compared and all(b.verdict for m in compared for b in m.baseline.values())
    assert all(m.n == len(results.seeds) == len(m.values) for m in compared)
    assert "no weights come with them" in (folder / "README.md").read_text(encoding="utf-8")
    text = json.dumps(json.loads((folder / "config.json").read_text())) + (folder / "results.json").read_text()
    assert str(ROOT) not in text and str(Path.home()) + "/" not in text
