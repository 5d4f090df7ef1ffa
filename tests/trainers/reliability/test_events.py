import json
import math
import multiprocessing
from pathlib import Path

import pytest

from trainers.reliability.events import EVENTS_NAME, Event, EventLog, read_events


def test_an_event_comes_back_as_it_was_written(tmp_path):
    log = EventLog(tmp_path / "new" / "folder", rank=3)
    evidence = {"loss": 2.5, "ids": [1, 2]}
    written = log.record("x", "error", step=7, action="skip", message="NaN", evidence=evidence, confidence=0.5)
    [read] = read_events(tmp_path / "new" / "folder")
    assert read == written
    assert (read.rank, read.step, read.severity, read.action) == (3, 7, "error", "skip")
    assert read.host and read.time > 0


def test_events_come_in_the_order_of_their_time_and_by_component(tmp_path):
    log = EventLog(tmp_path)
    for when, component in ((3.0, "a"), (1.0, "b"), (2.0, "a")):
        log.record(component, step=0, time=when)
    assert [event.time for event in read_events(tmp_path)] == [1.0, 2.0, 3.0]
    assert [event.time for event in read_events(tmp_path, component="a")] == [2.0, 3.0]
    assert read_events(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"severity": "bad"}, "severity='bad' is not known"),
        ({"severity": "info", "action": "panic"}, "action='panic' is not known"),
        ({"severity": "info", "confidence": 1.5}, "confidence=1.5 is not between 0 and 1"),
        ({"severity": "info", "confidence": math.nan}, "confidence=nan"),
    ],
)
def test_what_the_schema_does_not_know_is_refused(fields, match):
    with pytest.raises(ValueError, match=match):
        Event(component="x", **fields)


def test_numbers_that_json_cannot_hold_are_strings(tmp_path):
    evidence = {"loss": math.nan, "norms": [math.inf, (-math.inf, 1.0)], 5: {"deep": math.nan}}
    EventLog(tmp_path).record("x", step=0, evidence=evidence)
    line = (tmp_path / EVENTS_NAME).read_text()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    read = json.loads(line, parse_constant=refuse)["evidence"]
    assert read == {"loss": "nan", "norms": ["inf", ["-inf", 1.0]], "5": {"deep": "nan"}}


def test_a_line_cut_off_by_a_kill_and_other_rubbish_are_passed_over(tmp_path):
    log = EventLog(tmp_path)
    log.record("x", step=1)
    log.record("x", step=2)
    file = tmp_path / EVENTS_NAME
    whole = file.read_text()
    file.write_text('[1, 2]\n{"component": "x"}\n{"component": "x", "severity": "odd"}\n' + whole[:-30])
    assert [event.step for event in read_events(tmp_path)] == [1]


def test_the_line_after_one_that_was_cut_off_is_not_lost_with_it(tmp_path):
    log = EventLog(tmp_path)
    log.record("a", step=1)
    with (tmp_path / EVENTS_NAME).open("a") as file:
        file.write('{"component": "cut o')
    for name in "bc":
        log.record(name, step=2)
    assert [event.component for event in read_events(tmp_path)] == ["a", "b", "c"]


def test_unknown_fields_of_a_newer_version_are_passed_over(tmp_path):
    EventLog(tmp_path).record("x", step=1)
    file = tmp_path / EVENTS_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | {"new": 1}) + "\n")
    assert [event.step for event in read_events(tmp_path)] == [1]


def append(folder, rank, number):
    log = EventLog(folder, rank=rank)
    for step in range(number):
        log.record("many", step=step, evidence={"filler": "x" * 2000})


def test_lines_of_several_processes_do_not_mix(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=append, args=(tmp_path, rank, 200)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    events = read_events(tmp_path)
    assert {(event.rank, event.step) for event in events} == {(r, s) for r in range(4) for s in range(200)}
    # A rank that looks while another writes may take its line for one cut off, and leaves an empty one.
    written = [line for line in (tmp_path / EVENTS_NAME).read_text().splitlines() if line]
    assert len(events) == len(written) == 800


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_costs_the_line_not_the_run(tmp_path):
    (tmp_path / EVENTS_NAME).symlink_to("/dev/full")
    event = EventLog(tmp_path).record("x", "warning", step=4, message="low")
    assert event.step == 4


def test_a_folder_that_cannot_be_made_costs_the_line_not_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    assert EventLog(tmp_path / "file" / "run").record("x", step=1).step == 1
