"""What a run says about its own health: one schema, one file of JSON lines a run.

Measurements (norms, stable ranks, time) are events of severity `"info"`; everything above that is an incident. Every
rank appends to the same `events.jsonl` of the run folder. After the detector contract of the SIGMA stack
(arXiv 2512.13488, platform code): who saw what where, what was done about it, on which evidence, how sure it is.
"""

import json
import math
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from transformers.utils import logging


logger = logging.get_logger(__name__)

EVENTS_NAME = "events.jsonl"

Severity = Literal["info", "warning", "error", "fatal"]
Action = Literal["none", "skip", "rollback", "restore", "stop", "exit", "retry", "exclude"]


@dataclass(frozen=True, kw_only=True)
class Event:
    """One line of the file.

    Args:
        component (`str`): who says it, a module-like name (`"loss_guard"`).
        severity (`str`): `"info"` for a measurement, `"warning"`, `"error"`, or `"fatal"` if the run ends by it.
        action (`str`): what was done about it.
        message (`str`): one sentence for people; empty for measurements.
        step (`int`): optimizer steps that were finished.
        evidence (`dict`): JSON values; NaN and infinities are written as strings.
        confidence (`float`): from 0 to 1, that the accusation is right.
        time (`float`): seconds since the epoch.
        rank (`int`), host (`str`): where it was seen.
    """

    component: str
    severity: Severity
    action: Action = "none"
    message: str = ""
    step: int = 0
    evidence: dict[str, Any] = field(default_factory=dict)
    confidence: float = 1.0
    time: float = field(default_factory=time.time)
    rank: int = 0
    host: str = field(default_factory=socket.gethostname)

    def __post_init__(self):
        for name, known in (("severity", Severity), ("action", Action)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name}={getattr(self, name)!r} is not known. Choose one of {get_args(known)}.")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence={self.confidence} is not between 0 and 1.")


class EventLog:
    """Appends events to the file of a run folder; incidents are logged, too.

    A line is one write to a file opened for appending, so that lines of several ranks do not mix and a killed process
    leaves at most one line cut off, which [`read_events`] passes over, as it does empty lines. A full disk costs
    the line, with a warning, not the run.
    """

    def __init__(self, folder: str | Path, *, rank: int = 0):
        self.path, self.rank = Path(folder) / EVENTS_NAME, rank

    def record(self, component: str, severity: Severity = "info", *, step: int, **fields: Any) -> Event:
        """Write an event and return it; `fields` are those of [`Event`]."""
        event = Event(component=component, severity=severity, step=step, rank=self.rank, **fields)
        if severity != "info":
            say = logger.warning if severity == "warning" else logger.error
            say(f"[{component}] step {step}, rank {self.rank}: {event.message}")
        line = json.dumps(_writable(asdict(event)), allow_nan=False) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(file).st_size
                cut_off = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # by a kill: it must not take this line
                os.write(file, (cut_off * "\n" + line).encode())
            finally:
                os.close(file)
        except OSError as error:
            logger.warning(f"The event of {component} at step {step} was not written to {self.path}: {error}")
        return event


def read_events(folder: str | Path, *, component: str | None = None) -> list[Event]:
    """The events of a run folder in the order of their time, of one component or all; none if there is no file."""
    file = Path(folder) / EVENTS_NAME
    events = _parsed(file.read_text(encoding="utf-8").splitlines()) if file.exists() else ()
    return sorted((e for e in events if component in (None, e.component)), key=lambda event: event.time)


def _parsed(lines: list[str]) -> Iterator[Event]:
    known = {f.name for f in fields(Event)}
    for line in lines:
        try:
            values = json.loads(line)
            event = Event(**{name: value for name, value in values.items() if name in known})
        except (ValueError, TypeError, AttributeError):  # cut off by a kill
            continue
        yield event


def _writable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _writable(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_writable(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


__all__ = ["EVENTS_NAME", "Event", "EventLog", "read_events"]
