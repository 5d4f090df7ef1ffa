"""What a run measured, in one schema: `results.json`.

Every recipe writes this file at the end of a run and every model card is rendered from it, so a number that is not in
here is in no card. The schema is strict in both directions: an unknown or a missing field, NaN, and a verdict that
fewer than three seeds cannot carry are errors that name the file, the field and the remedy.
"""

import json
import math
import os
import platform
import re
import statistics
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .redaction import without_tokens


RESULTS_NAME = "results.json"
MIN_SEEDS_FOR_VERDICT = 3

Verdict = Literal["holds", "null", "fails"]


class ResultsError(ValueError):
    """A `results.json` that is absent, malformed or outside the schema; the message names file, field and remedy."""


@dataclass(kw_only=True)
class Metric:
    """One measured quantity.

    Args:
        value (`float`): the mean over `n` runs, in `unit`.
        spread (`float`, *optional*): sample standard deviation over the runs, in `unit`; None for a single run.
        n (`int`): number of runs (seeds, or A/B blocks for a timing) behind `value`.
        unit (`str`): such as `"bits/character"`; empty for a pure number.
        higher_is_better (`bool`, *optional*): None where neither direction is better.
        baseline (`dict[str, Metric]`): the same quantity for each baseline, by name; a baseline's own `verdict` is the
            verdict of this metric against that baseline. Baselines have no baselines.
        verdict (`str`, *optional*): `"holds"`, `"null"` or `"fails"`, see [`verdict`]; None where nothing was claimed.
        note (`str`): what a reader must know to read the number rightly.
        values (`list[float]`): the single runs in the order of the seeds, where they are kept.
    """

    value: float
    spread: float | None = None
    n: int = 1
    unit: str = ""
    higher_is_better: bool | None = None
    baseline: dict[str, "Metric"] = field(default_factory=dict)
    verdict: Verdict | None = None
    note: str = ""
    values: list[float] = field(default_factory=list)


@dataclass(kw_only=True)
class Data:
    """What the model was trained and measured on.

    Args:
        name (`str`): for people, such as `"Python 3.11 standard library sources"`.
        fingerprint (`str`): hash of the corpus as it was used.
        license (`str`): licence of the data, an SPDX identifier where there is one (`"PSF-2.0"`).
        language (`list[str]`): ISO 639-1 codes, or the Hub's `"code"` and `"multilingual"`.
        hub_id (`str`, *optional*): dataset id on the Hub; None for data that does not come from there.
        note (`str`): how the text was selected, split, deduplicated.
    """

    name: str
    fingerprint: str
    license: str
    language: list[str]
    hub_id: str | None = None
    note: str = ""


@dataclass(kw_only=True)
class Model:
    """Sizes of the trained model, in parameters, and the Hub id of the model that it started from, if any.

    `parameters_active` counts what one token passes through, without embeddings and output head where `note` says so.
    """

    parameters_total: int
    parameters_active: int
    parameters_non_embedding: int
    base: str | None = None
    note: str = ""


@dataclass(kw_only=True)
class FigureFile:
    """A figure of the run: `path` relative to the run folder, `/` as separator."""

    path: str
    caption: str


@dataclass(kw_only=True)
class Sample:
    """Text that the model wrote after `prompt`; untrusted, so cards escape it."""

    prompt: str
    completion: str
    note: str = ""


@dataclass(kw_only=True)
class Results:
    """Everything a card may say about a run.

    Args:
        method (`str`): module-like name (`"sigma_moe"`); names the card's template and the committed evidence.
        title (`str`): heading of the card.
        preset (`str`): preset of the recipe (`"demo"`, `"evidence"`, `"paper"`).
        seeds (`list[int]`): every seed that was run, also those that failed.
        command (`str`): see `trainers.redaction.command_line`.
        device (`str`): see [`device_name`].
        versions (`dict[str, str]`): see [`collect_versions`].
        wall_seconds (`float`): the whole run, start-up included.
        metrics (`dict[str, Metric]`): by snake_case name.
        evidence (`dict[str, Any]`): what was fixed before any result was seen: parameters, tokens, learning-rate
            grid, number of trials; any JSON values.
    """

    method: str
    title: str
    preset: str
    seeds: list[int]
    command: str
    device: str
    versions: dict[str, str]
    wall_seconds: float
    metrics: dict[str, Metric]
    evidence: dict[str, Any]
    data: Data
    model: Model
    figures: list[FigureFile] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


# Statistics


def summarise(
    values: Sequence[float], *, unit: str = "", higher_is_better: bool | None = None, note: str = ""
) -> Metric:
    """Mean, sample standard deviation and count of the runs in `values`; the spread of a single run is None.

    Raises:
        ValueError: `values` is empty or holds NaN or an infinity.
    """
    runs = _finite(values, "values")
    return Metric(
        value=statistics.fmean(runs),
        spread=statistics.stdev(runs) if len(runs) > 1 else None,
        n=len(runs),
        unit=unit,
        higher_is_better=higher_is_better,
        note=note,
        values=runs,
    )


def verdict(ours: Sequence[float], baseline: Sequence[float], higher_is_better: bool) -> Verdict:
    r"""Whether `ours` beats `baseline` over paired seeds: `ours[i]` and `baseline[i]` share seed, data and order.

    With the improvements \\(d_i\\) (signed so that positive is better), their mean \\(m\\), sample standard deviation
    \\(s\\) and \\(t\\) the 97.5 % quantile of Student's t with n - 1 degrees of freedom, the 95 % interval is
    \\(m \pm t s / \sqrt{n}\\). The verdict is

    - `"holds"` if the whole interval lies above zero,
    - `"fails"` if the whole interval lies below zero,
    - `"null"` otherwise, and always for fewer than three pairs: two points have an interval (t = 12.7) that says
      nothing, one has none.

    Raises:
        ValueError: the lists are empty, differ in length, or hold NaN or an infinity.
    """
    ours, baseline = _finite(ours, "ours"), _finite(baseline, "baseline")
    if len(ours) != len(baseline):
        raise ValueError(f"Paired seeds expected, got {len(ours)} values of ours and {len(baseline)} of the baseline.")
    n = len(ours)
    if n < MIN_SEEDS_FOR_VERDICT:
        return "null"
    sign = 1.0 if higher_is_better else -1.0
    gains = [sign * (a - b) for a, b in zip(ours, baseline)]
    centre = statistics.fmean(gains)
    margin = _t_quantile(n - 1) * statistics.stdev(gains) / math.sqrt(n)
    if centre - margin > 0:
        return "holds"
    if centre + margin < 0:
        return "fails"
    return "null"


def _t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """The t with P(|T| < t) = `confidence` for Student's T with a whole number of degrees of freedom.

    P is the finite trigonometric sum of Abramowitz and Stegun 26.7.3 and 26.7.4, inverted by bisection.
    """
    low, high = 0.0, math.pi / 2  # theta = atan(t / sqrt(freedom))
    for _ in range(60):
        theta = (low + high) / 2
        odd = freedom % 2
        term, total = math.cos(theta) if odd else 1.0, 0.0
        for k in range(2 + odd, freedom + 1, 2):
            total += term
            term *= (k - 1) / k * math.cos(theta) ** 2
        inside = math.sin(theta) * total
        if odd:
            inside = 2 / math.pi * (theta + inside)
        low, high = (theta, high) if inside < confidence else (low, theta)
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _finite(values: Sequence[float], name: str) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError(f"`{name}` is empty: at least one run is needed.")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"`{name}` holds NaN or an infinity: {numbers}. Report a diverged run in a note instead.")
    return numbers


# Where and how it ran


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that decide what a run computes; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "datasets", "huggingface_hub", "hf-sigma"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def device_name() -> str:
    """The hardware in words, such as `"8 x NVIDIA H200"` or `"Intel Xeon Gold 6448Y, 2 threads"`.

    The count is the number of processes of the run (`WORLD_SIZE`), not of the devices that the machine has.
    """
    import torch  # here, so that cards can be built where torch is not installed

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return name if processes == 1 else f"{processes} x {name}"


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


# The file


def write_results(folder: str | os.PathLike, results: Results) -> Path:
    """Validates `results` and writes `folder/results.json`; what is shaped like an access token is redacted.

    Raises:
        ResultsError: a value outside the schema, NaN and infinities included; the old file stays.
        OSError: no such folder, no permission, disk full; the old file stays.
    """
    path = Path(folder) / RESULTS_NAME
    payload = asdict(results)
    _validate(_parse(Results, payload, "", path), path)
    # ASCII, because generated text may hold lone surrogates, which UTF-8 cannot encode
    text = json.dumps(payload, indent=2, allow_nan=False) + "\n"
    write_text_atomically(path, without_tokens(text))
    return path


def read_results(folder: str | os.PathLike) -> Results:
    """Reads and validates `folder/results.json`.

    Raises:
        ResultsError: the file is absent, is not JSON, or is outside the schema.
    """
    path = Path(folder) / RESULTS_NAME
    try:
        payload = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(
            f"{path} does not exist: {folder} is not the folder of a finished run. Give the --output_dir of a recipe, "
            "or run the recipe again with the same command: it resumes and writes the file at its end."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{path} is not valid JSON ({error}). It was edited or cut off: run the recipe's last step again."
        ) from error
    results = _parse(Results, payload, "", path)
    _validate(results, path)
    return results


def write_text_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path` as a whole or not at all: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: with a message that names the file and the remedy; the old file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        raise OSError(
            error.errno,
            f"Cannot write {path.name} ({reason}); an earlier version is untouched. Free space on the disk, or "
            "choose a folder that exists and that you may write to",
            str(path),
        ) from error


def _validate(results: Results, path: Path) -> None:
    """What types alone don't say."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", results.method):
        raise ResultsError(f"{path}: field `method` must be a lower-case module name, got {results.method!r}.")
    if not results.seeds:
        raise ResultsError(f"{path}: field `seeds` is empty; name the seed of the run.")
    for index, figure in enumerate(results.figures):
        parts = PurePosixPath(figure.path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in figure.path or ":" in figure.path:
            raise ResultsError(
                f"{path}: field `figures[{index}].path` must be relative to the run folder, got {figure.path!r}."
            )
    for name, metric in results.metrics.items():
        _validate_metric(metric, f"metrics.{name}", path)
        for other, baseline in metric.baseline.items():
            _validate_metric(baseline, f"metrics.{name}.baseline.{other}", path)
            if baseline.baseline:
                raise ResultsError(f"{path}: field `metrics.{name}.baseline.{other}.baseline` must be empty.")


def _validate_metric(metric: Metric, where: str, path: Path) -> None:
    if metric.n < 1:
        raise ResultsError(f"{path}: field `{where}.n` must be at least 1, got {metric.n}.")
    if metric.spread is not None and metric.spread < 0:
        raise ResultsError(f"{path}: field `{where}.spread` must not be negative, got {metric.spread}.")
    if metric.verdict in ("holds", "fails") and metric.n < MIN_SEEDS_FOR_VERDICT:
        raise ResultsError(
            f"{path}: field `{where}.verdict` says {metric.verdict!r} on n = {metric.n}; fewer than "
            f"{MIN_SEEDS_FOR_VERDICT} runs carry no verdict but 'null'. Run more seeds, or drop the verdict."
        )
    if metric.values:
        mean = statistics.fmean(metric.values)
        if metric.n != len(metric.values) or not math.isclose(mean, metric.value, rel_tol=1e-9, abs_tol=1e-12):
            raise ResultsError(
                f"{path}: field `{where}.values` has {len(metric.values)} entries with mean {mean}, which does not "
                f"match n = {metric.n} and value = {metric.value}. Build metrics with `summarise`."
            )


def _parse(kind: Any, value: Any, where: str, path: Path) -> Any:
    """`value` as `kind` (a dataclass, list, dict, union, literal or scalar type), or a ResultsError naming `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if is_dataclass(kind):
        return _parse_dataclass(kind, value, where, path)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        return _parse(next(option for option in arguments if option is not type(None)), value, where, path)
    if origin is Literal:
        if value not in arguments:
            raise ResultsError(f"{path}: field `{where}` must be one of {list(arguments)}, got {value!r}.")
        return value
    if kind is Any:
        kind = type(value) if type(value) in (dict, list, str, int, float, bool, type(None)) else None
        origin, arguments = kind, {dict: (str, Any), list: (Any,)}.get(kind, ())
    if origin is dict and isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _parse(arguments[1], item, f"{where}.{key}", path) for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, f"{where}[{index}]", path) for index, item in enumerate(value)]
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ResultsError(
                f"{path}: field `{where}` is {value}, which JSON has no word for. Leave a diverged run out of the "
                "metric and say so in its `note`."
            )
        return value
    if kind in (str, int, bool, type(None)) and isinstance(value, kind) and (kind is bool or type(value) is not bool):
        return value
    expected = "a JSON value" if kind is None else getattr(origin or kind, "__name__", str(kind))
    raise ResultsError(f"{path}: field `{where or 'top level'}` must be {expected}, got {type(value).__name__}.")


def _parse_dataclass(kind: type, value: Any, where: str, path: Path) -> Any:
    if not isinstance(value, dict):
        raise ResultsError(f"{path}: field `{where or 'top level'}` must be an object, got {type(value).__name__}.")
    prefix = f"{where}." if where else ""
    known = {item.name: item for item in fields(kind)}
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ResultsError(
            f"{path}: unknown field `{prefix}{unknown[0]}`; known are {sorted(known)}. The file was edited or a "
            "newer hf-sigma wrote it: update hf-sigma, or remove the field."
        )
    missing = [
        name
        for name, item in known.items()
        if name not in value and item.default is MISSING and item.default_factory is MISSING
    ]
    if missing:
        raise ResultsError(f"{path}: missing field `{prefix}{missing[0]}`; run the recipe's last step again.")
    hints = typing.get_type_hints(kind)
    return kind(**{name: _parse(hints[name], item, f"{prefix}{name}", path) for name, item in value.items()})
