"""Jobs of a test module on real gloo processes."""

import importlib
import os
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp


SECONDS = 300


def results_of_ranks(module: str, folder: Path, *, world_size: int = 2) -> Callable[[str], list[Any]]:
    """Run every job of `JOBS` (`name -> function`) of a test module in one group of processes, one after the other.

    Returns `results(name)`, what each rank returned, which fails where a rank raised. Ranks that hang, because a
    collective was entered by some only, fail the test that started them.
    """
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(_run_jobs, args=(module, port, str(folder), world_size), nprocs=world_size, join=False)
    deadline = time.monotonic() + SECONDS
    while not processes.join(timeout=5):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks hang; finished jobs: {sorted(path.name for path in folder.iterdir())}")

    def results(name: str) -> list[Any]:
        found = [torch.load(folder / f"{name}-{rank}.pt", weights_only=False) for rank in range(world_size)]
        for rank, result in enumerate(found):
            assert "error" not in result, f"rank {rank}: {result['error']}"
        return [result["value"] for result in found]

    return results


def _run_jobs(rank: int, module: str, port: int, folder: str, world_size: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    for name, job in importlib.import_module(module).JOBS.items():
        try:
            result = {"value": job()}
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, f"{folder}/{name}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
