import json
import re
import tomllib
from copy import deepcopy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from huggingface_hub import ModelCard
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from model_cards import build
from model_cards.build import CardError, build_card, main
from model_cards.markdown import evaluation_table, fence, inline, number, split_fences
from model_cards.metadata import check_card
from trainers.figures import comparison_figure
from trainers.redaction import command_line
from trainers.report import (
    Data,
    FigureFile,
    Model,
    Results,
    ResultsError,
    Sample,
    collect_versions,
    read_results,
    summarise,
    verdict,
    write_results,
)


EVIL = (
    "x\n```\n# Injected heading\n<script>alert(1)</script><img src=x onerror=alert(2)>\n---\nlicense: mit\n---\n"
    "[click](javascript:alert(3)) ![i](http://example.org/i.png)\n~~~\n````\n| a | b |\n|---|---|\n| 1 | 2 |\n"
    "{{ results.title }} {% raw %} \u202e\x1b[31m [More Information Needed] #!/usr/bin/python"
)
# the same without what the check refuses outright in text that no model wrote
INERT = EVIL.split("{{")[0]
CONFIG = {
    "model_type": "sigma_moe",
    "architectures": ["SigmaMoeForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_experts_per_tok_per_layer": [4, 4, 2, 1],
    "max_position_embeddings": 256,
    "vocab_size": 1000,
}


@cache
def figure_bytes() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "bits.png"
        comparison_figure({"ours": [1.8], "dense": [1.9]}, path, y_label="bits", higher_is_better=False)
        return path.read_bytes()


def make_run(folder: Path, *, config=CONFIG, **changes) -> Results:
    """A run folder as a recipe leaves it, by the functions that a recipe calls."""
    ours, dense = [1.81, 1.83, 1.80], [1.95, 1.99, 1.93]
    metric = summarise(ours, unit="bits/character", higher_is_better=False, note="held-out files")
    metric.baseline["dense, equal active parameters"] = summarise(dense, unit="bits/character")
    metric.baseline["dense, equal active parameters"].verdict = verdict(ours, dense, False)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "figures/bits.png").write_bytes(figure_bytes())
    (folder / "model.safetensors").touch()
    fields = {
        "method": "sigma_moe",
        "title": "Sigma-MoE demo",
        "preset": "demo",
        "seeds": [0, 1, 2],
        "command": command_line(["python", "-m", "trainers.recipes.pretrain_sigma_moe", "--output_dir", str(folder)]),
        "device": "a CPU, 2 threads",
        "versions": collect_versions(),
        "wall_seconds": 600.5,
        "metrics": {"held_out_bits": metric, "parsed_share": summarise([0.25], higher_is_better=True)},
        "evidence": {"tokens": 1_000_000, "learning_rates": [1e-3, 3e-3]},
        "data": Data(name="standard library", fingerprint="sha256:0f", license="PSF-2.0", language=["en", "code"]),
        "model": Model(parameters_total=13_000_000, parameters_active=1_200_000, parameters_non_embedding=12_000_000),
        "figures": [FigureFile(path="figures/bits.png", caption="Held-out bits of the two models")],
        "samples": [Sample(prompt="def area(", completion="self):\n    return 1\n", note="a held-out function")],
    }
    results = Results(**(fields | changes))
    write_results(folder, results)
    (folder / "config.json").write_text(json.dumps(config))
    return results


@pytest.fixture
def run(tmp_path):
    make_run(tmp_path / "demo")
    return tmp_path / "demo"


@pytest.fixture(autouse=True)
def no_committed_evidence(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(build, "PACKAGE", tmp_path_factory.mktemp("package"))


def structure(text: str) -> list[str]:
    """What a Markdown renderer makes of the card, without the text."""
    renderer = MarkdownIt("commonmark", {"html": True}).enable("table").enable("strikethrough")
    body = text.split("\n---\n", 1)[1]
    return [
        kind
        for token in renderer.parse(body)
        for kind in [token.type, *(child.type for child in token.children or [] if child.type != "text")]
    ]


# -- the card ---------------------------------------------------------------------------------------------------------


def test_a_card_passes_the_hub_client_and_the_check(run):
    text = build_card(run, repo_id="org/sigma_moe-demo")
    card = ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-generation"
    assert {"sigma_moe", "moe", "hf-sigma"} <= set(card.data.tags)
    assert card.data.model_name == "sigma_moe-demo"
    results = read_results(run)
    assert {entry.metric_type: entry.metric_value for entry in card.data.eval_results} == {
        name: metric.value for name, metric in results.metrics.items()
    }
    assert check_card(text, results, run) == []
    assert str(card) == text


def test_sections_are_in_order(run):
    headings = re.findall(r"^## (.+)$", split_fences(build_card(run))[0], re.MULTILINE)
    assert headings == [
        "How to use",
        "Model details",
        "Training",
        "Evaluation",
        "Compatibility",
        "What of the paper is not reproduced, and why",
        "Limitations",
        "License",
        "Citation",
    ]


def test_what_was_measured_is_in_the_card(run):
    text = build_card(run)
    for fact in (
        "| Held out bits ↓ | **this model** | 1.813 ± 0.015 bits/character | 3 |  |",
        "|  | dense, equal active parameters | 1.957 ± 0.031 bits/character | 3 | holds |",
        "| Active experts per layer | 4 (layers 0-1), 2 (layer 2), 1 (layer 3) |",
        "| Attention heads (Q / KV) | 4 / 2 |",
        "| Parameters, active per token | 1,200,000 |",
        "| Fingerprint of the corpus | sha256:0f |",
        "| Tokens | 1,000,000 |",
        "| Learning rates | 0.001, 0.003 |",
        "| torch | " + collect_versions()["torch"],
        "not measured here",
        "trained from scratch".capitalize(),
    ):
        assert fact in text, fact


def test_two_builds_are_byte_identical(run):
    assert main([str(run)]) == 0
    first = (run / "README.md").read_bytes()
    assert main([str(run)]) == 0
    assert (run / "README.md").read_bytes() == first
    assert main(["--check", str(run)]) == 0


def test_python_blocks_parse_and_load_what_they_name(run):
    blocks = [code for language, code in split_fences(build_card(run, repo_id="org/a_b"))[1] if language == "python"]
    assert len(blocks) == 2
    assert all('"org/a_b"' in code and "AutoModelForCausalLM" in code for code in blocks)
    assert "import hf_models" in blocks[0] and "hf_models" not in blocks[1]
    assert '"revision"' in blocks[1] and '"trust_remote_code": True' in blocks[1]


def test_the_load_example_runs(tmp_path, monkeypatch, capsys):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

    run = tmp_path / "demo"
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<eos>", "def", "area", "("])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(run)
    sizes = {**CONFIG, "vocab_size": len(vocabulary), "moe_intermediate_size": 16, "eos_token_id": 1}
    del sizes["model_type"], sizes["architectures"]
    SigmaMoeForCausalLM(SigmaMoeConfig(**sizes)).save_pretrained(run)
    make_run(run, config=json.loads((run / "config.json").read_text()))
    monkeypatch.chdir(tmp_path)
    example = next(code for language, code in split_fences(build_card(run))[1] if language == "python")
    exec(compile(example, "card", "exec"), {})
    assert capsys.readouterr().out.startswith("def area (")


def test_a_local_folder_shows_no_absolute_path(run, monkeypatch):
    assert f'from_pretrained("{run.name}")' in build_card(run)
    monkeypatch.chdir(run.parent.parent)
    assert f'from_pretrained("{run.parent.name}/demo")' in build_card(Path(run.parent.name) / "demo")


def test_stated_minimum_versions_are_those_of_the_package(run):
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    text = build_card(run)
    for name in ("transformers", "torch"):
        (requirement,) = [item for item in project["dependencies"] if re.match(rf"{name}\b", item)]
        minimum = re.search(r">=([\d.]+)", requirement)[1]
        assert f"{name} >= {minimum}" in text


def test_base_model_data_set_and_head_reach_the_metadata(tmp_path):
    config = {**CONFIG, "architectures": ["SigmaMoeForSequenceClassification"]}
    data = Data(name="x", fingerprint="sha256:1", license="mit", language=["no"], hub_id="org/data")
    model = Model(parameters_total=2, parameters_active=1, parameters_non_embedding=1, base="org/base")
    make_run(tmp_path, config=config, data=data, model=model)
    text = build_card(tmp_path, repo_id="org/x")
    card = ModelCard(text)
    assert card.data.datasets == ["org/data"] and card.data.base_model == "org/base"
    assert card.data.pipeline_tag == "text-classification" and "AutoModelForSequenceClassification" in text
    assert card.data.language == ["no"]


# -- committed evidence -----------------------------------------------------------------------------------------------


def test_committed_evidence_stands_beside_the_run(run):
    companion = build.PACKAGE / "sigma_moe"
    longer = make_run(companion, title="Sigma-MoE evidence", preset="evidence", wall_seconds=36000)
    text = build_card(run)
    assert "### The committed comparison" in text and "Sigma-MoE evidence" in text and "600 minutes" in text
    assert text.count(evaluation_table(longer.metrics)) == 2
    assert "](figures/evidence_bits.png)" in text and (run / "figures/evidence_bits.png").is_file()
    assert build_card(run) == text


def test_evidence_is_not_shown_beside_itself(run):
    make_run(build.PACKAGE / "sigma_moe", command=read_results(run).command)
    assert "### The committed comparison" not in build_card(run)


# -- untrusted text ---------------------------------------------------------------------------------------------------


def test_a_sample_that_utf8_cannot_encode(tmp_path):
    make_run(tmp_path, title="a \ud800 b", samples=[Sample(prompt="\ud800", completion="\udcff")])
    assert read_results(tmp_path).samples[0].prompt == "\ud800"
    assert main([str(tmp_path)]) == 0
    assert "\\ud800" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_sample_cannot_inject(tmp_path):
    plain = make_run(tmp_path / "plain")
    evil = Sample(prompt=EVIL, completion=EVIL, note=INERT)
    make_run(tmp_path / "evil", samples=[evil])
    expected, text = build_card(tmp_path / "plain", repo_id="o/r"), build_card(tmp_path / "evil", repo_id="o/r")
    assert ModelCard(text).data.to_dict() == ModelCard(expected).data.to_dict()
    assert structure(text) == structure(expected)
    assert plain.title in text and "\u202e" not in text and "\x1b" not in text
    html = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    assert "<script" not in html and "onerror" not in re.sub(r"&lt;.*?&gt;", "", html)


def test_no_other_field_can_inject(tmp_path):
    def card(folder, text):
        metric = summarise([1.0], unit=text, note=text)
        metric.baseline[text] = summarise([2.0], unit=text, note=text)
        make_run(
            folder,
            title=text,
            preset=text,
            device=text,
            versions={text: text},
            metrics={"loss": metric},
            evidence={text: [text, {"nested": text}]},
            data=Data(name=text, fingerprint="0", license=text, language=["en"], note=text),
            model=Model(parameters_total=2, parameters_active=1, parameters_non_embedding=1, note=text),
            figures=[FigureFile(path="figures/bits.png", caption=text)],
        )
        return build_card(folder, repo_id="o/r")

    plain, evil = card(tmp_path / "plain", "x"), card(tmp_path / "evil", INERT)
    assert set(ModelCard(evil).data.to_dict()) == set(ModelCard(plain).data.to_dict())
    assert ModelCard(evil).data.license == "apache-2.0"
    assert structure(evil) == structure(plain)


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("`~#*_[]()<>&|\\!-+=1.) \t\nax:/$\u202e\r")))
@example("1. a")
@example("--- \n===")
def test_inline_text_is_one_paragraph_of_text(text):
    if not "".join(text.split()):
        return
    tokens = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(str(inline(text)))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}
    expected = " ".join(text.replace("\u202e", "\\u202e").split())
    assert "".join(child.content for child in tokens[1].children) == expected


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("`~a \n#<\t")))
def test_a_fence_holds_whatever_it_holds(text):
    tokens = MarkdownIt("commonmark").parse(f"{fence(text)}\n\nafter")
    assert [token.type for token in tokens] == ["fence", "paragraph_open", "inline", "paragraph_close"]
    assert split_fences(f"{fence(text)}\n\nafter") == ("\nafter", [("text", text.rstrip())])


@pytest.mark.parametrize(
    "value, spread, text",
    [
        (1.81333, 0.01528, "1.813 ± 0.015"),
        (1.81333, 0.0, "1.813 ± 0.000"),
        (1.81333, None, "1.813"),
        (0, None, "0"),
        (0.00012345, None, "0.0001234"),
        (13_000_000, None, "13,000,000"),
        (1234.5, 100.0, "1,234 ± 100"),
        (-0.5, None, "-0.5000"),
    ],
)
def test_numbers_show_the_digits_that_the_spread_leaves(value, spread, text):
    assert number(value, spread) == text


# -- defects in a card ------------------------------------------------------------------------------------------------


DEFECTS = {
    "licence": (lambda text: text.replace("license: apache-2.0", "license: apache2"), "unknown license 'apache2'"),
    "language": (lambda text: text.replace("- en\n", "- english\n", 1), "'english' is not an ISO 639-1 code"),
    "unquoted no": (lambda text: text.replace("- en\n", "- no\n", 1), "must be quoted"),
    "no tag": (lambda text: text.replace("pipeline_tag: text-generation\n", ""), "`pipeline_tag` is missing"),
    "value in the index": (lambda text: re.sub(r"value: 1\.81\d+", "value: 1.2", text), "`held_out_bits` is 1.2"),
    "invented metric": (lambda text: text.replace("type: held_out_bits", "type: mmlu"), "`mmlu` is not in results"),
    "dropped metric": (lambda text: text.replace("type: parsed_share", "type: held_out_bits"), "`parsed_share` of"),
    "value in the table": (lambda text: text.replace("1.813 ± 0.015", "1.213 ± 0.015"), "the table is not"),
    "verdict in the table": (
        lambda text: text.replace("| 3 | holds |", "| 3 | fails |"),
        "the table",
    ),
    "broken YAML": (lambda text: text.replace("language:\n", "language: [\n", 1), "cannot be read"),
    "YAML list": (lambda text: "---\n- a\n---\n" + text.split("\n---\n", 1)[1], "cannot be read"),
    "nameless index": (lambda text: text.replace("- name: Sigma-MoE demo\n  results", "- results"), "cannot be read"),
    "no metadata": (lambda text: text.split("\n---\n", 1)[1], "`license` is missing"),
    "template phrase": (lambda text: text + "\n[More Information Needed]\n", "More Information Needed"),
    "template code": (lambda text: text + "\n{{ results }}\n", "template phrase"),
    "missing figure": (lambda text: text.replace("(figures/bits.png)", "(figures/gone.png)"), "image does not exist"),
    "missing html figure": (lambda text: text + '\n<img src="gone.png">\n', "image does not exist: gone.png"),
    "missing file": (lambda text: text + "\n[log](logs/x.txt)\n", "link does not exist"),
    "link outside": (lambda text: text + "\n[x](../../etc)\n", "leads out"),
    "script link": (lambda text: text + "\n[x](javascript:alert)\n", "neither https nor relative"),
    "absolute path": (lambda text: text + "\nsee /opt/someone/run\n", "absolute path: /opt/someone/run"),
    "windows path": (lambda text: text + "\nsee C:\\Users\\me\n", "absolute path"),
    "path in code": (lambda text: text + "\n```bash\ncd /data/x/y\n```\n", "absolute path: /data/x/y"),
    "python": (lambda text: text.replace("import hf_models ", "import import "), "does not parse"),
    "base model": (lambda text: text.replace("license: ", "base_model: a/b\nlicense: ", 1), "`base_model` is 'a/b'"),
    "fingerprint": (lambda text: text.replace("sha256:0f", "sha256:1f"), "fingerprint of the corpus"),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_in_the_card_is_caught(run, name):
    break_it, message = DEFECTS[name]
    text = build_card(run)
    broken = break_it(text)
    assert broken != text
    problems = check_card(broken, read_results(run), run)
    assert any(message in problem for problem in problems), problems


def test_the_folder_on_this_machine_is_refused_even_in_a_sample(run):
    text = build_card(run) + f"\n```text\n{run.resolve()}\n```\n"
    assert check_card(text, read_results(run), run) == [f"absolute path: {run.resolve()}"]


def test_all_problems_are_listed_at_once(run, capsys):
    (run / "figures/bits.png").unlink()
    results = read_results(run)
    results.data.language = ["english"]
    write_results(run, results)
    with pytest.raises(CardError, match=r"2 problem\(s\)") as error:
        build_card(run)
    assert "english" in str(error.value) and "figures/bits.png" in str(error.value)
    assert main([str(run)]) == 1 and "english" in capsys.readouterr().err
    assert not (run / "README.md").exists()


def test_check_names_what_was_edited_by_hand(run, capsys):
    assert main([str(run), "--repo-id", "org/x"]) == 0
    card = run / "README.md"
    card.write_text(card.read_text().replace("± 0.015", "± 0.001"))
    assert main(["--check", str(card)]) == 1
    assert "the table is not the one" in capsys.readouterr().out


# -- defects in a run folder ------------------------------------------------------------------------------------------


def without(key):
    config = deepcopy(CONFIG)
    del config[key]
    return json.dumps(config)


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "config.json does not exist"),
        ("{", "not valid JSON"),
        ("[]", "must hold an object"),
        (without("model_type"), "field `model_type` is missing"),
        (without("architectures"), "field `architectures` is missing"),
        (json.dumps({**CONFIG, "architectures": ["Something"]}), "'Something', which ends in none"),
    ],
)
def test_a_bad_config_is_named(run, content, message):
    (run / "config.json").unlink() if content is None else (run / "config.json").write_text(content)
    with pytest.raises(CardError, match=message):
        build_card(run)


def test_bad_input_on_the_command_line(run, tmp_path, capsys):
    assert main([str(tmp_path / "nowhere")]) == 2
    assert "results.json does not exist" in capsys.readouterr().err
    assert main([str(run), "--repo-id", "not an id"]) == 1
    assert "is not a Hub id" in capsys.readouterr().err
    assert main([str(run), "--template", str(tmp_path / "none.md")]) == 1
    assert "no template none.md" in capsys.readouterr().err
    assert main(["--check", str(run)]) == 1
    assert "build it with" in capsys.readouterr().err
    (run / "results.json").write_text("{")
    assert main([str(run)]) == 2
    assert "not valid JSON" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([])
    with pytest.raises(ResultsError):
        build_card(run)


def test_a_method_without_a_template_is_named(tmp_path):
    make_run(tmp_path, method="unheard_of")
    with pytest.raises(CardError, match="write model_cards/templates/unheard_of.md"):
        build_card(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ('{% extends "card.md" %}{% set license = "mit" %}{% set tags = [] %}', "short.md.*'summary' not found"),
        ("{% set license = 'mit' %}text", "short.md.*'tags'"),
        ("{{ reslts.title }}", "short.md.*'reslts' is undefined"),
        ("{% if %}", "short.md.*Expected an expression"),
    ],
)
def test_a_bad_template_is_refused(run, tmp_path, content, message):
    template = tmp_path / "short.md"
    with pytest.raises(CardError, match=message):
        template.write_text(content)
        build_card(run, template=template)


def test_measurements_without_weights_promise_none(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    assert "from_pretrained" in build_card(run)
    (run / "model.safetensors").unlink()
    text = build_card(run)
    assert "from_pretrained" not in text and "no weights" in text
