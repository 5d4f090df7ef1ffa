"""Runs that do not die of numbers or machines: the reliability layer of the SIGMA stack for any Trainer."""

from .events import Event, EventLog, read_events


__all__ = ["Event", "EventLog", "read_events"]
