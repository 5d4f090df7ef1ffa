"""From the outcomes of single tests to the compatibility table of each family."""

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from model_cards.compatibility import Compatibility, Row, write_compatibility
from trainers.report import collect_versions, device_name


# A property of a test, `{"method", "feature", "library", "note"}`: it travels from xdist's workers with each report.
PROPERTY = "compatibility"


class Outcome(NamedTuple):
    outcome: str
    note: str = ""


class CompatibilityReport:
    """A plugin of pytest that writes `folder/<method>/compatibility.json` at the end, one row for each feature.

    A feature passed if all its tests did. With `--collect-only` nothing runs, and all features are "not tested".
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.declared: dict[str, dict[str, str]] = {}  # by node id
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
        tables: dict[str, dict[tuple[str, str], list[str]]] = {}
        for node, declared in sorted(self.declared.items()):
            features = tables.setdefault(declared["method"], {})
            features.setdefault((declared["library"], declared["feature"]), []).append(node)
        for method, features in tables.items():
            rows = [
                self._row(*key, features[key]) for key in sorted(features, key=lambda key: (key[0], key[1].lower()))
            ]
            table = Compatibility(versions=collect_versions(), device=device_name(), rows=rows)
            write_compatibility(self.folder / method, table)

    def _declare(self, test) -> None:
        for name, value in test.user_properties:
            if name == PROPERTY:
                self.declared[test.nodeid] = value

    def _row(self, library: str, feature: str, nodes: list[str]) -> Row:
        outcomes = [self.outcomes.get(node, Outcome("not tested", "its tests did not run")) for node in nodes]
        seen = {outcome for outcome, _ in outcomes}
        worst = next(outcome for outcome in ("failed", "not tested", "passed") if outcome in seen)
        notes = [note for outcome, note in outcomes if outcome == worst]
        notes += [self.declared[node]["note"] for node in nodes]
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
