"""The health of a run on one page: `python -m trainers.reliability.report RUN_FOLDER`.

Reads what is there of `events.jsonl`, `goodput.jsonl` and the newest `trainer_state.json`, and writes `reliability.md`
and `reliability.png` beside them. No component is needed: what was not measured has no panel and no line.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..redaction import without_tokens
from ..report import write_text_atomically
from .events import Event, read_events
from .goodput import CATEGORIES, FAILURES, Goodput, read_goodput


PAGE_NAME, FIGURE_NAME = "reliability.md", "reliability.png"
MAX_ROWS = 30
_ORDER = {"fatal": 0, "error": 1, "warning": 2}


@dataclass(kw_only=True)
class Run:
    """What is known of a run: the rows of Trainer's log, its events in order, and the sums of its ledger."""

    folder: Path
    history: list[dict[str, Any]]
    events: list[Event]
    goodput: Goodput | None

    @property
    def incidents(self) -> list[Event]:
        """Events above a measurement."""
        return [event for event in self.events if event.severity != "info"]

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number in the log."""
        rows = [(row["step"], row[name]) for row in self.history if "step" in row and _is_number(row.get(name))]
        return [step for step, _ in rows], [value for _, value in rows]


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        FileNotFoundError: it holds neither events, nor a ledger, nor the state of a Trainer.
    """
    folder = Path(folder)
    run = Run(folder=folder, history=_history(folder), events=read_events(folder), goodput=read_goodput(folder))
    if not run.history and not run.events and run.goodput is None:
        raise FileNotFoundError(
            f"{folder} holds neither events.jsonl, nor goodput.jsonl, nor a trainer_state.json. Give the --output_dir "
            "of a run."
        )
    return run


def _history(folder: Path) -> list[dict[str, Any]]:
    longest: tuple[int, list] = (-1, [])
    for file in (folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
            longest = max(longest, (state["global_step"], state["log_history"]), key=lambda found: found[0])
        except (OSError, ValueError, KeyError, TypeError):  # absent, or cut off by a kill
            continue
    return [row for row in longest[1] if isinstance(row, dict)]


def write_report(folder: str | Path) -> Path:
    """Write page and figure into the run folder; returns the page.

    Raises:
        FileNotFoundError: there is nothing to report on.
    """
    from .health_figure import health_figure  # matplotlib takes its second only when it is wanted

    run = read_run(folder)
    drawn = health_figure(run, run.folder / FIGURE_NAME)
    page = run.folder / PAGE_NAME
    write_text_atomically(page, without_tokens(render(run, figure=FIGURE_NAME if drawn else None)))
    return page


def render(run: Run, *, figure: str | None = None) -> str:
    """The page in Markdown."""
    lines = [f"# Health of the run {_cell(run.folder.resolve().name)}", "", *_verdict(run), ""]
    if figure is not None:
        lines += [f"![Loss, norms, balance, time and incidents of the run]({figure})", ""]
    if run.goodput is not None:
        lines += ["## Where the time went", "", *_time_table(run.goodput), ""]
    lines += ["## Incidents", "", *_incident_table(run.incidents), ""]
    return "\n".join(lines)


def _verdict(run: Run) -> list[str]:
    """The page in a few lines, worst first."""
    incidents = run.incidents
    lines = []
    fatal = [event for event in incidents if event.severity == "fatal"]
    if fatal:
        last = fatal[-1]
        lines.append(f"- **Ended by {_cell(last.component)}** at step {last.step}: {_cell(last.message)}")
    if incidents:
        counts = {s: sum(event.severity == s for event in incidents) for s in _ORDER}
        lines.append(f"- {len(incidents)} incidents: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n) + ".")
    else:
        lines.append("- No incident.")
    steps, losses = run.curve("loss")
    if steps:
        lines.append(f"- Step {steps[-1]}, loss {losses[-1]:.4g} (lowest {min(losses):.4g}).")
    if run.goodput is not None:
        lines += _time_lines(run.goodput)
    return lines


def _time_lines(goodput: Goodput) -> list[str]:
    lines = [
        f"- {goodput.effective_time_ratio:.1%} of {duration(goodput.wall_seconds)} were productive; attempts: "
        + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in goodput.attempts.items())
        + "."
    ]
    failures = sum(goodput.attempts.get(outcome, 0) for outcome in FAILURES)
    if goodput.mtbf_seconds is not None:
        text = f"- {failures} failures, one in {duration(goodput.mtbf_seconds)} of running"
        if goodput.recovery_seconds is not None:
            text += f"; the next attempt began {duration(goodput.recovery_seconds)} later in the mean"
        lines.append(text + ".")
    return lines


def _time_table(goodput: Goodput) -> list[str]:
    lines = ["| category | time | share |", "|---|---:|---:|"]
    for name in CATEGORIES:
        seconds = goodput.seconds[name]
        share = seconds / goodput.wall_seconds if goodput.wall_seconds else 0.0
        lines.append(f"| {name.replace('_', ' ')} | {duration(seconds)} | {share:.1%} |")
    return lines


def _incident_table(incidents: Sequence[Event]) -> list[str]:
    """One row for incidents of one kind: a rank that is slow all night is one line."""
    if not incidents:
        return ["None."]
    kinds: dict[tuple[str, str, str], list[Event]] = {}
    for event in incidents:
        kinds.setdefault((event.severity, event.component, event.action), []).append(event)
    order = sorted(kinds, key=lambda kind: (_ORDER[kind[0]], kinds[kind][0].time))
    lines = ["| severity | component | action | times | steps | ranks | hosts | last message |", "|---" * 8 + "|"]
    for kind in order[:MAX_ROWS]:
        events = kinds[kind]
        steps = sorted({event.step for event in events})
        span = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        ranks = _several(sorted({str(event.evidence.get("accused_rank", event.rank)) for event in events}))
        hosts = _several(sorted({str(event.evidence.get("accused_host", event.host)) for event in events}))
        cells = [*kind, str(len(events)), span, ranks, hosts, events[-1].message]
        lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    if len(order) > MAX_ROWS:
        lines.append(f"\n{len(order) - MAX_ROWS} more kinds are in events.jsonl.")
    return lines


def _several(names) -> str:
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _cell(text: str) -> str:
    """Messages hold what the run met, names of files and tensors: none of it may become Markdown or HTML."""
    text = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    for mark in "\\|`*_[]":
        text = text.replace(mark, f"\\{mark}")
    return text if len(text) <= 400 else f"{text[:400]}..."


def duration(seconds: float) -> str:
    """`"45 s"`, `"12 min"`, `"3.5 h"`, `"2.1 days"`."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else "0 s"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def main(argv: Sequence[str] | None = None) -> int:
    """Command-line entry; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainers.reliability.report", description=__doc__)
    parser.add_argument("run_folder", type=Path)
    args = parser.parse_args(argv)
    try:
        page = write_report(args.run_folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
