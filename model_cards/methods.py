"""The table of the methods in README.md, with what was measured of each: rendered, not typed.

    python -m model_cards.methods [README.md]

A row is a paper, where it is in this package, and its card with the number of comparisons that it wins, leaves open
and loses, counted in the card's `results.json`; a method without one says what tests it.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from model_cards.faults import FOLDER as FAULTS
from model_cards.faults import read_faults
from trainers.report import RESULTS_NAME, read_results, write_text_atomically


PACKAGE = Path(__file__).parent
BEGIN = "<!-- methods: written by `python -m model_cards.methods` -->"
END = "<!-- end of methods -->"


@dataclass(frozen=True, kw_only=True)
class Method:
    """One paper.

    Args:
        paper (`str`): its short title.
        arxiv (`str`): its number there.
        where (`str`): what of this package is about it.
        card (`str`, *optional*): folder of its card; None where there is nothing to compare.
        tests (`tuple[str, ...]`): what tests it, named where the card has no `results.json`.
        note (`str`): what a reader must know before the numbers.
    """

    paper: str
    arxiv: str
    where: str
    card: str | None = None
    tests: tuple[str, ...] = ()
    note: str = ""


METHODS = (
    Method(
        paper="Sigma-MoE-Tiny",
        arxiv="2512.16248",
        where="`hf_models.moe`, `trainers.callbacks`, recipes",
        card="sigma_moe",
    ),
    Method(
        paper="SIGMA training stack",
        arxiv="2512.13488",
        where="`trainers.reliability`, `trainers.callbacks`",
        card="reliability",
        tests=("tests/trainers/reliability", "tests/trainers/callbacks"),
    ),
    Method(
        paper="MoNE, mixture of neuron experts",
        arxiv="2510.05781",
        where="`hf_models.moe`, `sigma_kernels`, recipe",
        card="mone",
    ),
    Method(
        paper="M-MoE, Matryoshka MoE",
        arxiv="2509.26520",
        where="`hf_models.moe`, `trainers.callbacks`, recipe",
        card="m_moe",
    ),
    Method(
        paper="Orthogonal growth of MoE checkpoints",
        arxiv="2510.08008",
        where="`hf_models.moe`, recipe",
        card="growth",
    ),
    Method(
        paper="MSign",
        arxiv="2602.01734",
        where="`trainers.optimizers`, `sigma_kernels`, recipe",
        card="msign",
    ),
    Method(
        paper="m3BERT",
        arxiv="2605.19568",
        where="`hf_models.m3bert`, `trainers.losses`, `sigma_kernels`, recipes",
        card="m3bert",
    ),
    Method(
        paper="DOT-CBM",
        arxiv="2505.07209",
        where="`hf_models.dot_cbm`, `sigma_kernels`, recipes",
        card="dot_cbm",
    ),
    Method(
        paper="DC-CCL",
        arxiv="2303.10361",
        where="`hf_models.dc_ccl`, `trainers.device_cloud`, recipe",
        card="dc_ccl",
    ),
    Method(
        paper="On-device fine-tuning with label correction",
        arxiv="2211.01163",
        where="`hf_models.ctr`, `trainers.device_cloud`, recipe",
        card="label_correction",
        note="as we read its abstract",
    ),
    Method(
        paper="Anonymous user embeddings (IDfree-PL)",
        arxiv="2501.06062",
        where="`hf_models.personal_lm`, `trainers.device_cloud`, recipe",
        card="anonymous_user_embeddings",
    ),
    Method(
        paper="Device-cloud collaborative learning, survey",
        arxiv="2504.15300",
        where="`trainers.device_cloud.collaboration`, recipe",
        tests=(
            "tests/trainers/device_cloud/test_collaboration_methods.py",
            "tests/trainers/recipes/test_compare_collaboration.py",
        ),
        note="its map, and three peers run from one interface",
    ),
    Method(
        paper="FedSubAvg",
        arxiv="2109.07704",
        where="`trainers.federated`, recipe",
        card="fed_sub_avg",
        tests=("tests/trainers/federated", "tests/trainers/recipes/test_federated_ctr.py"),
    ),
    Method(
        paper="MM-PSGD and MC-PSGD",
        arxiv="2002.07454",
        where="`trainers.federated`, recipe",
        card="block_cyclic",
    ),
    Method(
        paper="FedLaAvg",
        arxiv="2002.07399",
        where="`trainers.federated`, recipe",
        card="fed_la_avg",
        tests=("tests/trainers/federated", "tests/trainers/recipes/test_federated_digits.py"),
    ),
)


class ReadmeError(ValueError):
    """A README without the place for the table; the message names the file and the remedy."""


def counted(folder: Path) -> str:
    """The verdicts of all comparisons of a card, such as `"2 better, 9 not resolved, 4 worse"`."""
    metrics = read_results(folder).metrics.values()
    verdicts = Counter(baseline.verdict for metric in metrics for baseline in metric.baseline.values())
    words = {"holds": "better", "null": "not resolved", "fails": "worse"}
    return ", ".join(f"{verdicts[verdict]} {word}" for verdict, word in words.items())


def measured(method: Method, package: Path = PACKAGE) -> str:
    """The last column: the card and its counts, the table of faults, or the tests."""
    folder = package / method.card if method.card else None
    parts = [method.note] if method.note else []
    card = f"[card](model_cards/{method.card}/README.md)"
    if folder and (folder / RESULTS_NAME).exists():
        parts.append(f"{card}: {counted(folder)}")
    elif method.card == FAULTS.name:
        rows = read_faults(folder).rows
        survived, injected = (sum(getattr(row, name) for row in rows) for name in ("survived", "injected"))
        parts.append(f"{card}: {survived} of {injected} faults survived, of {len(rows)} kinds")
    else:
        tests = (f"[{name.removeprefix('tests/trainers/')}]({name})" for name in method.tests)
        parts.append(f"no comparison yet; tested by {', '.join(tests)}")
    return "; ".join(parts)


def methods_table(package: Path = PACKAGE) -> str:
    """The table and its legend: the same bytes for the same results."""
    rows = (
        f"| {method.paper} | [{method.arxiv}](https://arxiv.org/abs/{method.arxiv}) | {method.where} "
        f"| {measured(method, package)} |"
        for method in METHODS
    )
    return "\n".join(
        [
            "Counted are comparisons with baselines in the evidence of each card: *better* and *worse* where the 95 % "
            "interval over the",
            "seeds excludes zero, *not resolved* otherwise. Baselines include ablations of the method itself.",
            "",
            "| paper | arXiv | here | measured |",
            "|---|---|---|---|",
            *rows,
        ]
    )


def with_table(readme: str, table: str) -> str:
    """`readme` with `table` between the two comments.

    Raises:
        ReadmeError: the comments are not there once each, in their order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in after:
        raise ReadmeError(f"README.md needs the lines {BEGIN!r} and {END!r}, once each")
    return f"{before}{BEGIN}\n\n{table}\n\n{END}{after}"


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit status: 0, or 2 for what cannot be read or written."""
    parser = argparse.ArgumentParser(prog="python -m model_cards.methods", description=__doc__.split("\n")[0])
    parser.add_argument("readme", nargs="?", type=Path, default=Path("README.md"), help="(default: %(default)s)")
    path = parser.parse_args(argv).readme
    try:
        write_text_atomically(path, with_table(path.read_text(encoding="utf-8"), methods_table()))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
