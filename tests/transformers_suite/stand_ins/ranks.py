"""Stands in for a file that transformers' source archive lacks: starts the ranks of a distributed test.

Only what the CPU needs; transformers' own helper also places ranks on accelerators.
"""

import functools
import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _get_distributed_device_type():
    return "cpu"


def _get_distributed_backend():
    return "gloo"


def _get_rank_device(rank):
    return torch.device("cpu")


def _set_rank_device(rank):
    pass


def _start_rank_processes(function, args, nprocs):
    # Ranks fork from a server that has done the imports: spawned, each would spend longer on them than on its test.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["hf_models", "transformers.testing_utils"])
    mp.start_processes(function, args=args, nprocs=nprocs, start_method="forkserver")


def _run_rank(rank, function, world_size, port, args, kwargs):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    store = dist.TCPStore("localhost", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    function(rank, *args, **kwargs)
    dist.barrier()
    dist.destroy_process_group()


def run_distributed(world_size):
    """Decorator: run `function(rank, ...)` in `world_size` processes; the first exception of a rank is raised."""

    def decorate(function):
        @functools.wraps(function)
        def run(*args, **kwargs):
            # Held by this process until the ranks are done, so that no other test can claim the port meanwhile.
            store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            _start_rank_processes(_run_rank, (function, world_size, store.port, args, kwargs), world_size)

        return run

    return decorate
