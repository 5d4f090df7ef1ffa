"""Markdown that untrusted text cannot break out of, and the evaluation table."""

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from trainers.report import MIN_SEEDS_FOR_VERDICT, Metric, Results


_INLINE = re.compile(r"[\\`*_\[\]|~$]")
_BLOCK_START = re.compile(r"^(?=[#=]|[+\-](?!\d))|^(\d+)(?=[.)](?:\s|$))")
_FENCE = re.compile(r" {0,3}(?P<fence>`{3,}|~{3,})[ \t]*(?P<info>[^\n]*)")
_VERDICTS = {None: "", "holds": "holds", "null": "null (not resolved)", "fails": "fails"}


def visible(text: str) -> str:
    """`text` with control and invisible characters written as `\\uXXXX`; newlines and tabs stay."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(
        f"\\u{ord(char):04x}"
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in "\n\t"
        else char
        for char in text
    )


def inline(value: Any) -> Markup:
    """`value` as text of one line, in which no character has a meaning in Markdown or HTML; Markup passes through."""
    if isinstance(value, Markup):
        return value
    text = " ".join(visible(str(value)).split())
    text = _INLINE.sub(lambda match: "\\" + match.group(), text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return Markup(_BLOCK_START.sub(lambda match: f"{match.group(1) or ''}\\", text))


def fence(text: str, language: str = "text") -> Markup:
    """`text` as a fenced block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    ticks = "`" * max(3, longest + 1)
    return Markup(f"{ticks}{language}\n{visible(text).rstrip()}\n{ticks}")


def split_fences(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Prose without its fenced blocks, and the blocks as (language, content), by CommonMark's rules for fences."""
    prose, blocks, opened, language, content = [], [], "", "", []
    for line in text.split("\n"):
        match = _FENCE.match(line)
        if opened:
            closes = match and match["fence"].startswith(opened) and not match["info"].strip()
            if not closes:
                content.append(line)
                continue
            blocks.append((language, "\n".join(content)))
            opened, content = "", []
        elif match and not (match["fence"][0] == "`" and "`" in match["info"]):
            opened, language = match["fence"], match["info"].strip()
        else:
            prose.append(line)
    if opened:  # CommonMark: an open fence runs to the end of the document
        blocks.append((language, "\n".join(content)))
    return "\n".join(prose), blocks


def label(name: str) -> str:
    """A snake_case metric name for people."""
    words = name.replace("_", " ")
    return words[:1].upper() + words[1:]


def number(value: float, spread: float | None = None) -> str:
    """`value`, with `spread` to two significant digits and both to the same decimal, else to four digits."""
    scale = spread if spread else value
    digits = (2 if spread else 4) - 1 - (math.floor(math.log10(abs(scale))) if scale else 0)
    places = min(max(digits, 0), 12)
    if not spread and float(value).is_integer():
        places = 0
    text = f"{value:,.{places}f}"
    return text if spread is None else f"{text} ± {spread:,.{places}f}"


def measured_on(results: Results) -> dict[str, str]:
    """The metrics that are not this model's, and what they were measured on: `evidence["measured_on"]` of a
    comparison that publishes one of several models."""
    named = results.evidence.get("measured_on")
    return {str(name): str(model) for name, model in named.items()} if isinstance(named, dict) else {}


def results_table(results: Results) -> Markup:
    """[`evaluation_table`] of everything that a run measured."""
    return evaluation_table(results.metrics, measured_on(results))


def evaluation_table(metrics: Mapping[str, Metric], others: Mapping[str, str] | None = None) -> Markup:
    """Every metric with its baselines; a baseline's verdict is that of this model against it, or of the model that
    `others` names for the metric."""
    others = others or {}
    lines = ["| Metric | Model | Value | Runs | Verdict |", "|---|---|---|---:|---|"]
    for name, metric in metrics.items():
        arrow = {True: " ↑", False: " ↓", None: ""}[metric.higher_is_better]
        who = Markup("**") + inline(others[name]) + "**" if name in others else Markup("**this model**")
        rows = [(inline(label(name)) + arrow, who, metric)]
        rows += [(Markup(""), inline(other), baseline) for other, baseline in metric.baseline.items()]
        for title, who, row in rows:
            value = f"{number(row.value, row.spread)} {inline(row.unit or metric.unit)}".rstrip()
            said = _VERDICTS[row.verdict] if row.n >= MIN_SEEDS_FOR_VERDICT else ""  # fewer have none
            lines.append(f"| {title} | {who} | {value} | {row.n} | {said} |")
    notes = [(label(name), metric.note) for name, metric in metrics.items() if metric.note]
    notes += [
        (f"{label(name)}, {other}", baseline.note)
        for name, metric in metrics.items()
        for other, baseline in metric.baseline.items()
        if baseline.note
    ]
    if notes:
        lines += ["", *(f"- {inline(title)}: {inline(note)}" for title, note in notes)]
    return Markup("\n".join(lines))
