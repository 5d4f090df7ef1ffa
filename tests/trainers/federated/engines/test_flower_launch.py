"""One command runs the example in Ray and as a deployment with keys, and both end at the bits of one process."""

import json
import shutil
import ssl
import stat
import sys
import tomllib
from pathlib import Path

import pytest
import torch


pytest.importorskip("flwr")

from safetensors.torch import load_file  # noqa: E402

from tests.trainers.federated.tiny_federation import assert_same  # noqa: E402
from trainers.federated.engines.flower import read_identities  # noqa: E402
from trainers.federated.engines.flower.__main__ import main  # noqa: E402
from trainers.federated.engines.flower.launch import EXAMPLE, FederationFailed  # noqa: E402
from trainers.federated.engines.flower.loopback_keys import (  # noqa: E402
    CA,
    CERTIFICATE,
    KEY,
    make_certificates,
    make_node_key,
)


CLIENTS = ["writer-0000", "writer-0001", "writer-0002"]


@pytest.fixture
def digits(monkeypatch):
    """The example's module."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import federated_digits

    yield federated_digits
    sys.modules.pop("federated_digits")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _in_process(digits, folder, **changes):
    """The example without Flower."""
    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    config |= {"output": str(folder)} | changes
    trainer = digits.federation(config, train_dataset=digits.examples(3), partition_by="client")
    trainer.train()
    return trainer


def _still_running(folder):
    """Processes whose environment has the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if str(folder).encode() in path.read_bytes() and path.parent.name != "self":
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return [command for command in found if "flwr" in command or "flower" in command or "ray" in command]


def _assert_as_in_process(output, trainer):
    results = json.loads((output / "results.json").read_text())
    assert_same(load_file(output / "model.safetensors"), trainer.strategy.parameters)
    assert results["history"] == trainer.history and results["clients"] == CLIENTS
    assert results["rounds"] == trainer.rounds and results["accuracy"] > 0.8


def test_certificates_are_a_chain_and_secrets_are_the_owners(tmp_path):
    make_certificates(tmp_path)
    private, public = make_node_key(tmp_path, "node-0")
    client = ssl.create_default_context(cafile=tmp_path / CA)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(tmp_path / CERTIFICATE, tmp_path / KEY)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname="127.0.0.1")
    theirs = server.wrap_bio(to_server, to_client, server_side=True)
    done = set()
    for _ in range(6):
        for side in (ours, theirs):
            try:
                side.do_handshake()
                done.add(side)
            except ssl.SSLWantReadError:
                continue
    assert done == {ours, theirs} and ours.getpeercert()["subject"] == ((("commonName", "localhost"),),)
    assert private.with_suffix(".pub").read_text().strip() == public
    assert all(stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600 for name in (KEY, private.name))


def test_clients_of_the_example_are_parts_of_the_file(digits):
    rows = digits.examples(3)
    assert len(rows) + len(digits.held_out()) == 1797
    assert rows["client"] == sorted(rows["client"]) and set(rows["client"]) == set(CLIENTS)
    assert digits.examples(3, only=1)["pixels"] == [row["pixels"] for row in rows if row["client"] == CLIENTS[1]]


@pytest.mark.slow
def test_a_simulation_that_is_taken_up_again_ends_at_the_bits_of_one_process(digits, tmp_path):
    for change in (["rounds=3"], ["rounds=5", "resume=true"]):
        main(["simulation", "--folder", str(tmp_path / "ray"), "--timeout", "900", "--run-config", *change])
    _assert_as_in_process(tmp_path / "ray" / "output", _in_process(digits, tmp_path / "alone"))
    assert len(list((tmp_path / "ray" / "memories").glob("*/*.safetensors"))) == 3
    assert _still_running(tmp_path) == []


@pytest.mark.slow
def test_a_deployment_with_keys_ends_at_the_bits_of_one_process(digits, tmp_path):
    main(["deployment", "--folder", str(tmp_path / "nodes"), "--timeout", "1500"])
    _assert_as_in_process(tmp_path / "nodes" / "output", _in_process(digits, tmp_path / "alone"))
    (home,) = (tmp_path / "nodes").glob("flower-*")
    assert list(read_identities(home / "identities.json")) == CLIENTS
    assert [len(list((tmp_path / "nodes" / "memories" / f"node-{i}").glob("*/*"))) for i in range(3)] == [1, 1, 1]
    assert _still_running(tmp_path) == []


IMPOSTOR = """

def somebody_else(context):
    return federation(context.run_config, train_dataset=examples(2, only=0), partition_by="client")


client_app = flower_client_app(somebody_else, client=lambda context, trainer: "writer-0000")
"""


@pytest.mark.slow
def test_a_superlink_tells_who_is_not_whom_it_says(tmp_path):
    """Both nodes have keys that are registered, and both say that they are the first."""
    app = shutil.copytree(EXAMPLE, tmp_path / "app", ignore=shutil.ignore_patterns("__pycache__"))
    with open(app / "federated_digits.py", "a") as file:
        file.write(IMPOSTOR)
    words = ["deployment", "--app", str(app), "--folder", str(tmp_path), "--timeout", "900"]
    with pytest.raises(FederationFailed, match="finished:failed") as failed:
        main([*words, "--clients", *CLIENTS[:2], "--run-config", "registration-timeout=240.0"])
    said = " ".join(str(failed.value).split())
    assert "says that it is 'writer-0000', by its key it is 'writer-0001'" in said
    assert "these clients are missing: ['writer-0001']" in said
    assert _still_running(tmp_path) == []


@pytest.mark.slow
def test_an_app_that_fails_fails_the_command(tmp_path):
    """`flwr run` itself would return 0."""
    with pytest.raises(FederationFailed, match="finished:failed"):
        main(["simulation", "--folder", str(tmp_path), "--timeout", "600", "--run-config", "clients-per-round=0"])
    assert _still_running(tmp_path) == []
