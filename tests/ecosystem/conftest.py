"""What the ecosystem tests work on, and the compatibility tables that a run of them writes.

Every test carries `@pytest.mark.compatibility("Beam search", library="transformers")` and runs on every family. With
`HF_SIGMA_COMPATIBILITY=FOLDER` the outcomes go to `FOLDER/<method>/compatibility.json`: see `make compatibility`.
"""

import os
from pathlib import Path

import pytest

from tests.ecosystem.families import CAUSAL_LMS, Family
from tests.ecosystem.outcomes import PROPERTY, CompatibilityReport
from trainers.data import train_tokenizer


TEXTS = [f"def add_{number}(x):\n    return x + {number}\n" for number in range(32)]


def pytest_configure(config):
    config.addinivalue_line(
        "markers", 'compatibility(feature, library=, note=""): the row of the compatibility table that a test decides'
    )
    folder = os.environ.get("HF_SIGMA_COMPATIBILITY")
    if folder and not hasattr(config, "workerinput"):  # with xdist only the controller hears of all outcomes
        config.pluginmanager.register(CompatibilityReport(Path(folder)))


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent not in item.path.parents:
            continue
        marker = item.get_closest_marker("compatibility")
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        family = next((value for value in parameters.values() if isinstance(value, Family)), None)
        if marker is None or family is None:
            raise pytest.UsageError(f"{item.nodeid} needs the mark `compatibility` and the fixture `family`")
        (feature,) = marker.args
        declared = {"method": family.method, "feature": feature, "note": ""} | marker.kwargs
        item.user_properties.append((PROPERTY, declared))


@pytest.fixture(params=CAUSAL_LMS, ids=lambda family: family.method)
def family(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300, show_progress=False)


@pytest.fixture
def text_fields(tokenizer):
    """Fields of a configuration that fit the tokenizer."""
    return {"vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


@pytest.fixture
def saved(family, tokenizer, text_fields, tmp_path):
    """Folder of a model with its tokenizer, as a user has it."""
    family.model(**text_fields).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"
