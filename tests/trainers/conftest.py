"""The table of faults: tests that break something carry `@pytest.mark.fault("what", survived_if="...")`.

With `HF_SIGMA_FAULTS=FOLDER` their outcomes go to `FOLDER/faults.json`: see `make faults`.
"""

import os
from pathlib import Path

import pytest

from tests.trainers.faults import COUNTED, DECLARED, FaultReport


def pytest_configure(config):
    config.addinivalue_line("markers", "fault(name, survived_if=): the row of the table of faults that a test adds to")
    folder = os.environ.get("HF_SIGMA_FAULTS")
    if folder and not hasattr(config, "workerinput"):  # with xdist only the controller hears of all outcomes
        config.pluginmanager.register(FaultReport(Path(folder)))


def pytest_collection_modifyitems(items):
    for item in items:
        if marker := item.get_closest_marker("fault"):
            item.user_properties.append((DECLARED, (*marker.args, marker.kwargs["survived_if"])))


@pytest.fixture
def survived(record_property):
    """`survived(times, lost=saves)`: how many faults a test has injected; one, where it does not say."""
    return lambda times=1, *, lost=None: record_property(COUNTED, (times, lost))
