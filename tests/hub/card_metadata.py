"""The YAML block at the top of a README, checked as far as the Hub's own checks are known.

Known are: the licences, the form of language codes and of the ids of models and datasets, and what a `model-index`
must hold. What else the Hub may refuse passes here.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml


FRONT_MATTER = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n)?^---[ \t]*\r?$", flags=re.DOTALL | re.MULTILINE)
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")
REPO_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
LICENSES = set(
    """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
    afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
    cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0
    lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl
    openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
    """.split()
)
# Key -> (the values that are allowed, or their form; what the error says)
VALUES: dict[str, tuple[set[str] | re.Pattern, str]] = {
    "license": (LICENSES, "must be one of the Hub's license identifiers"),
    "language": (LANGUAGE, "must be an ISO 639-1, 639-2 or 639-3 code, or `code` or `multilingual`"),
    "base_model": (REPO_ID, "is not valid. Use a model id from https://hf.co/models."),
    "datasets": (REPO_ID, "is not valid. If possible, use a dataset id from https://hf.co/datasets."),
}
ARRAYS = ("tags", "widget", "model-index")


def read(text: str) -> dict | None:
    """The metadata; None without a block. Raises `ValueError` if it is no mapping, `yaml.YAMLError` if no YAML."""
    block = FRONT_MATTER.match(text)
    if block is None:
        return None
    data = yaml.safe_load(block[1])
    if data is not None and not isinstance(data, dict):
        raise ValueError("the metadata block must be a mapping")
    return data or None


def review(text: str, kind: str = "model") -> tuple[list[str], list[str]]:
    """Errors, warnings."""
    try:
        data = read(text)
    except (yaml.YAMLError, ValueError) as error:
        return [f"YAML metadata error: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [f'"{key}" must be an array' for key in ARRAYS if not isinstance(data.get(key, []), list)]
    for key in VALUES if kind == "model" else ("license", "language"):
        errors += wrong_values(key, data.get(key))
    if kind == "model" and isinstance(data.get("model-index"), list):
        errors += wrong_results(data["model-index"])
    return errors, []


def wrong_values(key: str, value: Any) -> Iterator[str]:
    allowed, message = VALUES[key]
    for index, item in enumerate(value if isinstance(value, list) else [value] if value is not None else []):
        place = f"{key}[{index}]" if isinstance(value, list) else key
        if not isinstance(item, str):
            yield f'"{place}" must be a string'
        elif item not in allowed if isinstance(allowed, set) else not allowed.fullmatch(item):
            yield f'"{place}" with value "{item}" {message}'


def wrong_results(models: list) -> Iterator[str]:
    """Every model of a `model-index` has a name, every result a task, a dataset and metrics."""
    for number, model in enumerate(models):
        place = f"model-index[{number}]"
        yield from missing(model, place, "name", str)
        yield from missing(model, place, "results", list)
        results = model.get("results") if isinstance(model, dict) else None
        for index, result in enumerate(results if isinstance(results, list) else []):
            where = f"{place}.results[{index}]"
            for part, names in {"task": ("type",), "dataset": ("type", "name")}.items():
                yield from missing(result, where, part, dict)
                for name in names if isinstance(result, dict) and isinstance(result.get(part), dict) else ():
                    yield from missing(result[part], f"{where}.{part}", name, str)
            yield from missing(result, where, "metrics", list)
            metrics = result.get("metrics") if isinstance(result, dict) else None
            for position, metric in enumerate(metrics if isinstance(metrics, list) else []):
                yield from missing(metric, f"{where}.metrics[{position}]", "type", str)
                yield from missing(metric, f"{where}.metrics[{position}]", "value", object)


def missing(holder: Any, place: str, name: str, kind: type) -> Iterator[str]:
    if not isinstance(holder, dict) or holder.get(name) is None:
        yield f'"{place}.{name}" is required'
    elif not isinstance(holder[name], kind):
        yield f'"{place}.{name}" must be a {kind.__name__}'
