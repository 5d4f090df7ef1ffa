"""Where the wall time of a job went, over all its attempts, in a file that survives them.

`goodput.jsonl` of the run folder is only appended to, one write a line.
[`trainers.callbacks.goodput.GoodputCallback`] writes what the training process does,
`python -m trainers.reliability.supervise` when it was launched and how it ended; either works alone. [`read_goodput`]
adds up. Job hash, recovery time (next launch minus previous completion of the same hash) and the outcomes are those of
the platform of the SIGMA stack (arXiv 2512.13488, platform code); the categories are our proposal.
"""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.utils import logging


logger = logging.get_logger(__name__)

LEDGER_NAME = "goodput.jsonl"
JOB_VARIABLE = "HF_SIGMA_JOB_HASH"  # how the supervisor tells the training process which job it is an attempt at

Category = Literal["productive", "lost", "checkpoint", "evaluation", "startup", "restart_gap", "idle"]
Outcome = Literal["succeeded", "user_stop", "software_failure", "hardware_failure", "platform_failure", "unknown"]
CATEGORIES: tuple[str, ...] = get_args(Category)
FAILURES = ("software_failure", "hardware_failure", "platform_failure", "unknown")

# What differs between two attempts at the same job, or does not change what is computed.
_NOT_THE_JOB = re.compile(
    r"name|name_suffix|(run|job|experiment)_name|retry.*|attempt.*|extras?|resume_from_checkpoint|.*(dir|port)|log.*"
    r"|report_to|disable_tqdm|.*token|machine_rank|main_process_ip",
)


def job_hash(config: Mapping[str, Any] | Sequence[str]) -> str:
    """SHA-256 of a job, the same for every attempt at it.

    Names, retry counts, the checkpoint to resume from, output folders, ports, and how it logs do not count.

    Args:
        config: a mapping (`TrainingArguments.to_sanitized_dict()`), or the words of a command line.
    """
    if isinstance(config, Mapping):
        kept: Any = _without_names(config)
    else:
        kept = list(_words_of_the_job(config))
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()


def _without_names(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_names(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not _NOT_THE_JOB.fullmatch(key)
    }


def _words_of_the_job(words: Sequence[str]) -> Iterable[str]:
    value_of_ignored = False
    for word in words:
        if word.startswith("--"):
            name, assigned, _ = word[2:].partition("=")
            ignored = bool(_NOT_THE_JOB.fullmatch(name.replace("-", "_")))
            value_of_ignored = ignored and not assigned
            if not ignored:
                yield word
        elif value_of_ignored and not word.startswith("-"):
            value_of_ignored = False
        else:
            yield word


class GoodputLedger:
    """Appends to the ledger of a run folder. A disk that is full costs the line, with a warning, not the run.

    The training process calls `begin`, then `credit` at every boundary: all time since the boundary before belongs to
    one category, so that nothing is counted twice or not at all. Sums are written at most every `flush_seconds`, and
    at every checkpoint and end; a killed process loses no more than those from the right category.
    """

    def __init__(self, folder: str | Path, *, flush_seconds: float = 10.0):
        self.path, self.flush_seconds = Path(folder) / LEDGER_NAME, flush_seconds
        # A wall clock that does not jump: two ledgers may disagree, one does not with itself.
        self._offset = time.time() - time.perf_counter()
        self._pending: dict[str, float] = {}
        self._mark = self._flushed = self.now()
        self._step = self._flushed_step = 0

    def now(self) -> float:
        """Seconds since the epoch."""
        return self._offset + time.perf_counter()

    def launch(self, *, job: str) -> None:
        """The supervisor starts an attempt."""
        self._append("launch", self.now(), job=job)

    def exit(self, *, outcome: Outcome, code: int) -> None:
        """The supervisor saw the attempt end."""
        self._append("exit", self.now(), outcome=_known(outcome), code=code)

    def begin(self, *, job: str, step: int, since: float | None = None) -> None:
        """Training begins at optimizer step `step`; `since`: when this process did (seconds since the epoch)."""
        since = self.now() if since is None else min(since, self.now())
        self._mark = self._flushed = since
        self._step = self._flushed_step = step
        self._append("begin", since, job=job, step=step)

    def credit(self, category: Category, *, step: int) -> None:
        """The time since the last call (or `begin`) was spent on `category`; `step` optimizer steps are done."""
        now = self.now()
        self._pending[category] = self._pending.get(category, 0.0) + now - self._mark
        self._mark, self._step = now, step
        if now - self._flushed >= self.flush_seconds:
            self.flush()

    def checkpoint(self, *, step: int) -> None:
        """A checkpoint of `step` is complete: what comes after it is lost if the attempt fails now."""
        self.flush()
        self._append("checkpoint", self._mark, step=step)

    def end(self, *, outcome: Outcome, step: int) -> None:
        """Training came to its end in this process."""
        self.credit("idle", step=step)
        self.flush()
        self._append("end", self._mark, outcome=_known(outcome), step=step)

    def flush(self) -> None:
        """Write what was credited since the last time."""
        if self._pending:
            seconds = {name: round(value, 6) for name, value in self._pending.items()}
            self._append("time", self._mark, seconds=seconds, from_step=self._flushed_step, step=self._step)
        self._pending, self._flushed, self._flushed_step = {}, self._mark, self._step

    def _append(self, kind: str, when: float, **values: Any) -> None:
        line = json.dumps({"kind": kind, "time": round(when, 6), **values}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                end = os.lseek(file, 0, os.SEEK_END)
                if end and os.pread(file, 1, end - 1) != b"\n":  # a killed attempt left half a line
                    line = "\n" + line
                os.write(file, line.encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning(f"A line of {self.path} was not written: {error}")


def _known(outcome: str) -> str:
    if outcome not in get_args(Outcome):
        raise ValueError(f"outcome={outcome!r} is not known. Choose one of {get_args(Outcome)}.")
    return outcome


@dataclass(kw_only=True)
class Attempt:
    """One process that tried the job. Times in seconds since the epoch; steps are optimizer steps that were done."""

    start: float
    end: float
    job: str
    outcome: Outcome | None = None  # None: nobody saw it end, it may still run
    first_step: int | None = None  # None: it never came to train
    step: int = 0
    saved_step: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    productive: list[tuple[int, int, float]] = field(default_factory=list)  # from step, to step, seconds
    exited: bool = False

    def spend(self, category: str, seconds: float) -> None:
        self.seconds[category] = self.seconds.get(category, 0.0) + seconds


@dataclass(kw_only=True)
class Goodput:
    """What a ledger adds up to.

    Args:
        wall_seconds (`float`): all attempts, and the gaps after those that failed; not the time in which a run lay
            still that was finished or stopped by its user.
        seconds (`dict[str, float]`): wall time by category, see [`CATEGORIES`]. `productive` excludes steps that had
            to be made again, which are `lost`; `startup` holds launch, imports, loading and the first steps (compile);
            `idle` waiting for data, logging and what ran after the training.
        attempts (`dict[str, int]`): attempts by outcome, `"running"` for a last one whose end nobody saw.
        mtbf_seconds (`float`, *optional*): time in attempts per failed attempt; `None` without a failure.
        recovery_seconds (`float`, *optional*): mean of next launch minus previous completion; `None` without one.
        timeline (`list[Attempt]`): the attempts in order.
    """

    wall_seconds: float
    seconds: dict[str, float]
    attempts: dict[str, int]
    mtbf_seconds: float | None
    recovery_seconds: float | None
    timeline: list[Attempt]

    @property
    def effective_time_ratio(self) -> float:
        """Productive share of the wall time, from 0 to 1."""
        return self.seconds["productive"] / self.wall_seconds if self.wall_seconds else 0.0


def read_goodput(folder: str | Path, *, min_attempt_seconds: float = 0.0) -> Goodput | None:
    """Add up the ledger of a run folder; `None` if there is none.

    Args:
        folder: the run folder.
        min_attempt_seconds: shorter attempts do not count for the recovery time (the platform's code takes 360).
    """
    timeline = _attempts(_records(Path(folder) / LEDGER_NAME))
    if not timeline:
        return None
    for attempt in timeline[:-1]:
        attempt.outcome = attempt.outcome or "unknown"
    seconds = dict.fromkeys(CATEGORIES, 0.0)
    for attempt in timeline:
        for category, value in attempt.seconds.items():
            seconds[category] += value
    lost = sum(_lost_seconds(timeline, i) for i in range(len(timeline)))
    seconds["productive"] -= lost
    seconds["lost"] += lost
    recoveries = []
    for before, after in zip(timeline, timeline[1:]):
        gap = after.start - before.end
        if before.outcome in FAILURES and gap > 0:
            seconds["restart_gap"] += gap
            if before.job == after.job and before.end - before.start >= min_attempt_seconds:
                recoveries.append(gap)
    failures = sum(attempt.outcome in FAILURES for attempt in timeline)
    up = sum(attempt.end - attempt.start for attempt in timeline)
    counts: dict[str, int] = {}
    for attempt in timeline:
        counts[attempt.outcome or "running"] = counts.get(attempt.outcome or "running", 0) + 1
    return Goodput(
        wall_seconds=up + seconds["restart_gap"],
        seconds=seconds,
        attempts=counts,
        mtbf_seconds=up / failures if failures else None,
        recovery_seconds=sum(recoveries) / len(recoveries) if recoveries else None,
        timeline=timeline,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:  # cut off by a kill
            continue
        if isinstance(record, dict) and "kind" in record and isinstance(record.get("time"), (int, float)):
            records.append(record)
    return records


def _attempts(records: list[dict[str, Any]]) -> list[Attempt]:
    timeline: list[Attempt] = []
    for record in records:
        kind, when = record["kind"], record["time"]
        last = timeline[-1] if timeline else None
        begun_elsewhere = last is None or last.exited or last.first_step is not None
        if kind == "launch" or (kind == "begin" and begun_elsewhere):
            last = Attempt(start=when, end=when, job=record.get("job", ""))
            timeline.append(last)
        if last is None:
            continue
        # Time that no record claims: before the training it is start-up, after it there is no telling.
        spent = sum(record.get("seconds", {}).values())
        rest = when - last.end - spent
        if rest > 0:
            last.spend("startup" if last.first_step is None else "idle", rest)
        last.end = max(last.end, when)
        _enter(last, kind, record)
    return timeline


def _enter(attempt: Attempt, kind: str, record: dict[str, Any]) -> None:
    if kind == "begin":
        attempt.first_step = attempt.step = record["step"]
    elif kind == "time":
        for category, value in record["seconds"].items():
            attempt.spend(category, value)
        attempt.productive.append((record["from_step"], record["step"], record["seconds"].get("productive", 0.0)))
        attempt.step = record["step"]
    elif kind == "checkpoint":
        attempt.saved_step = record["step"]
    elif kind == "end":
        attempt.outcome = record["outcome"]
    elif kind == "exit":
        attempt.outcome, attempt.exited = record["outcome"], True


def _lost_seconds(timeline: list[Attempt], index: int) -> float:
    """Productive seconds of an attempt for steps that a later one made again, or will have to."""
    attempt = timeline[index]
    resumed = [later.first_step for later in timeline[index + 1 :] if later.first_step is not None]
    if resumed:
        kept = min(resumed)
    elif attempt.outcome in FAILURES:
        kept = attempt.saved_step if attempt.saved_step is not None else (attempt.first_step or 0)
    else:
        kept = math.inf
    lost = 0.0
    for first, last, seconds in attempt.productive:
        if last > first:
            lost += seconds * min(1.0, max(0.0, (last - kept) / (last - first)))
        elif last > kept:
            lost += seconds
    return lost


__all__ = ["CATEGORIES", "LEDGER_NAME", "Attempt", "Goodput", "GoodputLedger", "job_hash", "read_goodput"]
