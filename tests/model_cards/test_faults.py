import json

import pytest

from model_cards.faults import FAULTS_NAME, FOLDER, Fault, FaultTable, faults_card, read_faults, write_faults


pytest_plugins = ["pytester"]
ROW = {"fault": "a | b", "survived_if": "it goes on", "injected": 3, "survived": 2, "saves_lost": 1}


def test_what_is_written_is_read(tmp_path):
    table = FaultTable(versions={"torch": "1"}, device="cpu", rows=[Fault(**ROW)])
    write_faults(tmp_path, table)
    assert read_faults(tmp_path) == table
    assert "| a \\| b | 3 | 2 | 1 | it goes on |" in faults_card(table)


@pytest.mark.parametrize("change", [{"survived": 4}, {"injected": 0, "survived": 0}, {"injected": None}, {"odd": 1}])
def test_what_cannot_be_is_refused(tmp_path, change):
    payload = {"versions": {}, "device": "cpu", "rows": [ROW | change]}
    (tmp_path / FAULTS_NAME).write_text(json.dumps(payload))
    with pytest.raises(ValueError, match="make faults"):
        read_faults(tmp_path)


def test_outcomes_of_tests_become_rows(pytester, monkeypatch):
    """One test that injects twice, one that fails, one that is skipped, one without the mark."""
    conftest = (FOLDER.parents[1] / "tests" / "trainers" / "conftest.py").read_text()
    pytester.makeconftest(conftest)
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.fault("kill", survived_if="goes on")
        def test_kill(survived):
            survived(2, lost=1)

        @pytest.mark.fault("kill", survived_if="goes on")
        def test_not_survived():
            assert False

        @pytest.mark.fault("hang", survived_if="ends")
        def test_skipped():
            pytest.skip("not here")

        def test_unmarked():
            pass
        """
    )
    folder = pytester.path / "written"
    monkeypatch.setenv("HF_SIGMA_FAULTS", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parents[1]))
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2, failed=1, skipped=1)
    [row] = read_faults(folder).rows
    assert row == Fault(fault="kill", survived_if="goes on", injected=3, survived=2, saves_lost=1)


def test_the_committed_card_says_what_the_committed_table_says():
    table = read_faults()
    assert (FOLDER / "README.md").read_text(encoding="utf-8") == faults_card(table)
    assert all(row.survived == row.injected for row in table.rows)
