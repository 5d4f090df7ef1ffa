"""From the outcomes of the tests that break something to the table of faults in the card of the reliability set."""

from pathlib import Path

from model_cards.faults import Fault, FaultTable, write_faults
from trainers.report import collect_versions, device_name


DECLARED, COUNTED = "fault", "faults"  # properties of a test, which travel from xdist's workers with each report


class FaultReport:
    """A plugin of pytest that writes `folder/faults.json` at the end, one row for each kind of fault.

    A test that fails counts as one fault that was not survived.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.rows: dict[str, Fault] = {}

    def pytest_runtest_logreport(self, report):
        properties = dict(report.user_properties)
        if DECLARED not in properties or report.skipped or (report.passed and report.when != "call"):
            return
        name, survived_if = properties[DECLARED]
        times, lost = properties.get(COUNTED, (1, None)) if report.passed else (1, None)
        row = self.rows.get(name)
        if row is None:
            self.rows[name] = Fault(
                fault=name, survived_if=survived_if, injected=times, survived=times * report.passed
            )
            row = self.rows[name]
        else:
            row.injected += times
            row.survived += times * report.passed
        if lost is not None:
            row.saves_lost = max(lost, row.saves_lost or 0)

    def pytest_sessionfinish(self):
        if self.rows:
            rows = sorted(self.rows.values(), key=lambda row: row.fault.lower())
            write_faults(self.folder, FaultTable(versions=collect_versions(), device=device_name(), rows=rows))
