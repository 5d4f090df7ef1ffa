"""The ledger's sums, on records whose truth is known; the callback that writes them is tested beside the callbacks."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from trainers.reliability.goodput import CATEGORIES, LEDGER_NAME, GoodputLedger, job_hash, read_goodput


def write(folder, *records):
    (folder / LEDGER_NAME).write_text("".join(json.dumps(record) + "\n" for record in records))


def begin(when, step=0, job="j"):
    return {"kind": "begin", "time": when, "step": step, "job": job}


def spent(when, first, last, **seconds):
    return {"kind": "time", "time": when, "seconds": seconds, "from_step": first, "step": last}


def saved(when, step):
    return {"kind": "checkpoint", "time": when, "step": step}


def end(when, outcome="succeeded", step=0):
    return {"kind": "end", "time": when, "outcome": outcome, "step": step}


def launch(when, job="j"):
    return {"kind": "launch", "time": when, "job": job}


def ended(when, outcome, code=1):
    return {"kind": "exit", "time": when, "outcome": outcome, "code": code}


def adds_up(goodput):
    assert sum(goodput.seconds.values()) == pytest.approx(goodput.wall_seconds, rel=1e-9)
    assert set(goodput.seconds) == set(CATEGORIES) and min(goodput.seconds.values()) >= 0
    return {name: seconds for name, seconds in goodput.seconds.items() if seconds}


def test_one_attempt(tmp_path):
    write(
        tmp_path,
        begin(100),
        spent(160, 0, 10, startup=10, productive=45, idle=5),
        spent(170, 10, 10, checkpoint=10),
        saved(170, 10),
        end(200, step=10),
    )
    goodput = read_goodput(tmp_path)
    assert adds_up(goodput) == {"startup": 10, "productive": 45, "checkpoint": 10, "idle": 35}
    assert goodput.wall_seconds == 100 and goodput.effective_time_ratio == 0.45
    assert goodput.attempts == {"succeeded": 1}
    assert goodput.mtbf_seconds is None and goodput.recovery_seconds is None


def test_a_killed_attempt_loses_what_the_next_makes_again(tmp_path):
    write(
        tmp_path,
        launch(0), begin(10), spent(60, 0, 50, productive=50), spent(65, 50, 50, checkpoint=5), saved(65, 50),
        spent(105, 50, 90, productive=40), ended(110, "platform_failure", 137),
        launch(130), begin(140, 50), spent(190, 50, 100, productive=50), end(190, step=100),
        ended(195, "succeeded", 0),
    )  # fmt: skip
    goodput = read_goodput(tmp_path)
    assert adds_up(goodput) == {
        "startup": 20, "productive": 100, "lost": 40, "checkpoint": 5, "restart_gap": 20, "idle": 10,
    }  # fmt: skip
    assert goodput.wall_seconds == 195
    assert goodput.attempts == {"platform_failure": 1, "succeeded": 1}
    assert goodput.mtbf_seconds == 110 + 65 and goodput.recovery_seconds == 20


def test_steps_in_the_middle_of_a_record_are_lost_in_proportion(tmp_path):
    write(tmp_path, begin(0), spent(100, 0, 100, productive=100), begin(100, 75))
    assert adds_up(read_goodput(tmp_path)) == {"productive": 75, "lost": 25}


def test_a_later_attempt_that_goes_further_back_loses_more_of_the_first(tmp_path):
    write(
        tmp_path,
        begin(0), spent(100, 0, 100, productive=100),
        begin(100, 80), spent(110, 80, 90, productive=10),
        begin(110, 20), spent(190, 20, 100, productive=80), end(190),
    )  # fmt: skip
    assert adds_up(read_goodput(tmp_path)) == {"productive": 100, "lost": 90}


def test_at_a_failure_all_since_the_last_checkpoint_is_lost_before_anyone_resumes(tmp_path):
    records = [launch(0), begin(0), spent(50, 0, 50, productive=50), saved(50, 50), spent(70, 50, 70, productive=20)]
    write(tmp_path, *records, ended(70, "hardware_failure", 16))
    assert adds_up(read_goodput(tmp_path)) == {"productive": 50, "lost": 20}
    write(tmp_path, *records)  # it may still run
    assert adds_up(read_goodput(tmp_path)) == {"productive": 70}
    assert read_goodput(tmp_path).attempts == {"running": 1}


def test_a_crash_before_the_training_is_start_up(tmp_path):
    write(tmp_path, launch(0), ended(30, "software_failure"), launch(40), begin(50), spent(90, 0, 4, productive=40))
    goodput = read_goodput(tmp_path)
    assert adds_up(goodput) == {"startup": 40, "restart_gap": 10, "productive": 40}
    assert goodput.attempts == {"software_failure": 1, "running": 1}


def test_time_in_which_a_stopped_run_lay_still_does_not_count(tmp_path):
    write(tmp_path, begin(0), spent(10, 0, 9, productive=10), end(10, "user_stop", 9), begin(9000, 9), end(9005))
    goodput = read_goodput(tmp_path)
    assert goodput.wall_seconds == 15 and goodput.seconds["restart_gap"] == 0
    assert goodput.mtbf_seconds is None


def test_recovery_counts_attempts_at_the_same_job_that_were_long_enough(tmp_path):
    write(
        tmp_path,
        launch(0, "a"), ended(10, "unknown"), launch(15, "a"), ended(500, "unknown"), launch(600, "a"),
        ended(1000, "unknown"), launch(1900, "b"),
    )  # fmt: skip
    assert read_goodput(tmp_path).recovery_seconds == pytest.approx((5 + 100) / 2)
    assert read_goodput(tmp_path, min_attempt_seconds=360).recovery_seconds == 100


def test_a_line_cut_off_does_not_spoil_the_rest(tmp_path):
    write(tmp_path, begin(0), spent(10, 0, 9, productive=10))
    with (tmp_path / LEDGER_NAME).open("a") as file:
        file.write('{"kind": "time", "time": 20, "secon')
    ledger = GoodputLedger(tmp_path)
    ledger.begin(job="j", step=9)
    assert len(read_goodput(tmp_path).timeline) == 2
    assert read_goodput(tmp_path / "absent") is None


def test_categories_add_up_to_the_clock_on_the_wall(tmp_path):
    ledger = GoodputLedger(tmp_path, flush_seconds=0.05)
    start = time.time()
    ledger.begin(job="j", step=0)
    for step in range(1, 11):
        time.sleep(0.01)
        ledger.credit("idle", step=step - 1)
        time.sleep(0.03)
        ledger.credit("productive", step=step)
    ledger.checkpoint(step=10)
    ledger.end(outcome="succeeded", step=10)
    wall = time.time() - start
    goodput = read_goodput(tmp_path)
    assert sum(goodput.seconds.values()) == pytest.approx(wall, rel=0.01)
    assert goodput.seconds["productive"] > 0.3 and goodput.seconds["idle"] > 0.1


def keep_going(folder):
    ledger = GoodputLedger(folder, flush_seconds=0.02)
    ledger.begin(job="j", step=0)
    for step in range(1, 10_000):
        time.sleep(0.005)
        ledger.credit("productive", step=step)


def test_survives_sigkill(tmp_path):
    start = time.time()
    for _ in range(2):
        process = multiprocessing.get_context("fork").Process(target=keep_going, args=(tmp_path,))
        process.start()
        time.sleep(0.5)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    GoodputLedger(tmp_path).begin(job="j", step=0)
    wall = time.time() - start
    goodput = read_goodput(tmp_path)
    assert goodput.attempts == {"unknown": 2, "running": 1}
    assert sum(goodput.seconds.values()) == pytest.approx(wall, abs=0.25)
    assert goodput.seconds["lost"] > 0.6 and goodput.seconds["productive"] == 0  # all were to be made again


def test_an_outcome_that_nobody_knows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="outcome='fine' is not known"):
        GoodputLedger(tmp_path).exit(outcome="fine", code=0)


def test_a_full_disk_costs_the_line_not_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    GoodputLedger(tmp_path / "file" / "run").begin(job="j", step=0)
    assert read_goodput(tmp_path) is None and (tmp_path / "file").read_text() == ""


def test_the_hash_of_a_job_does_not_change_with_the_attempt():
    command = "accelerate launch --main_process_port 29500 -m recipe --output_dir runs/a --learning_rate 1e-3".split()
    assert job_hash(command) == job_hash([w.replace("29500", "29501").replace("runs/a", "b") for w in command])
    assert job_hash(command) == job_hash([*command, "--resume_from_checkpoint", "runs/a/checkpoint-5"])
    assert job_hash(command) == job_hash([*command, "--run_name=again-2", "--logging_steps", "5"])
    for other in ("1e-4", "-m other"):
        assert job_hash(command) != job_hash([*command[:-1], other])
    assert job_hash(command) != job_hash([w.replace("recipe", "another") for w in command])
    assert job_hash(command) != job_hash([*command, "--seed", "1"])
    assert len(job_hash(command)) == 64

    config = {"run_name": "a", "retry_count": 1, "learning_rate": 1.0, "data": {"name": "x", "rows": 5}}
    assert job_hash(config) == job_hash({**config, "run_name": "b", "retry_count": 2})
    assert job_hash(config) != job_hash({**config, "data": {"name": "x", "rows": 6}})
