"""Runs that are killed, really, and go on: bit for bit as if they had not been."""

import json
import os
import signal

import pytest
import torch

from tests.trainers.federated.tiny_federation import assert_same, clicks, federation, recommender
from trainers.federated import Bernoulli, FedAdam, FedAvg, FedLaAvg, FedSubAvg
from trainers.federated.client_states import ClientStates
from trainers.federated.commits import Commits


ROUNDS, SAVING = 6, {"save_strategy": "steps", "lr_scheduler_type": "cosine"}
STRATEGIES = {
    "submodels": lambda: FedSubAvg(clients_per_round=4, heat="streaming"),
    "moments": lambda: FedAdam(clients_per_round=4),
    "memory": lambda: FedLaAvg(learning_rate=0.1, clients_per_round=4),
    "server_memory": lambda: FedLaAvg(learning_rate=0.1, clients_per_round=4, memory="server"),
}


@pytest.fixture(autouse=True)
def one_thread():
    """A process with a pool of threads cannot be forked."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def made(folder, strategy, **options):
    present = Bernoulli({f"u{index}": 0.7 for index in range(9)}, seed=3)
    settings = {"rounds": ROUNDS, "args": SAVING, "availability": present} | options
    return federation(folder, recommender(dropout=0.2), clicks(), strategy, **settings)


def killed(folder, strategy, target, method, call, **options):
    """Train in a process that dies, by SIGKILL, when `target.method` is called for the `call`-th time."""
    child = os.fork()
    if child == 0:
        try:
            original, calls = getattr(target, method), []

            def dying(*arguments, **keywords):
                calls.append(0)
                if len(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **keywords)

            setattr(target, method, dying)
            made(folder, strategy, **options).train(resume_from_checkpoint=True)
        finally:
            os._exit(3)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@pytest.mark.fault("kill -9 of a federated server between rounds", survived_if="the run ends bit for bit as without")
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("every", [1, 2])
def test_a_killed_run_ends_where_it_would_have(tmp_path, name, every, survived):
    whole = made(tmp_path / "whole", STRATEGIES[name](), commit_every=every)
    whole.train()
    part = tmp_path / "part"
    # with commits of each second round, the clients are a round ahead of the server when it comes back
    killed(part, STRATEGIES[name](), Commits, "commit", 2, commit_every=every)
    killed(part, STRATEGIES[name](), Commits, "commit", 4, commit_every=every)
    again = made(part, STRATEGIES[name](), commit_every=every)
    output = again.train(resume_from_checkpoint=True)
    assert_same(again.strategy.parameters, whole.strategy.parameters)
    assert again.history == whole.history and output.global_step == ROUNDS
    assert again.meter.totals() == whole.meter.totals() and again.meter.by_round() == whole.meter.by_round()
    rounds = [[e for e in fed.state.log_history if "step_norm" in e] for fed in (again, whole)]
    assert rounds[0] == rounds[1]
    survived(2)


def test_clients_that_are_killed_while_they_write_ask_nothing_of_the_server(tmp_path):
    """The memory of some of a round's clients is written, that of the others not: the round is done again."""
    whole = made(tmp_path / "whole", STRATEGIES["memory"]())
    whole.train()
    killed(tmp_path / "part", STRATEGIES["memory"](), ClientStates, "__setitem__", 10)
    again = made(tmp_path / "part", STRATEGIES["memory"]())
    again.train(resume_from_checkpoint=True)
    assert_same(again.strategy.parameters, whole.strategy.parameters)
    assert again.history == whole.history


def test_a_fresh_run_forgets_what_clients_of_a_dead_one_kept(tmp_path):
    killed(tmp_path, STRATEGIES["memory"](), Commits, "commit", 1)
    assert any((tmp_path / "clients").iterdir())
    fresh = made(tmp_path, STRATEGIES["memory"](), args=SAVING | {"seed": 5})
    fresh.train()
    elsewhere = made(tmp_path / "else", STRATEGIES["memory"](), args=SAVING | {"seed": 5})
    elsewhere.train()
    assert_same(fresh.strategy.parameters, elsewhere.strategy.parameters)


def test_rounds_of_another_run_are_refused(tmp_path):
    made(tmp_path, FedAvg(), rounds=2).train()
    assert sorted(path.name for path in (tmp_path / "rounds").iterdir()) == ["round-00000000", "round-00000001"]
    with pytest.raises(ValueError, match="has rounds up to 1: train"):
        made(tmp_path, FedAvg()).train()
    with pytest.raises(ValueError, match="seed=42 .now 7."):
        made(tmp_path, FedAvg(), args=SAVING | {"seed": 7}).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="strategy='FedAvg'"):
        made(tmp_path, FedAdam()).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="here: strategy.max_update_norm=None .now 3.0."):
        made(tmp_path, FedAvg(max_update_norm=3.0)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="data='sha256:"):
        federation(tmp_path, recommender(dropout=0.2), clicks(seed=1), FedAvg(), rounds=ROUNDS, args=SAVING).train(
            resume_from_checkpoint=True
        )
    with pytest.raises(ValueError, match="is not output_dir"):
        made(tmp_path, FedAvg()).train(resume_from_checkpoint=str(tmp_path / "rounds"))
    longer = made(tmp_path, FedAvg(), args=SAVING)
    assert longer.train(resume_from_checkpoint=str(tmp_path)).global_step == ROUNDS
    # three rounds are kept, and the log has all
    assert len(list((tmp_path / "rounds").glob("round-*"))) == 3
    lines = [json.loads(line) for line in (tmp_path / "federated_log.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines if line["kind"] == "round"] == list(range(ROUNDS))
