import argparse
import contextlib
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.forked import start_ranks
from trainers.reliability import preflight
from trainers.reliability.preflight import (
    Check,
    at_least,
    check_bandwidth,
    check_devices,
    check_gemm,
    check_space,
    check_training,
    main,
    render,
    run_checks,
    similarity,
    summarise,
)
from trainers.reliability.signs import EXIT_FAILED_VALIDATION


CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def options(**changes):
    defaults = {
        "full": False, "folder": Path("."), "devices": None, "min_free_memory": 0.0, "min_free_disk": 0.0,
        "min_bandwidth": None,
    }  # fmt: skip
    return argparse.Namespace(**defaults | changes)


@pytest.mark.parametrize(
    ("a", "b", "cosine", "error"),
    [
        ([3.0, 4.0], [3.0, 4.0], 1.0, 0.0),
        ([6.0, 8.0], [3.0, 4.0], 1.0, 1.0),
        ([4.0, -3.0], [3.0, 4.0], 0.0, 0.0),
        ([0.0, 0.0], [0.0, 0.0], 1.0, 0.0),
        ([0.0, 0.0], [1.0, 0.0], 0.0, math.inf),
    ],
)
def test_similarity(a, b, cosine, error):
    assert similarity(torch.tensor(a), torch.tensor(b)) == pytest.approx((cosine, error))


def test_a_check_fails_below_its_limit_and_on_nan():
    assert at_least("x", 1.0, 1.0).passed and at_least("x", 1.0, None).passed
    assert not at_least("x", 0.99, 1.0).passed and not at_least("x", math.nan, 1.0).passed


def test_a_sound_machine_passes(tmp_path):
    checks = run_checks(options(folder=tmp_path), CPU)
    assert [check.name for check in checks if not check.passed] == []
    assert {"devices", "free disk", "free host memory", "bf16 GEMM cosine", "memory bandwidth"} <= {
        check.name for check in checks
    }


def test_limits_of_devices_and_space(tmp_path):
    assert not check_devices(10_000)[0].passed and check_devices(1)[0].passed
    memory, disk = check_space(tmp_path, CPU, min_memory=1.1, min_disk=1.1)
    assert not memory.passed and not disk.passed
    assert not check_bandwidth(CPU, 1e9)[0].passed


def broken_matmul(change):
    real = torch.Tensor.__matmul__

    def matmul(a, b):
        return change(real(a, b)) if a.dtype == torch.bfloat16 else real(a, b)

    return matmul


def one_row_off(product):
    product = product.clone()
    product[5] *= -4
    return product


@pytest.mark.parametrize("change", [lambda product: 1.05 * product, one_row_off, lambda product: product * math.nan])
def test_a_wrong_gemm_is_seen(monkeypatch, change):
    assert check_gemm(CPU, 256)[0].passed
    monkeypatch.setattr(torch.Tensor, "__matmul__", broken_matmul(change))
    assert not check_gemm(CPU, 256)[0].passed


def test_ten_steps_of_a_moe_agree_with_float64():
    checks = check_training(CPU)
    assert [check.name.split(": ")[1] for check in checks] == ["logits", "gradients", "weight changes"]
    assert all(check.passed and check.value > 0.9999 for check in checks), render(checks, several_ranks=False)


@pytest.mark.parametrize("wrong", ["scaled", "detached"])
def test_ten_steps_of_a_moe_see_a_wrong_backward(monkeypatch, wrong):
    """Forward right, gradient not: what a check of outputs alone passes over."""
    real = torch.nn.functional.silu

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return real(x)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            right = gradient * x.sigmoid() * (1 + x * (1 - x.sigmoid()))
            return 1.2 * right if wrong == "scaled" else 0 * gradient  # 1.2: the cosines stay above 0.99

    from transformers.activations import SiLUActivation

    def forward(self, x):
        return real(x) if x.dtype == torch.float64 else Wrong.apply(x)

    monkeypatch.setattr(SiLUActivation, "forward", forward)
    monkeypatch.setattr(torch.nn.SiLU, "forward", forward)
    logits, gradients, changes = check_training(CPU, steps=2)
    assert logits.passed and not gradients.passed


def test_a_check_that_raises_is_a_failed_one(tmp_path):
    checks = run_checks(options(folder=tmp_path / "absent"), CPU)
    [failed] = [check for check in checks if not check.passed]
    assert failed.name == "space" and "FileNotFoundError" in failed.note
    assert len(checks) == 4


def test_the_table_shows_the_worst_rank():
    checks = [Check(name="a", value=3, rank=0), Check(name="a", value=2, rank=1, passed=False, note="slow")]
    table = render(summarise(checks), several_ranks=True)
    assert table.splitlines()[1].split() == ["a", "2", "FAILED", "rank", "1:", "slow"]


def test_exit_code_17_and_json(tmp_path, capsys):
    arguments = ["--json", "--processes", "1", "--folder", str(tmp_path)]
    assert main([*arguments, "--min_free_memory", "0"]) == 0
    assert json.loads(capsys.readouterr().out)["passed"] is True
    assert main([*arguments, "--devices", "4096"]) == EXIT_FAILED_VALIDATION == 17
    shown = json.loads(capsys.readouterr().out)
    assert shown["passed"] is False
    assert [check["name"] for check in shown["checks"] if not check["passed"]] == ["devices"]


def ask_a_rank(rank, folder):
    with open(f"{folder}/{rank}", "w") as file, contextlib.redirect_stdout(file):
        assert main(["--json", "--min_free_memory", "0", "--min_free_disk", "0"]) == 0


@pytest.mark.parametrize("started", ["by a launcher", pytest.param("by the command", marks=pytest.mark.slow)])
def test_two_processes_reduce_and_each_is_told(started, tmp_path, capsys):
    if started == "by a launcher":
        start_ranks(ask_a_rank, str(tmp_path))
        shown, nothing = ((tmp_path / name).read_text() for name in ("0", "1"))
        assert nothing == ""
    else:
        assert main(["--processes", "2", "--json", "--min_free_memory", "0", "--min_free_disk", "0"]) == 0
        shown = capsys.readouterr().out
    checks = json.loads(shown)["checks"]
    assert {(check["rank"], check["value"]) for check in checks if check["name"] == "all-reduce correct"} == {
        (0, 1.0), (1, 1.0),
    }  # fmt: skip
    assert all(check["value"] > 0 for check in checks if check["name"] == "all-reduce bandwidth")


@pytest.mark.slow
def test_under_a_launcher_every_rank_ends_with_17():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-m", preflight.__name__, "--min_all_reduce", "1e9", "--min_free_disk", "0"]
        environment = os.environ | where | {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [17, 17]
    assert "all-reduce bandwidth" in outputs[0] and "FAILED" in outputs[0] and outputs[1] == ""
