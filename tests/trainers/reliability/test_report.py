import json
import subprocess
import sys
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from tests.trainers.callbacks.test_graceful_stop import run
from trainers.callbacks.goodput import GoodputCallback
from trainers.reliability.events import EventLog
from trainers.reliability.goodput import GoodputLedger
from trainers.reliability.health_figure import health_figure
from trainers.reliability.report import duration, main, read_run, render, write_report


def state(folder, rows, step=100):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": rows}))


def a_full_run(folder):
    rows = [{"step": s, "loss": 5 - s / 50, "grad_norm": 1.0, "moe/max_violation": 0.5} for s in range(10, 101, 10)]
    state(folder / "checkpoint-100", [*rows, {"step": 100, "eval_loss": 3.2}])
    state(folder / "checkpoint-50", rows[:5], step=50)
    log = EventLog(folder)
    for step in (0, 100):
        weight = {"q": [1.0, 2.0, 3.0 + step], "down": [2.0, "nan", 4.0]}
        log.record("norm_profile", step=step, evidence={"weight": weight, "gradient": {}})
        ranks = {"layers.0.q": {"before": 3.0, "after": 9.0}, "x": {"before": 2.0, "after": 8.0}}
        log.record("msign", step=step, evidence=ranks)
    accused = {"accused_rank": 1, "accused_host": "h1"}
    log.record("straggler", "warning", step=40, message="rank 1 is slow", evidence=accused)
    log.record("straggler", "warning", step=60, message="rank 1 is slow again", evidence={"accused_rank": 1})
    log.record("hang_watchdog", "fatal", step=70, action="exit", message="no step for 600 s")
    ledger = GoodputLedger(folder)
    ledger.begin(job="j", step=0, since=ledger.now() - 100)
    ledger.credit("productive", step=100)
    ledger.end(outcome="succeeded", step=100)


def test_a_page_and_a_figure(tmp_path):
    a_full_run(tmp_path)
    page = write_report(tmp_path)
    text = page.read_text()
    assert page.name == "reliability.md"
    assert "**Ended by hang\\_watchdog** at step 70: no step for 600 s" in text
    assert "3 incidents: 1 fatal, 2 warning" in text
    assert "Step 100, loss 3 (lowest 3)" in text
    assert "100.0% of 100 s were productive; attempts: 1 succeeded" in text
    rows = [line for line in text.splitlines() if line.startswith("| fatal") or line.startswith("| warning")]
    assert [row.split(" | ")[1] for row in rows] == ["hang\\_watchdog", "straggler"]
    assert " | 2 | 40 to 60 | 1 | " in rows[1] and rows[1].endswith("| rank 1 is slow again |")
    width, height = Image.open(tmp_path / "reliability.png").size
    assert width == 1245 and height == pytest.approx(3 * 390, abs=2)  # six panels in three rows
    assert "![" in text and "(reliability.png)" in text
    assert len(text.splitlines()) < 60  # a minute


@pytest.mark.parametrize("part", ["log", "events", "ledger", "profile", "msign", "balance"])
def test_one_panel_for_the_one_thing_that_is_there(tmp_path, part):
    if part == "log":
        state(tmp_path, [{"step": 1, "loss": 2.0}])
    elif part == "balance":
        state(tmp_path, [{"step": 1, "moe/max_violation": 2.0}])
    elif part == "events":
        EventLog(tmp_path).record("x", "error", step=1)
    elif part == "profile":
        EventLog(tmp_path).record("norm_profile", step=1, evidence={"weight": {"q": [1.0, 2.0]}})
    elif part == "msign":
        EventLog(tmp_path).record("msign", step=1, evidence={"matrices": {"q": {"before": 1.0, "after": 2.0}}})
    else:
        ledger = GoodputLedger(tmp_path)
        ledger.begin(job="j", step=0, since=0)
        ledger.end(outcome="succeeded", step=1)
    file = health_figure(read_run(tmp_path), tmp_path / "figure.png")
    assert Image.open(file).size[1] == pytest.approx(390, abs=2)
    render(read_run(tmp_path))


def test_measurements_of_an_unexpected_form_cost_their_panel_only(tmp_path):
    state(tmp_path, [{"step": 1, "loss": "nan"}, {"loss": 3.0}, "odd", {"step": 2, "loss": None}])
    log = EventLog(tmp_path)
    for evidence in ({}, {"weight": [1, 2]}, {"weight": {"q": "x"}}, {"weight": {"q": [None, "nan"]}}):
        log.record("norm_profile", step=1, evidence=evidence)
    for evidence in ({}, {"q": 1.0}, {"q": {"before": None}}, {"q": {"before": "x", "after": 1.0}}):
        log.record("msign", step=1, evidence=evidence)
    assert health_figure(read_run(tmp_path), tmp_path / "figure.png") is None
    page = write_report(tmp_path).read_text()
    assert "No incident." in page and "![" not in page


def test_nothing_of_a_message_becomes_markup_and_no_token_is_shown(tmp_path):
    token = "hf_" + "a" * 24
    message = f"<script>alert(1)</script> | **bold** [x](http://y) `z`\n# head {token}"
    EventLog(tmp_path).record("loss_guard", "error", step=1, message=message)
    page = write_report(tmp_path).read_text()
    html = MarkdownIt("commonmark").enable("table").render(page)
    assert "<script" not in html and "<strong>" not in html and "<a " not in html and html.count("<h1>") == 1
    assert token not in page
    assert html.count("<td>") == 8


def test_a_folder_without_a_run(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="Give the --output_dir"):
        write_report(tmp_path)
    with pytest.raises(SystemExit) as error:
        main([str(tmp_path)])
    assert error.value.code == 2 and "--output_dir" in capsys.readouterr().err


def test_a_real_training(tmp_path, capsys):
    run(tmp_path, GoodputCallback(), max_steps=4, logging_steps=1, save_strategy="steps", save_steps=2)
    assert main([str(tmp_path)]) == 0
    page = (tmp_path / "reliability.md").read_text()
    assert "Step 4, loss" in page and "1 succeeded" in page and "No incident." in page
    assert capsys.readouterr().out.strip() == str(tmp_path / "reliability.md")


def test_reading_a_run_does_not_need_matplotlib():
    code = "import sys, trainers.reliability.report; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[3]).returncode == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.01, "0 s"), (0.5, "0.5 s"), (119, "119 s"), (600, "10 min"), (7300, "2.03 h"), (400_000, "4.63 days")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
