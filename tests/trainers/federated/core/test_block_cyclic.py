"""MM-PSGD and MC-PSGD (arXiv 2002.07454): the toy of two blocks, and what must hold of chains and averages."""

from datetime import datetime

import pytest
import torch

from trainers.federated.core import MCPSGD, MMPSGD, BlockSchedule, ClientUpdate, FedAvg


CLIENTS, STEPS = 10, 5
NAMES = [f"c{i}" for i in range(CLIENTS)]


class Blocks:
    """Ten clients with (x - c)^2 / 2 around -5 in block 0 and around 5 in block 1, and noisy gradients."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)
        spread = torch.randn(2, CLIENTS, generator=self.generator, dtype=torch.float64)
        self.centres = spread + torch.tensor([[-5.0], [5.0]])

    def change(self, received, block, gamma):
        """Of all clients at once: local minus received, `(clients,)`."""
        y = received.expand(CLIENTS)
        for _ in range(STEPS):
            noise = torch.randn(CLIENTS, generator=self.generator, dtype=torch.float64)
            y = y - gamma * (y - self.centres[block] + noise)
        return y - received

    def losses(self, model, block):
        return 0.5 * (model["x"] - self.centres[block]) ** 2

    def excess(self, model, block):
        return float(0.5 * (model["x"] - self.centres[block].mean()) ** 2)


def run(algorithm, gamma, cycles=40, length=10, seed=0):
    """The excess losses of the blocks' predictors, and of the single last model."""
    task = Blocks(seed)
    algorithm.start({"x": torch.zeros((), dtype=torch.float64)}, NAMES)
    for round in range(cycles * 2 * length):
        algorithm.select(round, NAMES)
        payload = algorithm.payload(round, NAMES[0])
        block, updates = payload.config["block"], []
        for chain, received in (("mixed", payload.tensors), ("separate", payload.separate)):
            if received:
                changes = task.change(received["x"], block, gamma)
                updates += [ClientUpdate(c, round, {"x": d}, {}, 1, chain=chain) for c, d in zip(NAMES, changes)]
        algorithm.aggregate(round, updates)
        if candidates := algorithm.candidates():
            found = {name: task.losses(model, block) for name, model in candidates.items()}
            algorithm.compare(
                round, {c: {name: float(loss[i]) for name, loss in found.items()} for i, c in enumerate(NAMES)}
            )
    return [task.excess(algorithm.predictor(m), m) for m in (0, 1)], [
        task.excess(algorithm.parameters, m) for m in (0, 1)
    ]


@pytest.mark.parametrize("gamma", [0.01, 0.05])
def test_the_toy_comes_out_in_order(gamma):
    """Excess losses MC < MM < single model on the block that was not trained last; digest section 5."""
    schedule = BlockSchedule.by_rounds([10, 10])
    mc, _ = run(MCPSGD(schedule), gamma, cycles=20)
    mm, single = run(MMPSGD(schedule), gamma, cycles=20)
    assert mc[0] < mm[0] < single[0] and single[1] < single[0]
    assert mc[1] < mm[1]


def model(value):
    return {"x": torch.full((3,), value)}


def feed(algorithm, values, losses=None):
    """Rounds that move the mixed chain to `values` (and a separate one by 10 more each)."""
    for round, value in enumerate(values):
        payload = algorithm.payload(round, "a")
        updates = [ClientUpdate("a", round, {"x": value - payload.tensors["x"]}, {}, 1)]
        if payload.separate:
            updates.append(ClientUpdate("a", round, {"x": torch.full((3,), 10.0)}, {}, 1, chain="separate"))
        algorithm.aggregate(round, updates)
        if losses is not None:
            algorithm.compare(round, {"a": losses[round]})


def started(algorithm, clients=("a",)):
    algorithm.start(model(0.0), list(clients))
    return algorithm


VALUES = [1.0, 5.0, 2.0, 8.0, 3.0, 3.0, 7.0, 4.0]


def test_the_running_mean_is_the_plain_mean_of_the_candidates():
    schedule = BlockSchedule.by_rounds([1, 1])
    algorithm = started(MMPSGD(schedule))
    feed(algorithm, VALUES)
    for block in (0, 1):
        mean = sum(VALUES[block::2]) / 4
        torch.testing.assert_close(algorithm.predictor(block)["x"], torch.full((3,), mean))
    assert torch.equal(algorithm.predictor(None)["x"], model(4.0)["x"])
    assert torch.equal(algorithm.predictor(7)["x"], algorithm.parameters["x"])


def test_a_block_that_was_never_visited_is_served_the_mixed_model():
    algorithm = started(MMPSGD(BlockSchedule.by_rounds([2, 2])))
    feed(algorithm, VALUES[:1])
    assert torch.equal(algorithm.predictor(1)["x"], model(1.0)["x"])


def test_tails_and_exponential_averages():
    schedule = BlockSchedule.by_rounds([2, 1])  # block 0: rounds 0 1, 3 4, 6 7
    tail = started(MMPSGD(schedule, average="tail", tail_visits=2))
    feed(tail, VALUES)
    torch.testing.assert_close(tail.predictor(0)["x"], torch.full((3,), (8.0 + 3 + 7 + 4) / 4))
    exponential = started(MMPSGD(schedule, average="exponential", decay=0.75))
    feed(exponential, VALUES)
    mean = VALUES[0]
    for value in (5.0, 8.0, 3.0, 7.0, 4.0):
        mean = 0.75 * mean + 0.25 * value
    torch.testing.assert_close(exponential.predictor(0)["x"], torch.full((3,), mean))


def test_one_block_is_fedavg_with_iterate_averaging():
    one, other = MMPSGD(BlockSchedule.by_rounds([3])), FedAvg()
    generator, iterates = torch.Generator().manual_seed(0), []
    for algorithm in (one, other):
        started(algorithm, NAMES)
    for round in range(12):
        sent = [
            ClientUpdate(c, round, {"x": torch.randn(3, generator=generator)}, {}, i + 1) for i, c in enumerate(NAMES)
        ]
        for algorithm in (one, other):
            algorithm.aggregate(round, sent)
        iterates.append(other.parameters["x"])
        torch.testing.assert_close(one.parameters["x"], other.parameters["x"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(one.predictor(0)["x"], torch.stack(iterates).mean(0), rtol=1e-5, atol=1e-6)


def test_separate_chains_never_change_outside_their_block():
    schedule = BlockSchedule.by_rounds([2, 1, 2])
    algorithm, seen = started(MCPSGD(schedule)), [0.0, 0.0, 0.0]
    for round in range(15):
        received = algorithm.payload(round, "a")
        assert torch.equal(received.separate["x"], model(seen[schedule.block(round)])["x"])
        both = [
            ClientUpdate("a", round, {"x": torch.full((3,), step)}, {}, 1, chain=chain)
            for chain, step in (("mixed", 1.0), ("separate", 10.0))
        ]
        algorithm.aggregate(round, both)
        seen[schedule.block(round)] += 10
        for block in range(3):
            assert torch.equal(algorithm.separate_chain(block)["x"], model(seen[block])["x"])
    assert torch.equal(algorithm.parameters["x"], model(15.0)["x"])


def test_a_separate_chain_may_begin_each_visit_at_the_mixed_model():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([2, 2]), separate="restart_from_mixed"))
    starts = []
    for round in range(6):
        received = algorithm.payload(round, "a")
        starts.append((float(received.tensors["x"][0]), float(received.separate["x"][0])))
        algorithm.aggregate(
            round,
            [
                ClientUpdate("a", round, {"x": torch.full((3,), step)}, {}, 1, chain=chain)
                for chain, step in (("mixed", 1.0), ("separate", 10.0))
            ],
        )
    assert starts == [(0, 0), (1, 10), (2, 2), (3, 12), (4, 4), (5, 14)]


def losses(mixed, separate):
    return {"mixed": mixed, "separate": separate}


def test_the_better_candidate_of_each_round_is_averaged():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([1])))
    feed(algorithm, [1.0, 5.0, 2.0], [losses(1.0, 2.0), losses(2.0, 1.0), losses(1.0, 1.0)])
    torch.testing.assert_close(algorithm.predictor(0)["x"], torch.full((3,), (1.0 + 20.0 + 2.0) / 3))
    assert algorithm.picks == [{"mixed": 2, "separate": 1}]


def test_comparing_the_averages_at_the_end():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([1]), compare="final"))
    feed(algorithm, [1.0, 5.0], [losses(1.0, 2.0), losses(2.0, 1.0)])
    torch.testing.assert_close(algorithm.predictor(0)["x"], torch.full((3,), 15.0))
    feed_on = algorithm.payload(2, "a")
    algorithm.aggregate(2, [ClientUpdate("a", 2, {"x": 3.0 - feed_on.tensors["x"]}, {}, 1)])
    torch.testing.assert_close(algorithm.candidates()["mixed"]["x"], torch.full((3,), 3.0))
    algorithm.compare(2, {"a": losses(0.1, 0.2)})
    torch.testing.assert_close(algorithm.predictor(0)["x"], torch.full((3,), 3.0))


def test_losses_that_do_not_count_are_named():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([1])), ["a", "b", "c"])
    sent = [
        ClientUpdate(c, 0, {"x": torch.ones(3)}, {}, n, chain=chain)
        for c, n in (("a", 1), ("b", 3))
        for chain in ("mixed", "separate")
    ]
    algorithm.aggregate(0, sent)
    with pytest.raises(ValueError, match="those of round 0"):
        algorithm.compare(1, {})
    result = algorithm.compare(0, {"a": losses(1.0, 2.0), "b": losses(3.0, 2.0), "c": losses(0.0, 9.0)})
    assert result.losses == {"mixed": 2.5, "separate": 2.0} and result.winner == "separate"
    assert list(result.rejected) == ["c"] and algorithm.candidates() == {}
    algorithm.aggregate(1, [ClientUpdate(u.client, 1, u.tensors, {}, u.num_examples, chain=u.chain) for u in sent])
    result = algorithm.compare(1, {"a": losses(float("nan"), 0.0), "b": {"mixed": 1.0}})
    assert result.winner == "mixed" and sorted(result.rejected) == ["a", "b"] and result.losses == {}


def test_without_losses_the_mixed_model_is_the_candidate():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([1])))
    feed(algorithm, [1.0])
    log = algorithm.aggregate(1, [])
    assert log.events[0] == "no losses came for round 0: its candidate is the mixed model"
    assert torch.equal(algorithm.predictor(0)["x"], model(1.0)["x"]) and algorithm.candidates() == {}


def test_each_chain_refuses_what_is_bad_of_its_own():
    algorithm = started(MCPSGD(BlockSchedule.by_rounds([1])))
    bad = ClientUpdate("a", 0, {"x": torch.full((3,), float("nan"))}, {}, 1, chain="separate")
    other = ClientUpdate("a", 0, {"x": torch.ones(3)}, {}, 1, chain="third")
    log = algorithm.aggregate(0, [bad, ClientUpdate("a", 0, {"x": torch.ones(3)}, {}, 1), other])
    assert log.accepted == ["a"] and "NaN" in log.rejected["a"] and "no chain 'third'" in log.rejected["a"]
    assert torch.equal(algorithm.separate_chain(0)["x"], model(0.0)["x"])
    assert list(log.norms) == ["a"]


def test_schedules():
    schedule = BlockSchedule.by_rounds([2, 3])
    assert [schedule.block(r) for r in range(7)] == [0, 0, 1, 1, 1, 0, 0]
    assert [schedule.visit(r) for r in range(7)] == [0, 0, 2, 2, 2, 5, 5]
    assert [BlockSchedule.by_rounds([2]).visit(r) for r in range(5)] == [0, 0, 2, 2, 4]
    assert [BlockSchedule.explicit([0, 1, 0]).visit(r) for r in range(5)] == [0, 1, 2, 2, 4]
    assert BlockSchedule.from_dict(schedule.to_dict()) == schedule
    clock = BlockSchedule.by_clock([6, 22], rounds_per_day=24)
    assert [clock.block(r) for r in (0, 5, 6, 21, 22, 23, 24, 30)] == [1, 1, 0, 0, 1, 1, 1, 0]
    assert clock.block_at(datetime(2026, 1, 1, 23, 30)) == 1 and clock.block_at(6.0) == 0
    with pytest.raises(ValueError, match="only by_clock"):
        schedule.block_at(3.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockSchedule.explicit([0, 2]), "without a gap"),
        (lambda: BlockSchedule.by_clock([22, 6], rounds_per_day=24), "must increase"),
        (lambda: BlockSchedule.by_clock([6, 24], rounds_per_day=24), "hours of a day"),
        (lambda: MMPSGD(BlockSchedule.by_rounds([1]), average="median"), "average='median'"),
        (lambda: MMPSGD(BlockSchedule.by_rounds([1]), tail_visits=0), "tail_visits=0"),
        (lambda: MCPSGD(BlockSchedule.by_rounds([1]), compare="never"), "compare='never'"),
        (lambda: MCPSGD(BlockSchedule.by_rounds([1]), separate="never"), "separate='never'"),
    ],
)
def test_wrong_options_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
