"""What of a run folder may leave the machine: an allow-list by name, and a look at the content of every file on it.

A run folder holds more than a repository should: `training_args.bin`, a pickle with the Hub token in clear, optimizer
states, logs, paths of the machine. What is not known to belong to a repository stays, whatever it is.
"""

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_models.moe.checkpoint_files import checkpoint_file, read_headers
from model_cards.build import CARD_NAME, TASKS, build_card, listed
from model_cards.inspection import machine_roots, not_what_its_name_says, safetensors_header, secrets_and_paths
from trainers.redaction import environment_secrets
from trainers.report import RESULTS_NAME, read_results


# Lists what was published, so that the next publication knows what it may delete: nothing of the owner's own.
MANIFEST_NAME = "published_files.json"
JSON_FILES = (
    *("config.json", "generation_config.json", RESULTS_NAME),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("preprocessor_config.json", "processor_config.json"),
    "user_design.json",  # of anonymous user embeddings: what devices draw with; public, of nobody
)
TEXT_FILES = ("chat_template.jinja", "merges.txt", "vocab.txt")
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt")
TEXT_TASKS = ("text-generation", "text-classification", "token-classification", "fill-mask", "feature-extraction")

_FIGURE = re.compile(r"figures/[\w.\-]+\.png")
_RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", flags=re.MULTILINE)


class PublishError(ValueError):
    """A run that is not fit to be published, or a Hub that did not take it; the message lists every problem."""


@dataclass(frozen=True, kw_only=True)
class Publication:
    """What goes into the commit, by its path in the repository: small files as they were checked, weights as files.
    `left_here` are the names in the run folder that do not go."""

    model_type: str
    contents: dict[str, bytes]
    weights: dict[str, Path]
    stamps: dict[str, tuple]
    left_here: list[str]

    def check_unchanged(self) -> None:
        """Raise `PublishError` if weights changed since they were checked: a run that still trains writes them."""
        changed = [name for name, path in self.weights.items() if _stamp(path) != self.stamps[name]]
        if changed:
            raise PublishError(f"{changed[0]} changed while it was being published: let the run finish first.")

    def sizes(self) -> dict[str, int]:
        """Bytes of each file, by path."""
        sizes = {name: len(content) for name, content in self.contents.items()}
        return dict(sorted((sizes | {name: path.stat().st_size for name, path in self.weights.items()}).items()))


def collect(run: str | Path, repo_id: str) -> Publication:
    """Everything of the run folder `run` that belongs into the repository `repo_id`, checked; nothing is written.

    The card is built anew for `repo_id` from `results.json`; weights are the shards that the index names, code is what
    `auto_map` reaches.

    Raises:
        PublishError: a file that is missing, is not what its name says, is a link, or holds a secret or a path of
            this machine; the message names them all.
        ResultsError, CardError: the run has no results, or no card can be made of them.
    """
    run = Path(run)
    results = read_results(run)
    try:
        weights = {name: checkpoint_file(run, name) for name in read_headers(run)}
    except (ValueError, FileNotFoundError) as error:
        raise PublishError(f"The weights of {run} cannot be published: {error}") from error
    names = [name for name in (*JSON_FILES, *TEXT_FILES, SAFE_WEIGHTS_INDEX_NAME) if (run / name).exists()]
    contents, problems = {}, []
    for figure in results.figures:
        if _FIGURE.fullmatch(figure.path):
            names.append(figure.path)
        else:
            problems.append(f"{figure.path} of results.json is no figure: those are PNG files in figures/")
    for name in names:
        _take(run, name, contents, problems)
    config = _json(contents.get("config.json"))
    for name in _code_files(run, config, problems):
        _take(run, name, contents, problems)
    problems += _missing(config, contents)
    if problems:
        raise PublishError(listed(f"{run} is not fit to be published", problems))

    contents |= _card_and_its_figures(contents, weights, repo_id)
    contents[MANIFEST_NAME] = _manifest([*contents, *weights, MANIFEST_NAME])
    problems = [*_unsafe(run, contents, weights)]
    if problems:
        raise PublishError(listed(f"{run} holds what must not be published", problems))
    going = {name.split("/")[0] for name in (*contents, *weights)}
    left = [path.name + "/" * path.is_dir() for path in sorted(run.iterdir()) if path.name not in going]
    return Publication(
        model_type=config["model_type"],
        contents=contents,
        weights=weights,
        stamps={name: _stamp(path) for name, path in weights.items()},
        left_here=left,
    )


def _take(run: Path, name: str, contents: dict[str, bytes], problems: list[str]) -> None:
    path = run / name
    if path.is_symlink() or not path.resolve().is_relative_to(run.resolve()):
        problems.append(f"{name} is a link, or lies behind one: replace it by the file that it leads to")
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        problems.append(f"{name} cannot be read ({error.strerror}): run the recipe's last step again")
        return
    if wrong := not_what_its_name_says(name, content):
        problems.append(f"{name} {wrong}: save it again")
    contents[name] = content


def _json(content: bytes | None) -> dict:
    try:
        value = json.loads(content or b"{}")
    except (ValueError, RecursionError):
        value = {}
    return value if isinstance(value, dict) else {}


def _code_files(run: Path, config: dict, problems: list[str]) -> list[str]:
    """The modules that `auto_map` names and, through relative imports, all that they need."""
    auto_map = config.get("auto_map") or {}
    if not isinstance(auto_map, dict) or not isinstance(config.get("model_type"), str):
        problems.append("config.json has a malformed auto_map or model_type: save the model again")
        return []
    if not auto_map and config["model_type"] not in CONFIG_MAPPING_NAMES:
        problems.append(
            f"config.json has no auto_map, and transformers does not know model_type={config['model_type']!r}: "
            "nobody could load the repository. Save the model with the `save_pretrained` of hf_models"
        )
    queue, found = [], []
    for auto_class, reference in auto_map.items():
        if not isinstance(reference, str) or not re.fullmatch(r"\w+\.\w+", reference):
            problems.append(
                f"config.json: auto_map has {reference!r} for {auto_class}, which is not MODULE.CLASS of this folder"
            )
            continue
        queue.append(reference.split(".")[0] + ".py")
    while queue:
        name = queue.pop()
        if name in found:
            continue
        if not (run / name).is_file():
            problems.append(f"{name} is missing, which auto_map or an import of its code names: save the model again")
            continue
        found.append(name)
        text = (run / name).read_text(encoding="utf-8", errors="replace")
        queue += [f"{module}.py" for module in _RELATIVE_IMPORT.findall(text)]
    return sorted(found)


def _missing(config: dict, contents: dict[str, bytes]) -> Iterator[str]:
    if "config.json" not in contents:
        yield "config.json is missing: save the model with `save_pretrained` into the run folder"
        return
    architecture = str((config.get("architectures") or [""])[0])
    task = next((task for ending, (_, task) in TASKS.items() if architecture.endswith(ending)), None)
    if task in TEXT_TASKS and not any(name in contents for name in TOKENIZER_FILES):
        yield (
            f"there is no tokenizer (none of {', '.join(TOKENIZER_FILES)}), and a {task} model is of no use without: "
            "save it beside the model with `tokenizer.save_pretrained`"
        )


def _card_and_its_figures(contents: dict[str, bytes], weights: dict[str, Path], repo_id: str) -> dict[str, bytes]:
    """Built in a folder of its own: the run stays as it is, and nothing but what goes can get into the card."""
    with tempfile.TemporaryDirectory() as folder:
        staging = Path(folder)
        for name, content in contents.items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
        for name in weights:
            (staging / name).touch()  # the card asks only whether there are any
        card = build_card(staging, repo_id=repo_id)
        figures = {path.relative_to(staging).as_posix(): path.read_bytes() for path in staging.glob("figures/*.png")}
    return {CARD_NAME: card.encode()} | figures


def _unsafe(run: Path, contents: dict[str, bytes], weights: dict[str, Path]) -> Iterator[str]:
    secrets = {secret for secret in (get_token(), *environment_secrets()) if secret}
    roots = machine_roots(run.absolute(), run.resolve(), Path.cwd())
    headers = {name: safetensors_header(path) for name, path in weights.items()}
    for name, content in sorted((contents | headers).items()):
        yield from (f"{name} {what}" for what in secrets_and_paths(name, content, secrets=secrets, roots=roots))


def _stamp(path: Path) -> tuple:
    status = path.lstat()
    return status.st_ino, status.st_mode, status.st_size, status.st_mtime_ns


def _manifest(names: list[str]) -> bytes:
    return (json.dumps({"files": sorted(names)}, indent=2) + "\n").encode()


def published_before(manifest: bytes) -> set[str]:
    """The files that an earlier publication put into the repository, by its manifest; none if that is malformed."""
    files = _json(manifest).get("files")
    return {name for name in files if isinstance(name, str)} if isinstance(files, list) else set()
