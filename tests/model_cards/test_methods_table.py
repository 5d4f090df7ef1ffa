"""The table of methods in README.md is what its command renders, and counts what the results say."""

import shutil
from pathlib import Path

import pytest

from model_cards.methods import BEGIN, END, METHODS, PACKAGE, ReadmeError, counted, main, methods_table, with_table
from tests.model_cards.tiny_run import write_tiny_run
from trainers.report import Metric, read_results, summarise, write_results


ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readme_has_the_table_that_the_command_renders():
    assert README == with_table(README, methods_table()), "run `python -m model_cards.methods`"


def test_each_paper_is_there_once_with_what_exists():
    assert len({method.arxiv for method in METHODS}) == len(METHODS) >= 15
    for method in METHODS:
        assert method.card or method.tests
        assert all((ROOT / name).exists() for name in method.tests)


def test_every_card_with_results_has_its_row():
    committed = {file.parent.name for file in PACKAGE.glob("*/results.json")}
    assert committed <= {method.card for method in METHODS}
    for name in committed:
        assert f"[card](model_cards/{name}/README.md): {counted(PACKAGE / name)} |" in methods_table()


def test_verdicts_are_counted_over_all_metrics(tmp_path):
    write_tiny_run(tmp_path)
    results = read_results(tmp_path)
    results.metrics = {}
    for index, verdicts in enumerate((("holds", "null"), ("holds", "fails", None))):
        metric = results.metrics[f"m{index}"] = summarise([1.0, 2.0, 3.0])
        for number, verdict in enumerate(verdicts):
            metric.baseline[f"b{number}"] = Metric(value=1.0, n=3, verdict=verdict)
    write_results(tmp_path, results)
    assert counted(tmp_path) == "2 better, 1 not resolved, 1 worse"


def test_results_that_come_later_are_counted(tmp_path):
    package = tmp_path / "model_cards"
    shutil.copytree(PACKAGE / "reliability", package / "reliability")
    (before,) = [line for line in methods_table(package).splitlines() if line.startswith("| FedSubAvg ")]
    assert "no comparison yet; tested by [federated](tests/trainers/federated)" in before
    shutil.copytree(PACKAGE / "mone", package / "fed_sub_avg")
    (after,) = [line for line in methods_table(package).splitlines() if line.startswith("| FedSubAvg ")]
    assert after.endswith(f"| [card](model_cards/fed_sub_avg/README.md): {counted(PACKAGE / 'mone')} |")


@pytest.mark.parametrize("text", ["no place", f"{END}\n{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_a_readme_without_one_place_is_left_alone(text, tmp_path, capsys):
    with pytest.raises(ReadmeError, match="once each"):
        with_table(text, "x")
    (tmp_path / "README.md").write_text(text)
    assert main([str(tmp_path / "README.md")]) == 2
    assert "once each" in capsys.readouterr().err and (tmp_path / "README.md").read_text() == text


def test_the_command_writes_the_table_and_nothing_else(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main([str(path)]) == 0
    assert path.read_text() == f"before\n{BEGIN}\n\n{methods_table()}\n\n{END}\nafter\n"
