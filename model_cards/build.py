"""The card of a run: `results.json`, `config.json` and the figures of a run folder, rendered into its `README.md`.

    python -m model_cards.build RUN [--repo-id ORG/NAME] [--output README.md]
    python -m model_cards.build --check RUN

A method has one template, `templates/<method>.md`, that extends `templates/card.md` and holds only what is the
method's own: summary, what of the paper is not reproduced, limitations, citation. Where `model_cards/<method>/` holds
the committed results of a comparison, or the compatibility table that the tests wrote, the card shows them beside what
the run measured.
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from markupsafe import Markup

from model_cards.compatibility import COMMAND, CompatibilityError, compatibility_table, read_compatibility
from model_cards.markdown import fence, inline, label, measured_on, number, results_table, visible
from model_cards.metadata import check_card
from trainers.report import RESULTS_NAME, FigureFile, Results, ResultsError, read_results, write_text_atomically


PACKAGE = Path(__file__).parent
TEMPLATES = PACKAGE / "templates"
CARD_NAME = "README.md"
OLDEST_TRANSFORMERS = "5.18"  # as in pyproject.toml, which is not there once the package is installed

# by the last part of the class that config.json names; `Model` last, every other name may end so
TASKS = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSentenceEmbedding": ("AutoModelForTextEncoding", "sentence-similarity"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForCtrPrediction": ("AutoModelForSequenceClassification", "tabular-classification"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),  # GPT-2
    "Model": ("AutoModel", "feature-extraction"),
}


class CardError(ValueError):
    """A card that cannot be built, or that would say something wrong; the message lists every problem."""


@dataclass(kw_only=True)
class Evidence:
    """The committed comparison of a method, its figures as they lie in the run folder of the card."""

    results: Results
    figures: list[FigureFile]


def build_card(run_folder: str | Path, *, template: str | Path | None = None, repo_id: str | None = None) -> str:
    """The checked text of the card of `run_folder`; two builds of the same files give the same bytes.

    The figures of the method's committed evidence are copied into `run_folder/figures`, so that a published folder
    is complete.

    Args:
        run_folder (`str` or `Path`): folder with `results.json`, `config.json` and the figures.
        template (`str` or `Path`, *optional*): template file that extends `card.md`; by default that of the method.
        repo_id (`str`, *optional*): Hub id for the examples; by default they load the folder.

    Raises:
        ResultsError: `results.json` is absent, malformed or outside the schema.
        CompatibilityError: the method's `compatibility.json` is malformed or outside the schema.
        CardError: no or a malformed `config.json`, no template, a bad `repo_id`, or a card that fails its check.
    """
    run_folder = Path(run_folder)
    results = read_results(run_folder)
    config = _read_config(run_folder)
    auto_class, pipeline_tag = _task(config, run_folder)
    if repo_id is not None:
        try:
            validate_repo_id(repo_id)
        except HFValidationError as error:
            raise CardError(f"--repo-id {repo_id!r} is not a Hub id: {error}") from error
    body, license_id, tags = _render(
        _template_path(results.method, template),
        results=results,
        auto_class=auto_class,
        pipeline_tag=pipeline_tag,
        model_id=Markup(json.dumps(repo_id or _folder_id(run_folder))),  # a Python string, quotes included
        has_weights=any(run_folder.glob("*.safetensors")),
        config=config,
        details=_details(config, results),
        evidence=_evidence(results, run_folder),
        compatibility=read_compatibility(PACKAGE / results.method),
    )
    data = ModelCardData(
        language=results.data.language,
        license=license_id,
        library_name="transformers",
        pipeline_tag=pipeline_tag,
        tags=[config["model_type"], *tags, "hf-sigma"],
        datasets=[results.data.hub_id] if results.data.hub_id else None,
        base_model=results.model.base,
        model_name=repo_id.split("/")[-1] if repo_id else _one_line(results.title),
        eval_results=_eval_results(results, pipeline_tag),
    )
    frame = "---\n{{ card_data }}\n---\n\n{{ body }}\n"
    text = str(ModelCard.from_template(data, template_str=frame, body=body)).rstrip() + "\n"
    problems = check_card(text, results, run_folder)
    if problems:
        raise CardError(listed(f"The card of {run_folder} has {len(problems)} problem(s)", problems))
    return text


def _read_config(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CardError(f"{path} does not exist: save the model with `save_pretrained` into the run folder.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CardError(f"{path} is not valid JSON ({error}): save the model again.") from error
    if not isinstance(config, dict):
        raise CardError(f"{path} must hold an object, got {type(config).__name__}: save the model again.")
    for key, kind in (("model_type", str), ("architectures", list)):
        if not isinstance(config.get(key), kind) or not config[key]:
            raise CardError(f"{path}: field `{key}` is missing or empty: save the model with `save_pretrained`.")
    return config


def _task(config: dict[str, Any], run_folder: Path) -> tuple[str, str]:
    architecture = str(config["architectures"][0])
    for ending, task in TASKS.items():
        if architecture.endswith(ending):
            return task
    raise CardError(
        f"{run_folder / 'config.json'}: field `architectures` names {architecture!r}, which ends in none of "
        f"{', '.join(TASKS)}. Save a model with a head that the Auto classes know."
    )


def _folder_id(run_folder: Path) -> str:
    """What to give to `from_pretrained`: the path as it was typed, unless that shows where the machine keeps it."""
    hidden = run_folder.is_absolute() or ".." in run_folder.parts or run_folder == Path(".")
    return run_folder.resolve().name if hidden else run_folder.as_posix()


def _template_path(method: str, template: str | Path | None) -> Path:
    path = Path(template) if template is not None else TEMPLATES / f"{method}.md"
    if not path.is_file():
        raise CardError(
            f"There is no template {path.name} for the method {method!r}: write model_cards/templates/{method}.md, "
            "which extends card.md, or give --template."
        )
    return path


def _render(path: Path, **variables: Any) -> tuple[str, str, list[str]]:
    """The body of the card, and the `license` and `tags` that the template sets."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([path.parent, TEMPLATES]),
        # every value passes `inline` on its way out, unless it is Markup already
        autoescape=True,
        finalize=inline,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"compatibility_command": COMMAND, "oldest_transformers": OLDEST_TRANSFORMERS}
    environment.filters |= {
        "compatibility_table": compatibility_table,
        "fence": fence,
        "label": label,
        "number": number,
        "setting": _setting,
        "table": results_table,
        "url": _url,
    }
    try:
        module = environment.get_template(path.name).make_module(variables)
        return str(module).strip(), module.license, module.tags
    except (jinja2.TemplateError, AttributeError) as error:
        raise CardError(f"The template {path.name} cannot be rendered: {error}") from error


def _evidence(results: Results, run_folder: Path) -> Evidence | None:
    folder = PACKAGE / results.method
    if not (folder / RESULTS_NAME).exists():
        return None
    committed = read_results(folder)
    if committed == results:
        return None
    figures = []
    for figure in committed.figures:
        name = "figures/evidence_" + Path(figure.path).name
        (run_folder / "figures").mkdir(exist_ok=True)
        shutil.copyfile(folder / figure.path, run_folder / name)
        figures.append(FigureFile(path=name, caption=figure.caption))
    return Evidence(results=committed, figures=figures)


def _details(config: dict[str, Any], results: Results) -> list[tuple[str, str]]:
    """Rows of the table of model details; what a configuration has no field for has no row."""
    rows = [
        ("Parameters, total", f"{results.model.parameters_total:,}"),
        ("Parameters, active per token", f"{results.model.parameters_active:,}"),
        ("Parameters, without embeddings", f"{results.model.parameters_non_embedding:,}"),
        ("Layers", config.get("num_hidden_layers")),
        ("Hidden size", config.get("hidden_size")),
        ("Attention heads (Q / KV)", _heads(config)),
        ("Experts per layer", config.get("num_experts")),
        ("Active experts per layer", _active_experts(config)),
        ("Active experts in training", _drawn_experts(config)),
        ("Neurons of an active expert that a token uses", _neurons(config)),
        ("Depths that it can be cut to (layers)", _listed(config.get("mrl_layers"))),
        ("Widths that it can be cut to (entries)", _listed(config.get("mrl_dims"))),
        ("Vocabulary", config.get("vocab_size")),
        ("Context length (tokens)", config.get("max_position_embeddings")),
    ]
    return [
        (name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in rows if value is not None
    ]


def _listed(values: list[int] | None) -> str | None:
    return None if values is None else ", ".join(map(str, values))


def _heads(config: dict[str, Any]) -> str | None:
    queries = config.get("num_attention_heads")
    return None if queries is None else f"{queries} / {config.get('num_key_value_heads') or queries}"


def _active_experts(config: dict[str, Any]) -> str | None:
    """Such as `"1"`, or `"8 (layers 0-1), 6 (layer 2), 1 (layers 3-55)"`."""
    active = config.get("num_experts_per_tok_per_layer")
    if not active or len(set(active)) == 1:
        active = active[0] if active else config.get("num_experts_per_tok")
        return None if active is None else str(active)
    starts = [layer for layer, k in enumerate(active) if layer == 0 or k != active[layer - 1]]
    runs = zip(starts, [*starts[1:], len(active)])
    return ", ".join(
        f"{active[start]} (layer {start})" if end == start + 1 else f"{active[start]} (layers {start}-{end - 1})"
        for start, end in runs
    )


def _drawn_experts(config: dict[str, Any]) -> str | None:
    """Of a model that was trained with numbers that were drawn anew."""
    mode = config.get("k_sampling")
    if not mode or mode == "none":
        return None
    each = {"layer": "layer of each micro-batch", "micro_batch": "micro-batch", "global_batch": "optimizer step"}
    low, high = config.get("k_min") or 1, config.get("k_max") or config.get("num_experts_per_tok")
    return f"{low} to {high}, drawn for each {each.get(mode, mode)}"


def _neurons(config: dict[str, Any]) -> str | None:
    """Such as `"64 of 128"`, or a list of shares, one a layer."""
    width, top_k, ratio = (config.get(name) for name in ("moe_intermediate_size", "neuron_top_k", "neuron_ratio"))
    if top_k is None and ratio is None:
        return None
    if top_k is None and isinstance(width, int) and isinstance(ratio, (int, float)):
        top_k = max(1, round(ratio * width))
    if isinstance(top_k, int) and width:
        return f"{min(top_k, width):,} of {width:,}"
    kind, kept = ("neurons", top_k) if top_k is not None else ("share", ratio)
    return f"{', '.join(map(str, kept))} ({kind}, one a layer)" if isinstance(kept, list) else str(kept)


def _eval_results(results: Results, task_type: str) -> list[EvalResult]:
    return [
        EvalResult(
            task_type=task_type,
            dataset_type=results.data.hub_id or ("imagefolder" if task_type.startswith("image-") else "text"),
            dataset_name=_one_line(results.data.name),
            metric_type=name,
            metric_name=f"{_one_line(label(name))} ({_one_line(metric.unit) or 'no unit'}, n = {metric.n})",
            metric_value=metric.value,
        )
        for name, metric in results.metrics.items()
        if name not in measured_on(results)  # the Hub would take them for this model's
    ]


def _url(path: str) -> Markup:
    return Markup(quote(path))


def _setting(value: Any) -> str:
    """A value of `evidence` for people."""
    if isinstance(value, list):
        return ", ".join(map(_setting, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _one_line(text: str) -> str:
    return " ".join(visible(text).split())


def listed(heading: str, problems: list[str]) -> str:
    """A message of several problems, a line each."""
    return "\n".join([f"{heading}:", *(f"  - {problem}" for problem in problems)])


def _check(path: Path) -> int:
    card = path / CARD_NAME if path.is_dir() else path
    if not card.is_file():
        raise CardError(f"{card} does not exist: build it with `python -m model_cards.build {card.parent}`.")
    problems = check_card(card.read_text(encoding="utf-8"), read_results(card.parent), card.parent)
    print(listed(f"{card}: {len(problems)} problem(s)", problems) if problems else f"{card}: nothing found")
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, 1 for a card that fails its check, 2 for what cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.build", description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="folder of a finished run")
    parser.add_argument("--repo-id", metavar="ORG/NAME", help="Hub id for the examples of the card")
    parser.add_argument("--template", type=Path, help="template file instead of the method's")
    parser.add_argument("--output", default=CARD_NAME, help="file name inside RUN (default: %(default)s)")
    parser.add_argument("--check", type=Path, metavar="PATH", help="check the card of a run folder, or this card file")
    arguments = parser.parse_args(argv)
    if (arguments.run is None) == (arguments.check is None):
        parser.error("give either RUN or --check PATH")
    try:
        if arguments.check is not None:
            return _check(arguments.check)
        output = arguments.run / arguments.output
        text = build_card(arguments.run, template=arguments.template, repo_id=arguments.repo_id)
        write_text_atomically(output, text)
    except (CardError, CompatibilityError, ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CardError) else 2
    print(output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
