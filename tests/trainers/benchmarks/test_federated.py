"""The benchmark of federated rounds: both arms end at the same parameters, and figures fit the seconds."""

import json

import pytest
import torch

from trainers.benchmarks.__main__ import main


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_command_writes_json(tmp_path, capsys):
    shape = ["--embedding-dim", "2", "--hidden-sizes", "3", "--clients", "6", "--samples", "7", "--items", "9"]
    rounds = ["--clients-per-round", "3", "--local-steps", "3", "--batch-size", "4", "--memory-clients"]
    rounds += ["--blocks", "10", "--steps-per-block", "1"]
    main(["federated", *shape, *rounds, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("federated-*.json")
    report = json.loads(path.read_text())
    (comparison,) = [item for item in report["comparisons"] if item["baseline"] == "a plain loop"]
    assert comparison["largest_difference"] < 1e-6
    assert comparison["ours_updates_per_second"] == pytest.approx(3 / comparison["process"]["ours_seconds"])
    assert (report["clients"], report["samples_per_client"], report["memory"]) == (6, 7, [])
    table = capsys.readouterr().out
    assert "| a plain loop |" in table and str(path) in table


@pytest.mark.slow
def test_memory_does_not_grow_with_the_clients(tmp_path):
    """The same rows, of 20 and of 2,000 clients: 20 MB are less than 2,000 models would take."""
    options = ["--samples", "10", "--items", "2000", "--embedding-dim", "16", "--clients-per-round", "10"]
    main(["federated", *options, "--clients", "40", "--memory-clients", "20", "2000", "--output", str(tmp_path)])
    few, many = json.loads(next(tmp_path.glob("federated-*.json")).read_text())["memory"]
    assert abs(many["peak_bytes"] - few["peak_bytes"]) < 20e6
