"""`@pytest.mark.compatibility` on any test: the rows of the compatibility tables that it decides."""

from collections.abc import Iterator
from typing import Any

import pytest


# A property of a test, a list of the rows that it declares: it travels from xdist's workers with each report.
PROPERTY = "compatibility"
MARK = (
    'compatibility(feature, library="transformers", method=None, only=None, note="", gloo=False): the row of the '
    "tables of `method` (one or several; by default that of the fixture `family`) that a test decides; `only` under "
    "these values of its parameters; `gloo` where ranks are gloo processes"
)

# Of transformers' common tests, which `make compatibility` runs too: the class of each model, what shows a feature.
# Their ranks are gloo processes.
SUITES = {"SigmaMoeTest": "sigma_moe", "MoneTest": "mone", "MMoeTest": "m_moe"}
SUITE_ROWS = {
    "Tensor parallelism": r"test_tp_(forward_\d|backward|generation)",
    "Expert parallelism": r"test_ep_(forward_\d|backward_\d_grouped_mm)",
    "FSDP2": r"test_fsdp2_(plan_vs_ddp_\d_untied|save_load)",
}


def rows_declared(item: pytest.Item) -> list[dict[str, Any]]:
    """What the marks of a test declare, for each row `{"method", "feature", "library", "note", "gloo"}`.

    Raises:
        pytest.UsageError: a mark without a method, or a name that the mark does not know.
    """
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return [row for mark in item.iter_markers("compatibility") for row in _rows_of(mark, parameters, item.nodeid)]


def _rows_of(mark: pytest.Mark, parameters: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    options = {"library": "transformers", "method": None, "only": {}, "note": "", "gloo": False} | mark.kwargs
    methods, only = options.pop("method"), options.pop("only")
    if len(mark.args) != 1 or options.keys() != {"library", "note", "gloo"} or only.keys() - parameters.keys():
        raise pytest.UsageError(f"{where}: the mark is {MARK}")
    if any(parameters[name] != value for name, value in only.items()):
        return
    if methods is None:
        methods = getattr(parameters.get("family"), "method", None)
    if not methods:
        raise pytest.UsageError(f"{where} needs `method` in its mark `compatibility`, or the fixture `family`")
    for method in [methods] if isinstance(methods, str) else methods:
        yield {"method": method, "feature": mark.args[0]} | options
