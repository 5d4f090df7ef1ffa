"""Settings of every test process, made before anything imports huggingface_hub, whose constants are read at import."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

from tests.ecosystem.declarations import MARK, PROPERTY, rows_declared


# What a change has to pass must not depend on the draw of the day; `--hypothesis-profile=default` draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

# No test reads the user's token or cache or reaches the real Hub. One that wants a Hub starts the loopback one in a
# subprocess with an environment of its own. A folder for each worker: remote code is copied into the cache, and two
# workers would write the same files.
HOME = tempfile.mkdtemp(prefix="hf-sigma-tests-")
os.environ["HF_HOME"] = HOME
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)
os.environ["MPLBACKEND"] = "Agg"
# On some CPUs MKL's sums depend on where tensors lie in memory, and a model that was read from a file lies elsewhere:
# without this, "the same bits" could not be asked for there. Read when torch first multiplies.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")


def pytest_configure(config):
    config.addinivalue_line("markers", MARK)
    folder = os.environ.get("HF_SIGMA_COMPATIBILITY")
    if folder and not hasattr(config, "workerinput"):  # with xdist only the controller hears of all outcomes
        from tests.ecosystem.outcomes import CompatibilityReport

        config.pluginmanager.register(CompatibilityReport(Path(folder)))


def pytest_unconfigure():
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state, whatever ran before it in the same worker."""
    # A test that uses torch has imported it by now; the others need not pay for the import.
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What the tests import is not searched for garbage: not while it comes, and not by Trainer's collections, several
    in each training, which took longer than the trainings of the tests themselves."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("interpreter"):
            item.fixturenames.insert(0, "interpreter")
        if rows := rows_declared(item):
            item.user_properties.append((PROPERTY, rows))


@pytest.fixture
def interpreter():
    """Triton decides when it is imported whether it interprets kernels: a whole run does, or does not."""
    import triton

    assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before the tests start, as `make test` does"
