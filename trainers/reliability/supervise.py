"""Launch a job again until it is done, if that can help: `python -m trainers.reliability.supervise -- COMMAND`.

    python -m trainers.reliability.supervise -- accelerate launch -m trainers.recipes.NAME --output_dir RUN

How an attempt ended decides what follows (after the retry table of the SIGMA stack's platform, arXiv 2512.13488; the
codes are ours but for 16 and 17): never again, always again, or up to `--max_retries` times in all. Between attempts
it waits, twice as long each time that brought nothing. Two attempts in a row that leave the newest checkpoint where it
was end it, whatever the table says.

Launchers hide exit codes: `accelerate launch` and `torchrun` end with 1 whatever their workers ended with. Where the
run folder holds a fatal event of the attempt with `exit_code` in its evidence, as the hang watchdog writes it, that
code counts.

To stop: create the stop file, or send SIGTERM or SIGINT to this process. Both ask
[`trainers.callbacks.graceful_stop.GracefulStopCallback`] for a checkpoint through the stop file; after `--grace`
seconds, or at a second signal, the job gets the signal itself, and 30 s later SIGKILL. SIGHUP, SIGUSR1 and SIGUSR2 are
passed on.

Hosts: with `--hostfile` (a host a line) the words `{hosts}`, `{hostfile}` and `{num_hosts}` of the command stand for
the first `--num_hosts` hosts that no event accuses: `accused_host` in its evidence, `--accusations` times within
`--accusation_hours`, with a confidence of at least 0.8; exit code 16 accuses its host at once. That serves launchers
that start remote processes themselves (mpirun, deepspeed, pdsh). One `accelerate launch` a node is started by the
cluster's scheduler, which alone can replace the node: give it `excluded_hosts` of the supervisor's last event.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..redaction import command_line
from .events import Event, EventLog, read_events
from .goodput import JOB_VARIABLE, GoodputLedger, Outcome, job_hash
from .signs import EXIT_FAILED_VALIDATION, EXIT_HUNG, EXIT_SUSPECT, STOP_NAME


Reaction = Literal["never", "always"] | int | None  # a number: so many retries; None: --max_retries

ATTEMPT_VARIABLE = "HF_SIGMA_ATTEMPT"
KILL_SECONDS = 30.0
SURE = 0.8  # of an accusation
FORWARDED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Ending:
    """What an exit code means: for people, for the ledger, and whether another attempt can help."""

    words: str
    outcome: Outcome
    reaction: Reaction = None


ENDINGS: dict[int, Ending] = {
    0: Ending("finished", "succeeded", "never"),
    2: Ending("its command line was wrong", "software_failure", "never"),
    EXIT_SUSPECT: Ending("a wrong result came again on the same hardware: go on elsewhere", "hardware_failure"),
    EXIT_FAILED_VALIDATION: Ending("validation of results or hardware failed", "hardware_failure", "never"),
    EXIT_HUNG: Ending("hung", "platform_failure"),
    126: Ending("the command cannot be executed", "software_failure", "never"),
    127: Ending("the command was not found", "software_failure", "never"),
    128 + signal.SIGINT: Ending("interrupted", "user_stop", "never"),
    128 + signal.SIGKILL: Ending("killed (out of memory, or evicted)", "platform_failure"),
    128 + signal.SIGTERM: Ending("terminated by the platform", "platform_failure", "always"),
    128 + signal.SIGBUS: Ending("bus error", "hardware_failure"),
    128 + signal.SIGSEGV: Ending("segmentation fault", "software_failure"),
    128 + signal.SIGABRT: Ending("aborted", "software_failure"),
}
UNKNOWN = Ending("failed for a reason that its exit code does not tell", "software_failure")
STOPPED = Ending("stopped with a checkpoint, as its user asked", "user_stop", "never")
PREEMPTED = Ending("stopped with a checkpoint, as the platform asked", "platform_failure", "always")


@dataclass
class Supervisor:
    """One job and its attempts; the fields are the options of the command line.

    `run` returns the exit code of the job's last attempt, 128 + n if a signal n ended it.
    """

    command: list[str]
    run_folder: Path | None = None
    max_retries: int = 10
    patience: int = 2
    backoff: float = 10.0
    backoff_max: float = 600.0
    grace: float = 60.0
    add_resume: bool = False
    reactions: dict[int, Reaction] = field(default_factory=dict)
    hosts: list[str] = field(default_factory=list)
    num_hosts: int | None = None
    accusations: int = 3
    accusation_hours: float = 24.0

    def __post_init__(self):
        self.job = job_hash(self.command)
        self._events = EventLog(self.run_folder) if self.run_folder else None
        self._ledger = GoodputLedger(self.run_folder) if self.run_folder else None
        self._process: subprocess.Popen | None = None
        self._signals: list[int] = []
        self._asked_at: float | None = None

    def run(self) -> int:
        """Attempt the job until it is finished, hopeless or stopped."""
        self._clear_stop_file()
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        before |= {number: signal.signal(number, self._on_signal) for number in FORWARDED}
        try:
            return self._attempts()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _attempts(self) -> int:
        used: Counter[int] = Counter()
        idle = attempt = 0
        saved = newest_step(self.run_folder)
        while True:
            attempt += 1
            started = time.time()
            code = self._attempt(attempt)
            code = self._real_code(code, started)
            ending = self._ending(code, started)
            if self._ledger is not None:
                self._ledger.exit(outcome=ending.outcome, code=code)
            step, last = newest_step(self.run_folder), saved
            idle = 0 if step > last else idle + 1
            saved = max(step, saved)
            used[code] += 1
            reason = self._reason_to_stop(code, ending, used, idle, saved)
            how = f"attempt {attempt} {ending.words} (exit code {code})"
            if reason is not None:
                severity = "info" if ending.outcome in ("succeeded", "user_stop") else "error"
                self._say(severity, f"{how}; {reason}", saved, "stop", code)
                return code
            delay = min(self.backoff_max, self.backoff * 2 ** max(0, idle - 1))
            self._say("warning", f"{how}; the next begins in {delay:g} s from step {saved}.", saved, "retry", code)
            if not self._sleep(delay):
                self._say("info", "stopped by its user between two attempts.", saved, "stop", code)
                return code

    def _reason_to_stop(self, code: int, ending: Ending, used: Counter, idle: int, saved: int) -> str | None:
        reaction = self.reactions.get(code, ending.reaction)
        if ending in (STOPPED, PREEMPTED):
            reaction = ending.reaction
        limit = self.max_retries if reaction is None else reaction
        if reaction == "never":
            return "another attempt would not help." if ending.outcome.endswith("failure") else "done."
        if limit != "always" and used[code] > limit:
            return f"that was retry {limit} of {limit} for this exit code. Look at events.jsonl, then start it again."
        if self.run_folder is not None and idle >= self.patience:
            return (
                f"the last {idle} attempts ended with the newest checkpoint at step {saved}, where they had begun: it "
                "fails at the same place, or does not reach its next save. Mend the cause, or save more often."
            )
        healthy = len(self._healthy_hosts())
        if healthy < self._wanted():
            return f"{healthy} healthy hosts are left of {len(self.hosts)}, {self._wanted()} are wanted."
        return None

    def _attempt(self, attempt: int) -> int:
        if self._ledger is not None:
            self._ledger.launch(job=self.job)
        self._asked_at = None
        environment = os.environ | {ATTEMPT_VARIABLE: str(attempt), JOB_VARIABLE: self.job}
        try:
            # A group of its own: its processes get signals from here, not twice from the terminal.
            self._process = subprocess.Popen(self._command(attempt), env=environment, start_new_session=True)
        except OSError as error:
            print(f"{self.command[0]} cannot be started: {error}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
        try:
            return self._wait()
        finally:
            self._process = None

    def _wait(self) -> int:
        process = self._process
        while True:
            self._serve_signals(process)
            code = process.poll()
            # Asked to stop, a launcher is gone at once, while its workers still save.
            workers_save = self._asked_at is not None and self._stage < 2 and _group_lives(process.pid)
            if code is not None and not workers_save:
                break
            time.sleep(0.05)
        if _group_lives(process.pid):  # workers that outlived their launcher would hold the devices
            _kill(process.pid, signal.SIGKILL)
        return code if code >= 0 else 128 - code

    def _serve_signals(self, process: subprocess.Popen) -> None:
        for number in self._signals[:]:
            self._signals.remove(number)
            if number in FORWARDED:
                _kill(process.pid, number)
            elif self._asked_at is None:
                self._asked_at = time.monotonic()
                self._stop_signal, self._stage = number, 0
                if self.run_folder is not None:
                    self.run_folder.mkdir(parents=True, exist_ok=True)
                    (self.run_folder / STOP_NAME).touch()
                else:
                    self._escalate(process)
            else:
                self._escalate(process)
        if self._asked_at is not None:
            waited = time.monotonic() - self._asked_at
            if waited > (self.grace, self.grace + KILL_SECONDS, float("inf"))[self._stage]:
                self._escalate(process)

    def _escalate(self, process: subprocess.Popen) -> None:
        _kill(process.pid, self._stop_signal if self._stage == 0 else signal.SIGKILL)
        self._stage = min(self._stage + 1, 2)

    def _on_signal(self, number: int, frame) -> None:
        self._signals.append(number)

    def _sleep(self, seconds: float) -> bool:
        """Whether the time went by without a request to stop."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self._stop_file_exists() or any(number not in FORWARDED for number in self._signals):
                return False
            time.sleep(0.05)
        return True

    def _real_code(self, code: int, started: float) -> int:
        if code in (0, 127, 126) or self.run_folder is None:
            return code
        codes = [e.evidence.get("exit_code") for e in self._incidents(started) if e.severity == "fatal"]
        codes = [number for number in codes if isinstance(number, int)]
        return codes[0] if codes else code

    def _ending(self, code: int, started: float) -> Ending:
        stopped = [e for e in self._incidents(started) if e.component == "graceful_stop"]
        # SIGTERM that did not come through here came from the platform; the file is a person's.
        if self._asked_at is not None or any(e.evidence.get("file") for e in stopped) or self._stop_file_exists():
            return STOPPED
        if stopped and code in (0, 128 + signal.SIGTERM):
            return PREEMPTED
        return ENDINGS.get(code, UNKNOWN)

    def _incidents(self, since: float) -> list[Event]:
        events = read_events(self.run_folder) if self.run_folder is not None else []
        return [e for e in events if e.time >= since and e.severity != "info"]

    def _command(self, attempt: int) -> list[str]:
        words = list(self.command)
        if self.hosts:
            chosen = self._healthy_hosts()[: self._wanted()]
            file = (self.run_folder or Path.cwd()) / "hosts.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(f"{host}\n" for host in chosen), encoding="utf-8")
            names = {"{hosts}": ",".join(h.split()[0] for h in chosen), "{num_hosts}": str(len(chosen))}
            names["{hostfile}"] = str(file)
            for mark, value in names.items():
                words = [word.replace(mark, value) for word in words]
        if self.add_resume and self.run_folder is not None:
            from .checkpoints import find_last_valid_checkpoint  # brings torch, which watching a process needs not

            if (checkpoint := find_last_valid_checkpoint(self.run_folder, log=self._events)) is not None:
                words += ["--resume_from_checkpoint", str(checkpoint)]
        return words

    def _wanted(self) -> int:
        return self.num_hosts or len(self.hosts)

    def _healthy_hosts(self) -> list[str]:
        since = time.time() - 3600 * self.accusation_hours
        accused: Counter[str] = Counter()
        for event in read_events(self.run_folder) if self.run_folder is not None else []:
            if event.time < since or event.severity == "info" or event.confidence < SURE:
                continue
            if "accused_host" in event.evidence:
                accused[event.evidence["accused_host"]] += 1
            elif event.evidence.get("exit_code") == EXIT_SUSPECT:  # that code asks for other hardware
                accused[event.host] += self.accusations
        return [line for line in self.hosts if accused[line.split()[0]] < self.accusations]

    def _stop_file_exists(self) -> bool:
        return self.run_folder is not None and (self.run_folder / STOP_NAME).exists()

    def _clear_stop_file(self) -> None:
        if self._stop_file_exists():
            print(f"A {STOP_NAME} file from an earlier run is removed.", file=sys.stderr)
            (self.run_folder / STOP_NAME).unlink()

    def _say(self, severity: str, message: str, step: int, action: str, code: int) -> None:
        if self._events is None or severity == "info":  # incidents are logged by whoever records them
            print(f"[supervisor] {message}", file=sys.stderr, flush=True)
        if self._events is None:
            return
        evidence: dict[str, object] = {"job": self.job, "last_exit_code": code}
        if self.hosts:
            healthy = self._healthy_hosts()
            evidence["excluded_hosts"] = [h.split()[0] for h in self.hosts if h not in healthy]
        self._events.record("supervisor", severity, step=step, action=action, message=message, evidence=evidence)


def newest_step(run_folder: Path | None) -> int:
    """The highest step of a `checkpoint-*` whose `trainer_state.json`, which Trainer writes last, is whole; or 0."""
    found = [p for p in run_folder.glob("checkpoint-*") if p.name[11:].isdigit()] if run_folder is not None else []
    for folder in sorted(found, key=lambda p: int(p.name[11:]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return int(folder.name[11:])
    return 0


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _kill(group: int, number: int) -> None:
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        pass


def _reaction(text: str) -> tuple[int, Reaction]:
    code, _, wish = text.partition("=")
    try:
        return int(code), wish if wish in ("never", "always") else int(wish)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write CODE=never, CODE=always or CODE=N") from None


def _parse(argv: list[str] | None) -> Supervisor:
    words = list(sys.argv[1:] if argv is None else argv)
    if "--" not in words:
        words.append("--")
    options, command = words[: words.index("--")], words[words.index("--") + 1 :]
    parser = argparse.ArgumentParser(
        prog="python -m trainers.reliability.supervise", usage="%(prog)s [options] -- COMMAND", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--run_folder", type=Path, help="default: the --output_dir of the command, if it has one")
    parser.add_argument(
        "--max_retries", type=int, default=10, help="retries in all for codes that are not sure to help"
    )
    parser.add_argument("--patience", type=int, default=2, help="attempts in a row without a newer checkpoint")
    parser.add_argument("--backoff", type=float, default=10.0, help="seconds before the first retry")
    parser.add_argument("--backoff_max", type=float, default=600.0, help="seconds before a retry at most")
    parser.add_argument("--grace", type=float, default=60.0, help="seconds from the stop file to the signal")
    parser.add_argument("--add_resume", action="store_true", help="add --resume_from_checkpoint (recipes need it not)")
    parser.add_argument("--reaction", type=_reaction, action="append", default=[], metavar="CODE=never|always|N")
    parser.add_argument("--hostfile", type=Path, help="a host a line, the first word; see above")
    parser.add_argument("--num_hosts", type=int, help="how many of them to use; default: all, which leaves no spare")
    parser.add_argument("--accusations", type=int, default=3, help="accusations after which a host is left out")
    parser.add_argument("--accusation_hours", type=float, default=24.0, help="age beyond which one is forgotten")
    args = parser.parse_args(options)
    if not command:
        parser.error("there is no command; write it after `--`: ... -- accelerate launch -m trainers.recipes.NAME ...")
    if args.patience < 1 or args.backoff < 0 or args.max_retries < 0:
        parser.error("--patience must be at least 1, --backoff and --max_retries must not be negative")
    lines = args.hostfile.read_text(encoding="utf-8").splitlines() if args.hostfile is not None else []
    options = {name: value for name, value in vars(args).items() if name not in ("hostfile", "reaction")}
    options["run_folder"] = args.run_folder or _output_dir(command)
    hosts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return Supervisor(command, **options, reactions=dict(args.reaction), hosts=hosts)


def _output_dir(command: list[str]) -> Path | None:
    for position, word in enumerate(command):
        if word == "--output_dir" and position + 1 < len(command):
            return Path(command[position + 1])
        if word.startswith("--output_dir="):
            return Path(word.partition("=")[2])
    return None


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; the exit code of the job's last attempt."""
    supervisor = _parse(argv)
    print(f"[supervisor] job {supervisor.job[:12]}: {command_line(supervisor.command)}", file=sys.stderr, flush=True)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
