"""The sister families go to the Hub and come back to somebody who never installed us, as Sigma-MoE does."""

import json
import sys

import pytest

from model_cards.matrix import MODELS
from tests.hub.client import PYTHONS, run_client
from tests.hub.families import HUB_FAMILIES
from tests.hub.server import LoopbackHub
from tests.hub.test_publish_and_load import READERS, ROOT, assert_alike, publish, stranger_sees
from tests.model_cards.tiny_run import TOKEN


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({TOKEN: "alice"}) as hub:
        yield hub


@pytest.fixture(params=HUB_FAMILIES)
def name(request):
    return request.param


def decides_the_rows_of_each_model_type(test):
    for name in sorted(HUB_FAMILIES.keys() & MODELS.keys()):
        options = {"method": name, "only": {"name": name}}
        test = pytest.mark.compatibility("Remote code, without this package", **options)(test)
        options |= {"library": "huggingface-hub", "note": "with a Hub on the loopback interface"}
        test = pytest.mark.compatibility("Pushed and pulled by its id", **options)(test)
    return test


@pytest.mark.parametrize("reader", READERS)
@decides_the_rows_of_each_model_type
def test_a_stranger_has_what_a_user_of_the_package_has(hub, name, tmp_path, reader):
    family, run, repo = HUB_FAMILIES[name], tmp_path / "run", f"alice/{name}-{reader}".replace(" ", "-")
    family.write_run(run)
    publish(hub, run, repo=repo, home=tmp_path / "publisher", python=sys.executable)
    assert {file for file in hub.files(repo) if file.endswith(".py")} == family.code
    report, tensors = stranger_sees(hub, repo, PYTHONS[reader], tmp_path / "reader", family.heads)
    assert_alike(report, tensors, run, family.heads, family.top_k)
    # What the stranger saved is a repository of its own again, code and all.
    again = tmp_path / "reader" / "out-again"
    assert {path.name for path in again.glob("*.py")} == family.code
    auto_map = json.loads((again / "config.json").read_text())["auto_map"]
    assert auto_map == json.loads((run / "config.json").read_text())["auto_map"]
    assert auto_map.keys() >= {"AutoConfig", *family.heads}


WRITE = """
import sys
from pathlib import Path
from tests.hub.families import HUB_FAMILIES
HUB_FAMILIES[sys.argv[1]].write_run(Path(sys.argv[2]), seed=4)
"""


@pytest.mark.oldest
def test_what_the_oldest_versions_save_and_publish_loads_under_the_newest(hub, name, tmp_path):
    family, run, oldest = HUB_FAMILIES[name], tmp_path / "run", PYTHONS["oldest"]
    repo, settings = f"alice/oldest-{name}".replace(" ", "-"), {"PYTHONPATH": str(ROOT)}
    run_client(WRITE, hub, home=tmp_path, token=None, python=oldest, arguments=[name, run], cwd=ROOT, env=settings)
    saved_by = json.loads((run / "config.json").read_text())["transformers_version"]
    assert saved_by.startswith("5.18."), "OLDEST_PYTHON has another transformers than the lower bound"
    publish(hub, run, repo=repo, home=tmp_path / "publisher", python=oldest)
    report, tensors = stranger_sees(hub, repo, PYTHONS["newest"], tmp_path / "reader", family.heads)
    assert_alike(report, tensors, run, family.heads, family.top_k)
