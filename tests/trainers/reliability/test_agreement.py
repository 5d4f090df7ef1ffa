"""Two real gloo processes take decisions together."""

from datetime import timedelta

import torch
import torch.distributed as dist

from tests.forked import start_ranks
from trainers.reliability.agreement import any_rank, from_all_ranks


def ask(rank, folder):
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=60))
    answers = {
        "nobody": any_rank(False),
        "rank 1": any_rank(rank == 1),
        "rank 0": any_rank(rank == 0, device=torch.device("cpu")),
        "both": any_rank(True),
        "gathered": from_all_ranks({"rank": rank, "words": ["x"] * rank}),
    }
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_agree(tmp_path):
    start_ranks(ask, str(tmp_path))
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert both[0] == both[1]
    assert both[0] == {
        "nobody": False,
        "rank 1": True,
        "rank 0": True,
        "both": True,
        "gathered": [{"rank": 0, "words": []}, {"rank": 1, "words": ["x"]}],
    }


def test_alone_there_is_nobody_to_ask():
    assert any_rank(True) is True and any_rank(False) is False
    assert from_all_ranks("x") == ["x"]
