"""A whole federation on this machine by one command, in a simulation or as a deployment.

    python -m trainers.federated.engines.flower simulation --clients writer-0000 writer-0001 writer-0002
    python -m trainers.federated.engines.flower deployment --clients writer-0000 writer-0001 writer-0002

A simulation is one SuperLink and Flower's Ray backend. A deployment is what runs on many machines: a SuperLink with a
certificate, which lets in the nodes alone whose keys were registered, and a SuperNode for each client. All is on
127.0.0.1, below one folder, and ends with the command.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from .loopback_keys import CA, CERTIFICATE, KEY, make_certificates, make_node_key
from .nodes import write_identities


EXAMPLE = Path(__file__).parent / "federated_digits"
OUTPUT, MEMORIES, LINK, GRACE = "output", "memories", "loopback", 20.0


class FederationFailed(RuntimeError):
    """A run that did not come to its end; the message has the last lines that it said."""


def simulation(
    app: Path, folder: Path, clients: Sequence[str], *, run_config: Mapping[str, str] | None = None, timeout: float
) -> Path:
    """Run an app in Flower's simulation, one virtual node for each client; the folder of its output.

    Args:
        app: with a `pyproject.toml` for `flwr run`, whose configuration has `num-clients`, `identities`,
            `memory-folder` and `output`.
        folder: for all that Flower and the app write. Run again with `resume = "true"`, the app goes on in it.
        run_config: more of the run configuration, values as TOML has them.
        timeout: seconds for all.

    Raises:
        FederationFailed: see there.
    """
    home, port = _home(folder), _free_ports(3)
    _write_connection(home, f'address = "127.0.0.1:{port[0]}"\ninsecure = true\n')
    memories = {"memory-folder": _text(home.parent / MEMORIES)}
    config = {"num-clients": str(len(clients))} | memories | dict(run_config or {})
    with _started(_superlink(port, "--insecure", "--simulation"), home) as superlink:
        _wait_for(port[0], superlink, home)
        virtual = ["--num-supernodes", str(len(clients)), "--client-resources-num-cpus", "1"]
        _flwr(home, "federation", "simulation-config", "@none/default", LINK, *virtual)
        return _run(app, folder, home, config, timeout=timeout)


def deployment(
    app: Path, folder: Path, clients: Sequence[str], *, run_config: Mapping[str, str] | None = None, timeout: float
) -> Path:
    """Run an app on a SuperLink and a SuperNode for each client, with keys of their own; see [`simulation`]."""
    home = _home(folder)
    keys = home / "keys"
    keys.mkdir(mode=0o700)
    make_certificates(keys)
    made = {client: make_node_key(keys, f"node-{index}") for index, client in enumerate(clients)}
    write_identities(home / "identities.json", {client: public for client, (_, public) in made.items()})
    port = _free_ports(3 + len(clients))
    _write_connection(home, f'address = "127.0.0.1:{port[0]}"\nroot-certificates = "{keys / CA}"\n')
    config = {"num-clients": str(len(clients)), "identities": _text(home / "identities.json")}
    tls = ["--ssl-ca-certfile", keys / CA, "--ssl-certfile", keys / CERTIFICATE, "--ssl-keyfile", keys / KEY]
    with contextlib.ExitStack() as running:
        superlink = running.enter_context(_started(_superlink(port, *tls, "--enable-supernode-auth"), home))
        _wait_for(port[0], superlink, home)
        for index, (client, (private, _)) in enumerate(made.items()):
            _flwr(home, "supernode", "register", private.with_suffix(".pub"), LINK)
            node = {
                "partition-id": str(index),
                "num-partitions": str(len(clients)),
                "client-id": _text(client),
                "memory-folder": _text(home.parent / MEMORIES / f"node-{index}"),
            }
            command = ["flower-supernode", "--root-certificates", keys / CA, "--superlink", f"127.0.0.1:{port[0]}"]
            command += ["--auth-supernode-private-key", private, "--host", "127.0.0.1", "--port", port[3 + index]]
            command += ["--node-config", _assignments(node)]
            running.enter_context(_started(command, home, log=f"supernode-{index}.log"))
        return _run(app, folder, home, config | dict(run_config or {}), timeout=timeout)


def _home(folder: Path) -> Path:
    """Where Flower is at home for one run: a new one each time, or an older SuperLink would be found there."""
    home = Path(folder).resolve() / f"flower-{time.time_ns()}"
    home.mkdir(parents=True)
    return home


def _environment(home: Path) -> dict[str, str]:
    found = os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # else apps run in an environment without this package
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    found.setdefault("OMP_NUM_THREADS", "1")  # nodes share the cores of one machine
    found.setdefault("RAY_worker_niceness", "0")  # by default 15: on a busy machine actors would hardly get on
    return found


def _superlink(port: Sequence[int], *options: object) -> list[object]:
    """Its command; all of its interfaces, the deprecated ones too, on this machine only."""
    command = ["flower-superlink", "--host", "127.0.0.1", "--port", port[0], *options]
    command += ["--fleet-api-address", f"127.0.0.1:{port[1]}", "--control-api-address", f"127.0.0.1:{port[2]}"]
    return [*command, "--disable-runtime-dependency-installation"]


def _write_connection(home: Path, told: str) -> None:
    text = f'[superlink]\ndefault = "{LINK}"\n\n[superlink.{LINK}]\n{told}'
    (home / "config.toml").write_text(text, encoding="utf-8")


def _text(value: object) -> str:
    """A string as TOML has it."""
    return json.dumps(str(value))


def _assignments(config: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in config.items())


@contextlib.contextmanager
def _started(command: Sequence[object], home: Path, *, log: str = "superlink.log") -> Iterator[subprocess.Popen]:
    """A process, and those that it starts, for as long as the context lasts."""
    with open(home / log, "wb") as output:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=_environment(home),
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)  # apps have sessions of their own
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    _, left = psutil.wait_procs(started, GRACE / 2)
    for one in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()


def _wait_for(port: int, process: subprocess.Popen, home: Path, *, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        time.sleep(0.5)
    raise FederationFailed(f"The SuperLink did not start:\n{_tail(home / 'superlink.log')}")


def _flwr(home: Path, *words: object, seconds: float = 120.0) -> str:
    """What a command of Flower's says."""
    command = ["flwr", *map(str, words)]
    done = subprocess.run(
        command, env=_environment(home), cwd=home, capture_output=True, text=True, timeout=seconds, check=False
    )
    if done.returncode:
        raise FederationFailed(f"{' '.join(command[:3])} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def _run(app: Path, folder: Path, home: Path, config: Mapping[str, str], *, timeout: float) -> Path:
    """`flwr run`; it returns 0 when an app fails, so the run's own state is asked for."""
    output = Path(folder).resolve() / OUTPUT
    output.mkdir(parents=True, exist_ok=True)
    told = _assignments({"output": _text(output)} | dict(config))
    said = _flwr(home, "run", Path(app).resolve(), LINK, "--run-config", told, "--format", "json")
    run = str(json.loads(said[said.index("{") :])["run-id"])
    end, status = time.monotonic() + timeout, "unknown"
    with contextlib.suppress(subprocess.TimeoutExpired):
        # lasts as long as the run, and has what the app says on the server
        (home / "run.log").write_text(_flwr(home, "log", run, LINK, "--stream", seconds=timeout), encoding="utf-8")
    while not status.startswith("finished"):
        said = _flwr(home, "list", LINK, "--run-id", run, "--format", "json")
        status = json.loads(said[said.index("{") :])["runs"][0]["status"]
        if time.monotonic() > end:
            break
        time.sleep(1.0)
    logs = "".join(f"\n{path.name}:\n{_tail(path)}" for path in sorted(home.glob("*.log")))
    if status != "finished:completed":
        raise FederationFailed(f"The run is {status!r} after at most {timeout:.0f} s.{logs}")
    return output


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _tail(path: Path, size: int = 3000) -> str:
    return path.read_text(encoding="utf-8", errors="replace")[-size:] if path.exists() else ""
