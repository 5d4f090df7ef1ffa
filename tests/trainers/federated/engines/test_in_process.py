"""Two real processes give the bits of one; parts of batches add up; what fails in one fails in all."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch

from tests.gloo_ranks import results_of_ranks
from tests.trainers.federated.tiny_federation import (
    Quadratic,
    assert_same,
    clicks,
    federation,
    quadratic_clients,
    recommender,
)
from trainers.federated import MCPSGD, BlockSchedule, FedAvg, FedLaAvg, FedSubAvg, Robust
from trainers.reliability.agreement import from_all_ranks


def _trained(strategy, folder=None, **options):
    """What a run ends at, and what it logged."""
    args = {"save_strategy": "steps"} if folder else {}
    fed = federation(
        folder or tempfile.mkdtemp(), recommender(dropout=0.3), clicks(), strategy, rounds=3, args=args, **options
    )
    fed.train()
    keep = ("accepted", "rejected", "missing", "norms", "elementwise_gradient_norm", "loss", "bytes_up", "bytes_down")
    history = [{name: record[name] for name in keep} for record in fed.history]
    return fed.strategy.parameters, history


def _shared_folder():
    """One for all ranks."""
    return from_all_ranks(tempfile.mkdtemp())[0]


def _blocks():
    return [row % 2 for row in range(len(clicks()))]


RUNS = {
    "submodels": lambda: _trained(FedSubAvg(clients_per_round=5)),
    "memory": lambda: _trained(FedLaAvg(learning_rate=0.1, clients_per_round=5)),
    "memory_on_disk": lambda: _trained(FedLaAvg(learning_rate=0.1, clients_per_round=5), _shared_folder()),
    "two_chains": lambda: _trained(MCPSGD(BlockSchedule.by_rounds([1, 1])), block_by=_blocks()),
    "noise": lambda: _trained(FedAvg(weighting="clients", robust=Robust(clip_norm=1.0, noise_multiplier=0.1))),
}


def _data_over_ranks():
    args = {"per_device_train_batch_size": 2}
    fed = federation(tempfile.mkdtemp(), recommender(), clicks(), FedAvg(), rounds=3, args=args, parallelism="data")
    fed.train()
    return fed.strategy.parameters, fed.meter.totals()


def _one_rank_fails():
    def arrivals(update):
        if update.client == "u1":
            raise OSError("the disk is full")
        return [update]

    fed = federation(tempfile.mkdtemp(), recommender(), clicks(), FedAvg(), rounds=1, arrivals=arrivals)
    try:
        fed.train()
    except (OSError, RuntimeError) as error:
        return type(error).__name__, "the disk is full" in str(error)
    return None


def _per_client():
    fed = federation(tempfile.mkdtemp(), recommender(), clicks(), FedAvg(), rounds=1)
    fed.train()
    return fed.evaluate(clicks(seed=1), per_client=True)


JOBS = RUNS | {"data": _data_over_ranks, "failure": _one_rank_fails, "per_client": _per_client}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", [name for name in RUNS if name != "noise"])
def test_two_processes_give_the_bits_of_one(ranks, name):
    (one, one_history), (other, other_history) = ranks(name)
    alone, history = RUNS[name]()
    assert_same(alone, one)
    assert_same(alone, other)
    assert history == one_history == other_history
    assert sum(record["bytes_up"] for record in history) > 0


def test_noise_of_the_operating_system_is_the_same_in_all_processes(ranks):
    (one, _), (other, _) = ranks("noise")
    assert_same(one, other)


def test_the_data_of_a_client_over_processes_are_one_batch(ranks):
    """Batches of 2 and 2 against batches of 4; the last batch of a pass may have none for the second process."""
    (one, sent), (other, sent_by_other) = ranks("data")
    assert_same(one, other)
    alone = federation(tempfile.mkdtemp(), recommender(), clicks(), FedAvg(), rounds=3)
    alone.train()
    for name, tensor in alone.strategy.parameters.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-5, atol=1e-7)
    assert sent == sent_by_other and sent["down"] == alone.meter.totals()["down"]


def test_what_fails_in_one_process_fails_in_all(ranks):
    assert ranks("failure") == [("RuntimeError", True), ("OSError", True)]


def test_clients_are_evaluated_by_all_processes(ranks):
    one, other = ranks("per_client")
    assert one == other == _per_client()


# --- blocks, chains, and what arrives


def test_candidates_are_scored_on_the_block_and_the_better_one_is_served(tmp_path):
    """The separate chain, at the block's own optimum, wins over the mixed one."""
    targets = {"a": 0.0, "b": 1.0}
    dataset = quadratic_clients(targets)
    both = [*dataset, *({"user": row["user"], "target": row["target"] + 10} for row in dataset)]
    dataset = type(dataset).from_list([row | {"block": index // 2} for index, row in enumerate(both)])
    fed = federation(
        tmp_path,
        Quadratic(),
        dataset,
        MCPSGD(BlockSchedule.by_rounds([2, 2])),
        rounds=40,
        block_by="block",
        local_steps=3,
    )
    fed.train()
    assert float(fed.strategy.separate_chain(0)["x"]) == pytest.approx(0.5, abs=1e-3)
    assert float(fed.strategy.separate_chain(1)["x"]) == pytest.approx(10.5, abs=1e-2)
    assert all(picks["separate"] > picks["mixed"] for picks in fed.strategy.picks)
    losses = [fed.evaluate(dataset.select([2, 3]), per_client=True, block=block)["eval_loss"] for block in (0, 1)]
    assert losses[1] < losses[0]
    assert fed.model.x.item() == float(fed.strategy.parameters["x"])
    fed.clients._block_counts[0, 0] = 0  # a client without rows of the block is not asked
    assert fed.clients.names[0] not in fed.select(40)


def test_a_third_of_the_clients_misbehave_and_nothing_is_lost(tmp_path, caplog):
    """u0 vanishes and comes back, u3 sends NaN, u6 sends twice: the others' average is that of the others alone."""
    dataset = clicks()

    def arrivals(update):
        if update.client == "u0" and update.round == 1:
            return []
        if update.client == "u3":
            broken = {name: tensor * float("nan") for name, tensor in update.tensors.items()}
            return [type(update)(update.client, update.round, broken, update.rows, update.num_examples)]
        return [update, copy.deepcopy(update)] if update.client == "u6" else [update]

    fed = federation(
        tmp_path / "some",
        recommender(),
        dataset,
        FedAvg(),
        rounds=3,
        arrivals=arrivals,
        args={"save_strategy": "steps"},
    )
    fed.train()
    good = {f"u{index}" for index in range(9)} - {"u3"}
    assert [set(record["accepted"]) for record in fed.history] == [good, good - {"u0"}, good]
    assert [record["missing"] for record in fed.history] == [[], ["u0"], []]
    for record in fed.history:
        assert set(record["rejected"]) == {"u3", "u6"}
        assert "NaN" in record["rejected"]["u3"] and "already" in record["rejected"]["u6"]
    assert "u3" in (tmp_path / "some" / "federated_log.jsonl").read_text()
    without = dataset.filter(lambda row: row["user"] != "u3")
    honest = federation(
        tmp_path / "honest",
        recommender(),
        without,
        FedAvg(),
        rounds=3,
        arrivals=lambda update: [] if (update.client, update.round) == ("u0", 1) else [update],
    )
    honest.train()
    assert_same(fed.strategy.parameters, honest.strategy.parameters)


def test_memory_stays_right_when_uploads_are_lost(tmp_path):
    """A lost difference is forgotten, not added twice: the sum is that of the gradients which arrived."""
    lost = {("a", 1), ("b", 2), ("a", 3)}
    served = []
    for memory in ("client", "server"):
        fed = federation(
            tmp_path / memory,
            Quadratic(),
            quadratic_clients({"a": 0.0, "b": 4.0, "c": 8.0}),
            FedLaAvg(learning_rate=0.25, memory=memory, clients_per_round=2),
            rounds=8,
            local_steps=1,
            arrivals=lambda update: [] if (update.client, update.round) in lost else [update],
            args={"save_strategy": "steps"},
        )
        fed.train()
        served.append(fed.strategy.parameters)
    assert_same(*served)
    assert Path(tmp_path / "client" / "clients").is_dir()
