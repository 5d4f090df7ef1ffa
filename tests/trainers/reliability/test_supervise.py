"""Real child processes. The job is a script that remembers its attempts in the run folder and writes checkpoints as
Trainer names them; one slow test supervises a real training."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.forked import Python
from trainers.reliability.events import EventLog, read_events
from trainers.reliability.goodput import read_goodput
from trainers.reliability.supervise import ENDINGS, Supervisor, _parse, main, newest_step


ROOT = Path(__file__).parents[3]

# plan: what each attempt does, in order; the last goes on for ever.
JOB = """
import json, os, pathlib, signal, sys, time
folder, plan = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
count = len(list(folder.glob("attempt-*")))
(folder / f"attempt-{count}").write_text(json.dumps({"argv": sys.argv[3:], "time": time.time(),
    "attempt": os.environ["HF_SIGMA_ATTEMPT"], "job": os.environ["HF_SIGMA_JOB_HASH"]}))
for action in plan[min(count, len(plan) - 1)]:
    if isinstance(action, int):
        sys.exit(action)
    name, _, value = action.partition(" ")
    if name == "save":
        checkpoint = folder / f"checkpoint-{value}"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": int(value), "log_history": []}))
    elif name == "kill":
        os.kill(os.getpid(), int(value))
    elif name == "event":
        with (folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"component": "x", "time": time.time(), **json.loads(value)}) + "\\n")
    elif name == "until_stopped":
        (folder / "ready").touch()
        while not (folder / "STOP").exists():
            time.sleep(0.02)
    elif name == "until_signal":
        got = []
        signal.signal(int(value), lambda number, frame: got.append(number))
        (folder / "ready").touch()
        while not got:
            time.sleep(0.02)
"""


def job(folder, *plan):
    return [sys.executable, "-c", JOB, str(folder), json.dumps(plan)]


def supervise(folder, *plan, command=None, **options):
    return Supervisor(command or job(folder, *plan), run_folder=folder, **{"backoff": 0.01, **options}).run()


def attempts(folder):
    return [json.loads((folder / f"attempt-{i}").read_text()) for i in range(len(list(folder.glob("attempt-*"))))]


def last_words(folder):
    return read_events(folder, component="supervisor")[-1].message


def test_a_job_that_succeeds_runs_once(tmp_path):
    assert supervise(tmp_path, [0]) == 0
    [only] = attempts(tmp_path)
    assert only["attempt"] == "1" and len(only["job"]) == 64 and only["argv"] == []
    assert read_goodput(tmp_path).attempts == {"succeeded": 1}


@pytest.mark.parametrize("code", [2, 17])
def test_what_another_attempt_cannot_mend_runs_once_and_keeps_its_code(tmp_path, code):
    assert supervise(tmp_path, [code]) == code
    assert len(attempts(tmp_path)) == 1
    assert "would not help" in last_words(tmp_path)


def test_a_command_that_is_not_there(tmp_path):
    assert supervise(tmp_path, command=[str(tmp_path / "nothing")]) == 127
    assert read_goodput(tmp_path).attempts == {"software_failure": 1}


def test_failures_are_retried_while_there_is_progress(tmp_path):
    code = supervise(tmp_path, ["save 5", 1], ["save 9", "kill 9"], ["save 12", 75], [0])
    assert code == 0
    tried = attempts(tmp_path)
    assert [each["attempt"] for each in tried] == ["1", "2", "3", "4"]
    assert len({each["job"] for each in tried}) == 1
    assert read_goodput(tmp_path).attempts == {"software_failure": 1, "platform_failure": 2, "succeeded": 1}
    retries = [e for e in read_events(tmp_path, component="supervisor") if e.action == "retry"]
    assert [(e.step, e.evidence["last_exit_code"]) for e in retries] == [(5, 1), (9, 137), (12, 75)]


def test_up_to_n_retries(tmp_path):
    plan = [[f"save {i}", 1] for i in range(1, 9)]
    assert supervise(tmp_path, *plan, max_retries=3) == 1
    assert len(attempts(tmp_path)) == 4
    assert "retry 3 of 3" in last_words(tmp_path)


def test_always_is_not_bounded_by_the_number_of_retries(tmp_path):
    plan = [[f"save {i}", f"kill {int(signal.SIGTERM)}"] for i in range(1, 6)]
    assert supervise(tmp_path, *plan, [0], max_retries=1) == 0
    assert len(attempts(tmp_path)) == 6


def test_the_same_step_twice_ends_it(tmp_path):
    assert supervise(tmp_path, ["save 5", 1], [1], ["save 5", 1], [0]) == 1
    assert len(attempts(tmp_path)) == 3
    assert "at step 5, where they had begun" in last_words(tmp_path)


def test_no_step_at_all_twice_ends_it_even_where_the_table_says_always(tmp_path):
    assert supervise(tmp_path, [f"kill {int(signal.SIGTERM)}"]) == 128 + signal.SIGTERM
    assert len(attempts(tmp_path)) == 2


def test_a_checkpoint_that_was_cut_off_is_no_progress(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global')
    (tmp_path / "checkpoint-x").mkdir()
    assert newest_step(tmp_path) == 0 == newest_step(None)


def test_the_table_can_be_changed(tmp_path):
    assert supervise(tmp_path, ["save 1", 2], [0], reactions={2: 5}) == 0
    assert supervise(tmp_path / "other", ["save 1", 1], [0], reactions={1: "never"}) == 1


def test_back_off_doubles_without_progress(tmp_path):
    supervise(tmp_path, [1], patience=4, backoff=0.2, backoff_max=0.4)
    times = [each["time"] for each in attempts(tmp_path)]
    gaps = [b - a for a, b in zip(times, times[1:])]
    assert len(gaps) == 3 and gaps[0] >= 0.2 and min(gaps[1:]) >= 0.4
    said = [e.message for e in read_events(tmp_path, component="supervisor") if e.action == "retry"]
    assert [message.split("begins in ")[1].split(" s ")[0] for message in said] == ["0.2", "0.4", "0.4"]


@pytest.mark.parametrize(("code", "tries"), [(16, 2), (17, 1)])
def test_a_code_that_the_launcher_hid_is_read_from_the_events(tmp_path, code, tries):
    event = {"severity": "fatal", "action": "exit", "evidence": {"exit_code": code}, "host": "elsewhere"}
    plan = ["save 1", f"event {json.dumps(event)}", 1]
    assert supervise(tmp_path, plan, [0]) == (0 if code == 16 else 17)
    assert len(attempts(tmp_path)) == tries


def test_a_fatal_event_of_an_earlier_attempt_does_not_count(tmp_path):
    EventLog(tmp_path).record("x", "fatal", step=1, evidence={"exit_code": 17})
    time.sleep(0.01)
    assert supervise(tmp_path, ["save 1", 1], [0]) == 0


def test_resumes_only_where_asked(tmp_path, monkeypatch):
    supervise(tmp_path / "a", ["save 5", 1], [0])
    assert [each["argv"] for each in attempts(tmp_path / "a")] == [[], []]
    found = tmp_path / "b" / "checkpoint-5"
    monkeypatch.setattr("trainers.reliability.checkpoints.find_last_valid_checkpoint", lambda folder, log: found)
    supervise(tmp_path / "b", ["save 5", 1], [0], add_resume=True)
    assert attempts(tmp_path / "b")[1]["argv"] == ["--resume_from_checkpoint", str(found)]


def test_accused_hosts_are_left_out(tmp_path):
    hosts = ["alpha slots=8", "beta slots=8", "gamma slots=8"]
    accuse = {"severity": "warning", "confidence": 0.9, "evidence": {"accused_host": "alpha"}}
    unsure = {"severity": "warning", "confidence": 0.5, "evidence": {"accused_host": "beta"}}
    plan = [["save 1", f"event {json.dumps(accuse)}", f"event {json.dumps(unsure)}", 1], [0]]
    command = [*job(tmp_path, *plan), "{num_hosts}", "{hosts}", "{hostfile}"]
    assert supervise(tmp_path, command=command, hosts=hosts, num_hosts=2, accusations=1) == 0
    first, second = attempts(tmp_path)
    assert first["argv"][:2] == ["2", "alpha,beta"] and second["argv"][:2] == ["2", "beta,gamma"]
    assert Path(second["argv"][2]).read_text() == "beta slots=8\ngamma slots=8\n"
    assert read_events(tmp_path, component="supervisor")[-1].evidence["excluded_hosts"] == ["alpha"]


def test_code_16_asks_for_another_host_and_too_few_hosts_end_it(tmp_path):
    event = {"severity": "fatal", "action": "exit", "evidence": {"exit_code": 16}, "host": "alpha"}
    command = [*job(tmp_path, ["save 1", f"event {json.dumps(event)}", 16], [0]), "{hosts}"]
    assert supervise(tmp_path, command=command, hosts=["alpha", "beta"], num_hosts=2) == 16
    assert "1 healthy hosts are left of 2" in last_words(tmp_path)


# --- stopping: the supervisor as a process of its own ----------------------------------------------------------------


def start(folder, *plan, options=("--backoff", "0.1")):
    output = folder.with_name(f"{folder.name}-output")
    output.mkdir()
    command = ["-m", "trainers.reliability.supervise", "--run_folder", folder, *options, "--"]
    process = Python(*command, *job(folder, *plan), folder=output, cwd=ROOT)
    deadline = time.monotonic() + 90
    while not (folder / "ready").exists():
        assert process.returncode is None and time.monotonic() < deadline, process.communicate(60)
        time.sleep(0.02)
    return process


def test_sigterm_becomes_a_stop_file_and_the_job_may_save(tmp_path):
    (tmp_path / "STOP").touch()  # of an earlier run: it would stop this one at once
    process = start(tmp_path, ["until_stopped", "save 3", 0])
    assert not (tmp_path / "STOP").exists()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and newest_step(tmp_path) == 3
    assert "stopped with a checkpoint" in errors
    assert read_goodput(tmp_path).attempts == {"user_stop": 1}


def test_signals_reach_the_job_and_a_second_sigterm_does_not_wait(tmp_path):
    process = start(tmp_path, [f"until_signal {int(signal.SIGUSR1)}", f"until_signal {int(signal.SIGTERM)}", 3])
    (tmp_path / "ready").unlink()
    process.send_signal(signal.SIGUSR1)
    while not (tmp_path / "ready").exists():
        assert process.returncode is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.returncode is None  # the stop file is there, the job does not look at it
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 3
    assert len(attempts(tmp_path)) == 1


def test_a_stop_file_by_hand_is_a_users_wish(tmp_path):
    process = start(tmp_path, ["until_stopped", 1])
    (tmp_path / "STOP").touch()
    process.communicate(timeout=60)
    assert process.returncode == 1 and len(attempts(tmp_path)) == 1
    assert read_goodput(tmp_path).attempts == {"user_stop": 1}


def test_a_stop_by_the_platform_is_taken_up_again(tmp_path):
    event = {"component": "graceful_stop", "severity": "warning", "action": "stop", "evidence": {"file": False}}
    assert supervise(tmp_path, ["save 1", f"event {json.dumps(event)}", 0], ["save 2", 0]) == 0
    assert len(attempts(tmp_path)) == 2
    assert read_goodput(tmp_path).attempts == {"platform_failure": 1, "succeeded": 1}


# --- the command line ------------------------------------------------------------------------------------------------


def test_options(tmp_path):
    (tmp_path / "hosts").write_text("# a list\nalpha\n\nbeta slots=4\n")
    options = ["--hostfile", str(tmp_path / "hosts"), "--reaction", "1=never", "--reaction", "75=2"]
    supervisor = _parse([*options, "--max_retries", "4", "--", "run", "--output_dir", "there", "--seed", "1"])
    assert supervisor.hosts == ["alpha", "beta slots=4"] and supervisor.reactions == {1: "never", 75: 2}
    assert supervisor.run_folder == Path("there") and supervisor.max_retries == 4
    assert _parse(["--", "run", "--output_dir=here"]).run_folder == Path("here")
    assert _parse(["--", "run"]).run_folder is None


@pytest.mark.parametrize(
    ("argv", "match"),
    [
        ([], "there is no command"),
        (["--reaction", "x", "--", "run"], "CODE=never"),
        (["--patience", "0", "--", "run"], "--patience"),
    ],
)
def test_a_wrong_command_line_says_what_is_right(argv, match, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert match in capsys.readouterr().err


def test_without_a_run_folder_it_retries_by_number(tmp_path):
    command = job(tmp_path, [1], [1], [1], [0])
    assert Supervisor(command, max_retries=5, backoff=0.0).run() == 0
    assert Supervisor(job(tmp_path / "other", [1]), max_retries=2, backoff=0.0).run() == 1
    assert len(attempts(tmp_path / "other")) == 3


def test_the_meaning_of_16_and_17_is_megatrons():
    assert ENDINGS[16].outcome == ENDINGS[17].outcome == "hardware_failure"
    assert ENDINGS[16].reaction is None and ENDINGS[17].reaction == "never"


# --- a real training -------------------------------------------------------------------------------------------------

TRAINING = """
import os, sys, time
from tests.trainers.callbacks.test_graceful_stop import Asks, run
from trainers.callbacks.goodput import GoodputCallback
from trainers.callbacks.graceful_stop import GracefulStopCallback
from trainers.callbacks.hang_watchdog import HangWatchdogCallback
from trainers.reliability.supervise import newest_step
from pathlib import Path

folder, attempt = Path(sys.argv[2]), int(os.environ["HF_SIGMA_ATTEMPT"])
faults = [Asks(6, lambda: os.kill(os.getpid(), 9)), Asks(9, lambda: time.sleep(60)), Asks(12, (folder / "STOP").touch)]
watchdog = HangWatchdogCallback(seconds=2.0, grace_seconds=0.1)
callbacks = [GoodputCallback(flush_seconds=0.1), GracefulStopCallback(), watchdog, *faults[attempt - 1 : attempt]]
run(folder, *callbacks, max_steps=40, save_strategy="steps", save_steps=4, resume=newest_step(folder) > 0)
"""


@pytest.mark.slow
@pytest.mark.fault(
    "A supervised training is killed, hangs, and is asked to stop",
    survived_if="it is started again twice, resumes, and ends where it was asked to; the ledger adds up",
)
def test_a_training_is_killed_hangs_and_is_stopped(tmp_path, survived):
    run_folder = tmp_path / "run"
    command = [sys.executable, "-c", TRAINING, "--output_dir", str(run_folder)]
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = str(ROOT)
    try:
        code = Supervisor(command, run_folder=run_folder, backoff=0.1).run()
    finally:
        os.environ["PYTHONPATH"] = path
    assert code == 0 and newest_step(run_folder) == 12
    goodput = read_goodput(run_folder)
    assert goodput.attempts == {"platform_failure": 2, "user_stop": 1}
    assert [attempt.first_step for attempt in goodput.timeline] == [0, 4, 8]
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_seconds, rel=0.01)
    assert goodput.wall_seconds == pytest.approx(goodput.timeline[-1].end - goodput.timeline[0].start, rel=0.01)
    assert goodput.seconds["startup"] > 0 and goodput.seconds["restart_gap"] > 0.2
    survived(3)
