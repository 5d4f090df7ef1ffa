"""What neither `huggingface_hub` nor the Hub checks about a card, checked before anybody sees it."""

import ast
import re
from pathlib import Path
from urllib.parse import unquote

import yaml
from huggingface_hub import ModelCard

from model_cards.markdown import measured_on, results_table, split_fences
from trainers.report import Results


REQUIRED_KEYS = ("license", "language", "library_name", "pipeline_tag", "tags")

# Identifiers of the Hub's list; `other` is left out, since it needs a name and a link that we would have to check.
LICENSES = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0 bigscience-openrail-m bsd
    bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0 cdla-permissive-2.0 cdla-sharing-1.0
    creativeml-openrail-m ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 gemma gfdl gpl gpl-2.0 gpl-3.0 isc lgpl lgpl-2.1
    lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1
    open-mdw openrail openrail++ osl-3.0 pddl postgresql unlicense wtfpl zlib
    """.split()
)

# ISO 639-1, and the two words that the Hub takes beside it.
LANGUAGES = frozenset(
    """
    aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee
    el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is
    it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms
    mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk
    sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi
    yo za zh zu code multilingual
    """.split()
)

_LINK = re.compile(r"(!?)(?<!\\)\[(?:\\.|[^\]\\])*\]\(\s*<?([^)>\s]+)>?[^)]*\)")
_HEADER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
_HTML_IMAGE = re.compile(r"<img\b[^>]*\bsrc\s*=\s*[\"']?([^\"'\s>]+)", re.IGNORECASE)
_LEFTOVER = re.compile(r"\[More Information Needed\]|\[optional\]|\{\{|\{%|\bTODO\b|\bFIXME\b", re.IGNORECASE)
_ABSOLUTE_PATH = re.compile(
    r"(?<![\w.~:/\-])/(?:(?:root|home|tmp|work|mnt|opt|usr|var|etc|Users)\b|[\w.+\-]+/)[^\s`\"')\]]*"
    r"|(?<!\w)[A-Za-z]:\\\w[^\s`\"')\]]*"
)


def check_card(text: str, results: Results, root: str | Path) -> list[str]:
    """Everything that is wrong with the card `text` of the run `results` whose files lie in `root`; empty if nothing.

    Checked: metadata (required keys, licence, language codes, data set or a note on the data, base model), the
    `model-index` and the evaluation table against `results`, left-over template phrases, links to files, absolute
    paths, and the syntax of every Python block. Blocks fenced as `text` quote a model, and may hold anything but
    the name of the folder on this machine.
    """
    root = Path(root)
    prose, blocks = split_fences(text)
    problems = _check_metadata(text, results)
    if results_table(results) not in text:
        problems.append("evaluation: the table is not the one that results.json renders; build the card again")
    problems += [f"template phrase left in the text: {phrase!r}" for phrase in sorted(set(_LEFTOVER.findall(prose)))]
    problems += _check_links(_HEADER.sub("", prose), root)
    ours = "\n".join([prose, *(content for language, content in blocks if language != "text")])
    paths = {match.group() for match in _ABSOLUTE_PATH.finditer(ours)}
    if str(root.resolve()) in text:
        paths.add(str(root.resolve()))
    problems += [f"absolute path: {path}" for path in sorted(paths)]
    for language, content in blocks:
        if language == "python":
            try:
                ast.parse(content)
            except SyntaxError as error:
                problems.append(f"Python block does not parse: {error.msg}: {(error.text or '').strip()!r}")
    return problems


def _check_metadata(text: str, results: Results) -> list[str]:
    try:
        card = ModelCard(text)
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        return [f"metadata: the YAML block cannot be read: {' '.join(str(error).split())}"]
    data = card.data
    problems = [f"metadata: `{key}` is missing" for key in REQUIRED_KEYS if not data.get(key)]
    if data.license and data.license not in LICENSES:
        problems.append(f"metadata: unknown license {data.license!r}; use an identifier of the Hub's list")
    languages = data.language if isinstance(data.language, list) else [data.language]
    for language in languages:
        if language is False:
            problems.append("metadata: language `no` must be quoted in YAML")
        elif language is not None and language not in LANGUAGES:
            problems.append(f"metadata: {language!r} is not an ISO 639-1 code, `code` or `multilingual`")
    if results.data.hub_id is not None:
        if results.data.hub_id not in (data.datasets or []):
            problems.append(f"metadata: `datasets` does not name {results.data.hub_id!r}")
    elif results.data.fingerprint not in card.text:
        problems.append("data: neither `datasets` nor a note with the fingerprint of the corpus")
    if data.base_model != results.model.base:
        problems.append(f"metadata: `base_model` is {data.base_model!r}, results.json says {results.model.base!r}")
    return problems + _check_model_index(card, results)


def _check_model_index(card: ModelCard, results: Results) -> list[str]:
    problems, others = [], measured_on(results)
    entries = card.data.eval_results or []
    for entry in entries:
        metric = results.metrics.get(entry.metric_type)
        if entry.metric_type in others:
            problems.append(f"model-index: `{entry.metric_type}` was measured on {others[entry.metric_type]!r}")
        elif metric is None:
            problems.append(f"model-index: `{entry.metric_type}` is not in results.json")
        elif entry.metric_value != metric.value:
            problems.append(
                f"model-index: `{entry.metric_type}` is {entry.metric_value}, results.json says {metric.value}"
            )
    listed = {entry.metric_type for entry in entries}
    expected = [name for name in results.metrics if name not in others]
    problems += [f"model-index: `{name}` of results.json is missing" for name in expected if name not in listed]
    return problems


def _check_links(prose: str, root: Path) -> list[str]:
    targets = [(bool(image), target) for image, target in _LINK.findall(prose)]
    targets += [(True, target) for target in _HTML_IMAGE.findall(prose)]
    problems = []
    for image, target in targets:
        kind = "image" if image else "link"
        if re.match(r"https://|mailto:|#", target):
            continue
        if re.match(r"[A-Za-z][\w+.\-]*:|/|\\", target):
            problems.append(f"{kind} is neither https nor relative: {target}")
            continue
        file = (root / unquote(target.split("#")[0])).resolve()
        if not file.is_relative_to(root.resolve()):
            problems.append(f"{kind} leads out of the run folder: {target}")
        elif not file.exists():
            problems.append(f"{kind} does not exist: {target}")
    return problems
