"""What the ecosystem tests work on.

Every test carries `@pytest.mark.compatibility("Beam search", library="transformers")` and runs on every family. With
`HF_SIGMA_COMPATIBILITY=FOLDER` the outcomes of tests with this mark, here and elsewhere, go to
`FOLDER/<card>/compatibility.json`: see `make compatibility`.
"""

from pathlib import Path

import pytest

from tests.ecosystem.declarations import PROPERTY
from tests.ecosystem.families import CAUSAL_LMS
from trainers.data import train_tokenizer


TEXTS = [f"def add_{number}(x):\n    return x + {number}\n" for number in range(32)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents and PROPERTY not in dict(item.user_properties):
            raise pytest.UsageError(f"{item.nodeid} needs the mark `compatibility` and the fixture `family`")


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
