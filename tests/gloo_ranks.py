"""Jobs of a test module on real gloo processes."""

import importlib
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.forked import start_ranks


SECONDS = 300


def results_of_ranks(module: str, folder: Path, *, world_size: int = 2) -> Callable[[str], list[Any]]:
    """Run every job of `JOBS` (`name -> function`) of a test module in one group of processes, one after the other.

    Returns `results(name)`, what each rank returned, which fails where a rank raised. Ranks that hang, because a
    collective was entered by some only, fail the test that started them.
    """
    torch.set_num_threads(1)
    processes = start_ranks(_run_jobs, module, str(folder), world_size, world_size=world_size, join=False)
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


def _run_jobs(rank: int, module: str, folder: str, world_size: int) -> None:
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
