"""The judges of `make test-transformers` can say no."""

import sys

import pytest

from tests.transformers_suite import archive
from tests.transformers_suite.compare_skips import YARDSTICK, compare, read


def test_a_skip_of_ours_alone_is_found():
    outcomes = {
        YARDSTICK: {"test_a": None, "test_b": None, "test_gpu": "needs an accelerator"},
        "OursTest": {"test_a": None, "test_b": "no SDPA", "test_gpu": "needs an accelerator"},
    }
    assert compare(outcomes) == ["OursTest::test_b: no SDPA"]


def test_a_test_that_ours_lacks_is_found():
    (finding,) = compare({YARDSTICK: {"test_a": None}, "OursTest": {}})
    assert finding.startswith("OursTest::test_a")


def test_a_report_without_both_sides_is_no_pass():
    assert compare({YARDSTICK: {"test_a": None}})
    assert compare({"OursTest": {"test_a": None}})


def test_an_encoder_is_compared_with_encoders():
    outcomes = {YARDSTICK: {"test_generate": None}, "M3BertTest": {"test_a": None, "test_b": "no SDPA"}}
    (finding,) = compare(outcomes)
    assert "M3BertTest" in finding and "BertTest" in finding
    assert compare(outcomes | {"BertTest": {"test_a": None}}) == []
    assert compare(outcomes | {"BertTest": {"test_b": None}}) == ["M3BertTest::test_b: no SDPA"]


def test_what_a_family_has_none_of_is_no_finding():
    outcomes = {"LlamaTest": {"test_a": None, "test_b": None}}
    outcomes["PersonalLmTest"] = {"test_a": "PersonalLmConfig not in MODEL_MAPPING", "test_b": "no SDPA"}
    assert compare(outcomes) == ["PersonalLmTest::test_b: no SDPA"]


def test_reads_pytests_report(tmp_path):
    (tmp_path / "junit.xml").write_text(
        "<testsuites><testsuite>"
        '<testcase classname="tests.suite.OursTest" name="test_a" />'
        '<testcase classname="tests.suite.OursTest" name="test_b"><skipped message="no SDPA" /></testcase>'
        "</testsuite></testsuites>"
    )
    assert read(str(tmp_path / "junit.xml")) == {"OursTest": {"test_a": None, "test_b": "no SDPA"}}


def test_an_archive_out_of_reach_is_an_error_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "BUILD", tmp_path)
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RuntimeError, match="pip download .* transformers=="):
        archive.unpack()
    assert list(tmp_path.iterdir()) == []
