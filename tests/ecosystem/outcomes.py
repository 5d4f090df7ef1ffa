"""From the outcomes of single tests to the compatibility table of each family."""

from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from model_cards.compatibility import Compatibility, Row, write_compatibility
from model_cards.matrix import CARDS
from tests.ecosystem.declarations import PROPERTY
from trainers.report import collect_versions, device_name


GLOO = "by gloo processes on one CPU, not on GPUs"


class Outcome(NamedTuple):
    outcome: str
    note: str = ""


class CompatibilityReport:
    """A plugin of pytest that writes `folder/<card>/compatibility.json` at the end, one row for each feature.

    A feature passed if all its tests did. With `--collect-only` nothing runs, and all features are "not tested".
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.declared: dict[str, list[dict[str, Any]]] = {}  # by node id
        self.outcomes: dict[str, Outcome] = {}

    def pytest_collection_finish(self, session):
        if session.config.option.collectonly:
            for item in session.items:
                self._declare(item)

    def pytest_runtest_logreport(self, report):
        self._declare(report)
        if report.failed:
            self.outcomes[report.nodeid] = Outcome("failed", f"fails in {report.nodeid.split('/')[-1]}")
        elif report.skipped:
            _, _, reason = report.longrepr  # path, line, "Skipped: reason"
            self.outcomes[report.nodeid] = Outcome("not tested", reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.outcomes[report.nodeid] = Outcome("passed")

    def pytest_sessionfinish(self):
        tables: dict[str, dict[tuple[str, str], list[tuple[str, dict[str, Any]]]]] = {}
        for node, rows in sorted(self.declared.items()):
            for row in rows:
                features = tables.setdefault(row["method"], {})
                features.setdefault((row["library"], row["feature"]), []).append((node, row))
        for method, features in tables.items():
            rows = [
                self._row(*key, features[key]) for key in sorted(features, key=lambda key: (key[0], key[1].lower()))
            ]
            table = Compatibility(versions=collect_versions(), device=device_name(), rows=rows)
            write_compatibility(self.folder / CARDS.get(method, method), table)

    def _declare(self, test) -> None:
        for name, value in test.user_properties:
            if name == PROPERTY:
                self.declared[test.nodeid] = value

    def _row(self, library: str, feature: str, tests: list[tuple[str, dict[str, Any]]]) -> Row:
        outcomes = [self.outcomes.get(node, Outcome("not tested", "its tests did not run")) for node, _ in tests]
        seen = {outcome for outcome, _ in outcomes}
        worst = next(outcome for outcome in ("failed", "not tested", "passed") if outcome in seen)
        notes = [note for outcome, note in outcomes if outcome == worst]
        notes += [row["note"] for _, row in tests]
        if worst == "passed" and all(row["gloo"] for _, row in tests):
            worst = "gloo"
            notes.append(GLOO)
        try:
            version = metadata.version(library)
        except metadata.PackageNotFoundError:
            version = None
        return Row(
            feature=feature,
            library=library,
            version=version,
            outcome=worst,
            note="; ".join(dict.fromkeys(note for note in notes if note)),
        )
