"""Whoever adds a model finds here which list is without it: those of README.md's "Add a method", step 6."""

from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hf_models  # noqa: F401  (registers the families)
from model_cards.matrix import CARDS, MODELS, matrix, read_tables
from model_cards.methods import METHODS
from tests.ecosystem import families


ROOT = Path(__file__).parents[1]
# The co-model that DC-CCL sends to devices: one with the model that it is cut from.
PARTS = {"dc_ccl_device"}
MODEL_TYPES = sorted(
    name
    for name, config in CONFIG_MAPPING._extra_content.items()
    if config.__module__.startswith("hf_models.") and name not in PARTS
)


def test_the_families_are_found():
    assert {"sigma_moe", "mone", "m_moe", "m3bert", "dot_cbm", "ctr", "dc_ccl", "personal_lm"} <= set(MODEL_TYPES)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
class TestEveryModelType:
    def test_has_a_column_of_the_compatibility_matrix(self, model_type):
        assert model_type in MODELS, "model_cards/matrix.py: MODELS"

    def test_is_what_a_method_of_the_readme_has_a_card_of(self, model_type):
        assert CARDS.get(model_type, model_type) in {method.card for method in METHODS}, "model_cards/methods.py"

    def test_is_among_the_families_of_the_ecosystem_tests(self, model_type):
        lists = (families.CAUSAL_LMS, families.IMAGE_CLASSIFIERS, families.TEXT_WRITERS, families.LEARNERS)
        assert model_type in {family.method for each in lists for family in each}, "tests/ecosystem/families.py"

    def test_runs_the_common_tests_of_transformers(self, model_type):
        assert (ROOT / "tests" / "transformers_suite" / f"suite_{model_type}.py").is_file()

    def test_is_pushed_to_a_hub_and_pulled(self, model_type):
        cells = matrix(read_tables())
        cell = cells.get(("Hub: pushed and pulled", model_type))
        assert cell is not None and cell.state == "passed", "tests/hub, then make compatibility"
