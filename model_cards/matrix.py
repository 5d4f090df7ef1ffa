"""What works with which model, on one page: `model_cards/compatibility/README.md`, from the tables of all families.

    make compatibility

runs the tests that carry `@pytest.mark.compatibility`, which write a `compatibility.json` beside a card of each model,
and renders the page:

    python -m model_cards.matrix

A cell is what the rows behind it say, nothing is typed: failed if one of them failed, passed or gloo if one did, and
not tested otherwise. What cannot apply is named in `INAPPLICABLE`, with the reason.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from model_cards.compatibility import COMMAND, COMPATIBILITY_NAME, Compatibility, Row, read_compatibility
from model_cards.markdown import inline
from trainers.report import write_text_atomically


PACKAGE = Path(__file__).parent
FOLDER = PACKAGE / "compatibility"

# by model type; the columns of the page
MODELS = {
    "sigma_moe": "Sigma-MoE",
    "mone": "MoNE",
    "m_moe": "M-MoE",
    "m3bert": "m3BERT",
    "dot_cbm": "DOT-CBM",
    "ctr": "CTR",
    "dc_ccl": "DC-CCL",
    "personal_lm": "Personal LM",
}
# A model whose card has another name; its rows stand beside that card.
CARDS = {"ctr": "label_correction", "personal_lm": "anonymous_user_embeddings"}

# The lines of the page, each with the rows of the tables that it sums up, as `library: feature`.
FEATURES = {
    "Auto classes, with this package": ["transformers: Auto classes"],
    "Auto classes, by the code of the repository": ["transformers: Remote code*"],
    "`generate`": [
        *("transformers: Assisted generation", "transformers: Beam search", "transformers: Greedy generation"),
        *("transformers: Prompt-lookup generation", "transformers: Sampling"),
    ],
    "Caches of `generate`": ["transformers: Cache*", "transformers: Continuous batching*"],
    "Attention: eager and SDPA": [
        "transformers: Attention: eager and SDPA",
        "transformers: Attention of the backbone*",
    ],
    "Attention: FlexAttention": ["transformers: Attention: FlexAttention"],
    "Padding": ["transformers: Padding*"],
    "bf16 inference": ["transformers: bf16 inference"],
    "bf16 training": ["transformers: bf16 training"],
    "`torch.compile`": ["torch: torch.compile*"],
    "Gradient checkpointing": ["transformers: Gradient checkpointing"],
    "Pipelines": ["transformers: pipeline*"],
    "PEFT": ["peft: *"],
    "TRL": ["trl: *"],
    "Sentence Transformers": ["sentence-transformers: *"],
    "MTEB": ["mteb: *"],
    "lm-eval": ["lm-eval: *"],
    "FSDP2": ["torch: FSDP2*"],
    "Tensor parallelism": ["torch: Tensor parallelism*"],
    "Expert parallelism": ["torch: Expert parallelism*"],
    "`torch.export`": ["torch: torch.export*"],
    "ONNX": ["onnxruntime: *"],
    "ExecuTorch": ["executorch: *"],
    "Hub: pushed and pulled": ["huggingface-hub: *"],
    "Kernels from the Hub": ["hf-sigma: *"],
    "TensorBoard": ["tensorboard: *"],
    "Trackio": ["trackio: *"],
}

# (lines, models, why the one cannot apply to the other)
INAPPLICABLE = (
    (("`generate`", "Caches of `generate`", "TRL", "lm-eval"), ("m3bert",), "an encoder writes no text"),
    (("`generate`", "Caches of `generate`", "TRL", "lm-eval"), ("dot_cbm",), "classifies images"),
    (("`generate`", "Caches of `generate`", "TRL", "lm-eval"), ("ctr",), "predicts clicks"),
    (("Attention: eager and SDPA", "Attention: FlexAttention"), ("ctr",), "no attention of transformers' kind"),
    (("Padding",), ("dot_cbm",), "images of a batch have one size"),
    (("Pipelines",), ("ctr",), "transformers has none for rows of features"),
    (
        ("Sentence Transformers", "MTEB"),
        ("sigma_moe", "mone", "m_moe", "dc_ccl", "personal_lm"),
        "no head for sentence embeddings",
    ),
    (("Sentence Transformers", "MTEB"), ("dot_cbm", "ctr"), "reads no text"),
    (("Tensor parallelism",), ("dot_cbm", "ctr", "dc_ccl", "personal_lm"), "declares no plan"),
    (("Expert parallelism",), ("m3bert", "dot_cbm", "ctr", "dc_ccl", "personal_lm"), "no experts of its own"),
    (("Kernels from the Hub",), ("m3bert", "dot_cbm"), "of our kernels, experts alone have that form"),
    (("Kernels from the Hub",), ("ctr", "dc_ccl", "personal_lm"), "uses none of our kernels"),
)

State = Literal["passed", "gloo", "failed", "not tested", "not applicable"]


class MatrixError(ValueError):
    """Tables that make no page; the message names the row and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line for one model.

    Args:
        state (`str`): the worst that is known; a part that was not tested does not undo what passed.
        passed (`int`): rows that passed, by gloo processes too.
        rows (`tuple[Row]`): all rows behind it.
        reason (`str`): why the line cannot apply to the model.
    """

    state: State
    passed: int = 0
    rows: tuple[Row, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        if self.state == "not applicable":
            return f"n/a: {self.reason}"
        if not self.passed:
            return self.state
        of_all = f" of {len(self.rows)}" if self.passed < len(self.rows) else ""
        return f"{self.state} ({self.passed}{of_all})"


def read_tables(package: Path = PACKAGE) -> dict[str, Compatibility]:
    """The table of each model that has one."""
    found = {method: read_compatibility(package / CARDS.get(method, method)) for method in MODELS}
    return {method: table for method, table in found.items() if table is not None}


def line_of(row: Row) -> str:
    """The line of the page that a row belongs to.

    Raises:
        MatrixError: it belongs to none, or to several.
    """
    name = f"{row.library}: {row.feature}"
    lines = [line for line, rows in FEATURES.items() if any(fnmatchcase(name, pattern) for pattern in rows)]
    if len(lines) != 1:
        raise MatrixError(f"the row {name!r} belongs to {lines or 'no line'}: name it once in FEATURES of matrix.py")
    return lines[0]


def matrix(tables: Mapping[str, Compatibility]) -> dict[tuple[str, str], Cell]:
    """Every cell, by line and model.

    Raises:
        MatrixError: a row without a line, or of a cell that cannot apply.
    """
    rows: dict[tuple[str, str], list[Row]] = {}
    for method, table in tables.items():
        for row in table.rows:
            rows.setdefault((line_of(row), method), []).append(row)
    reasons = {(line, method): why for lines, methods, why in INAPPLICABLE for line in lines for method in methods}
    if contradicted := sorted(rows.keys() & reasons.keys()):
        raise MatrixError(f"{contradicted[0]} was tested: take it out of INAPPLICABLE of matrix.py")
    return {
        key: Cell(state="not applicable", reason=reasons[key]) if key in reasons else _cell(rows.get(key, []))
        for key in ((line, method) for line in FEATURES for method in MODELS)
    }


def _cell(rows: list[Row]) -> Cell:
    outcomes = Counter(row.outcome for row in rows)
    state = next((outcome for outcome in ("failed", "passed", "gloo") if outcomes[outcome]), "not tested")
    return Cell(state=state, passed=outcomes["passed"] + outcomes["gloo"], rows=tuple(rows))


def matrix_card(tables: Mapping[str, Compatibility]) -> str:
    """The page: the same bytes for the same tables."""
    cells = matrix(tables)
    lines = [
        f"| | {' | '.join(_title(method, tables) for method in MODELS)} |",
        f"|---|{'---|' * len(MODELS)}",
        *(f"| {line} | {' | '.join(str(cells[line, method]) for method in MODELS)} |" for line in FEATURES),
    ]
    table, left_out = "\n".join(lines), "\n".join(_left_out(tables))
    counts = Counter(cell.state for cell in cells.values())
    counted = ", ".join(f"{counts[state]} {state}" for state in State.__args__ if counts[state])
    return f"""# What works with which model

Tested on tiny models with random weights on a CPU, {_environment(tables)}. Of {len(cells)} cells: {counted}.

{table}

**passed**: every test that was run; (3) of three features, (3 of 5) where two more could not be run here, see below.
**gloo**: by gloo processes on one CPU, never on several GPUs. **not tested**: no test says so, or none could be run
here. **n/a**: cannot apply, for the reason given. The features behind each cell, with remarks, are in the card of the
model; models with fewer of them were tried in fewer ways.

## What could not be run here

{left_out}

## The same again

```bash
{COMMAND}
```
"""


def _title(method: str, tables: Mapping[str, Compatibility]) -> str:
    return f"[{MODELS[method]}](../{CARDS.get(method, method)}/README.md)" if method in tables else MODELS[method]


def _environment(tables: Mapping[str, Compatibility]) -> str:
    """Versions of all libraries; a library that has several is named with each."""
    seen: dict[str, set[str]] = {}
    for table in tables.values():
        for name, version in [*table.versions.items(), *((row.library, row.version) for row in table.rows)]:
            if version and name != "hf-sigma":
                seen.setdefault(name.replace("_", "-"), set()).add(version)
    return "with " + ", ".join(f"{inline(name)} {inline(' and '.join(sorted(seen[name])))}" for name in sorted(seen))


def _left_out(tables: Mapping[str, Compatibility]) -> list[str]:
    """Rows that were not tested, each with its reason and its models."""
    found: dict[tuple[str, str], list[str]] = {}
    for method in MODELS:
        for row in tables[method].rows if method in tables else []:
            if row.outcome in ("failed", "not tested"):
                found.setdefault((row.feature, row.note), []).append(MODELS[method])
    return [
        f"- {inline(feature)}: {inline(note)} ({', '.join(models)})"
        for (feature, note), models in sorted(found.items())
    ]


def main() -> int:
    """Render the page of the committed tables, and say how many cells are in which state."""
    tables = read_tables()
    FOLDER.mkdir(exist_ok=True)
    write_text_atomically(FOLDER / "README.md", matrix_card(tables))
    counts = Counter(cell.state for cell in matrix(tables).values())
    print(f"{FOLDER.name}/README.md:", ", ".join(f"{number} {state}" for state, number in counts.most_common()))
    if missing := [method for method in MODELS if method not in tables]:
        print(f"no {COMPATIBILITY_NAME} of {', '.join(missing)}: run `{COMMAND}`")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
