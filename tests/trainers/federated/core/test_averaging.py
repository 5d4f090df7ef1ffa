"""FedAvg, FedProx, FedSGD and FedAdam against closed forms and numpy."""

import numpy as np
import pytest
import torch

from tests.trainers.federated.core.simulated_clients import quadratic, run_round, scalar
from trainers.federated.core import Alternating, ClientUpdate, FedAdam, FedAvg, FedProx, FedSGD, Robust


def after_a_period(x, g, e, lengths):
    algorithm = FedAvg()
    algorithm.start({"x": torch.tensor(x, dtype=torch.float64)}, ["a", "b"])
    trains = {client: quadratic(minimum, rate=g) for client, minimum in zip("ab", e)}
    present = Alternating([["a"], ["b"]], lengths)
    for round in range(sum(lengths)):
        run_round(algorithm, round, trains, available=present.available(round))
    return scalar(algorithm)


@pytest.mark.parametrize(("g", "shown"), [(0.1, 10.000), (0.01, 9.687), (0.001, 7.862)])
def test_where_alternating_clients_lead_fedavg(g, shown):
    """Theorem 1 of FedLaAvg's supplement (arXiv 2002.07399); a period is affine, two starts give its fixed point."""
    t1, t2, (e1, e2) = 50, 150, (0.0, 10.0)
    q = 1 - 2 * g
    formula = (q**t2 * (e1 - e2) + e2 - e1 * q ** (t1 + t2)) / (1 - q ** (t1 + t2))
    low, high = (after_a_period(x, g, (e1, e2), (t1, t2)) for x in (0.0, 10.0))
    slope = (high - low) / 10
    assert low / (1 - slope) == pytest.approx(formula, rel=1e-10)
    assert formula == pytest.approx(shown, abs=5e-4)


def test_four_clients_of_the_authors_toy():
    """FedAvg ends each cycle at 8.3617, having been down to 7.61; the optimum is 5.5."""
    e, g, steps = {"a": 0, "b": 1, "c": 10, "d": 11}, 1e-4, 10
    trains = {client: quadratic(minimum, rate=g, steps=steps) for client, minimum in e.items()}
    present = Alternating([["a", "b"], ["c", "d"]], (50, 150))
    ends = []
    for start in (0.0, 10.0):
        algorithm, path = FedAvg(), []
        algorithm.start({"x": torch.tensor(start, dtype=torch.float64)}, list(e))
        for round in range(200):
            run_round(algorithm, round, trains, available=present.available(round))
            path.append(scalar(algorithm))
        ends.append((path[49], path[-1]))
    slope = (ends[1][1] - ends[0][1]) / 10
    settled = ends[0][1] / (1 - slope)
    lowest = ends[0][0] + settled * (ends[1][0] - ends[0][0]) / 10
    assert settled == pytest.approx(8.3617, abs=5e-5) and lowest == pytest.approx(7.61, abs=5e-3)


def start(algorithm, clients=3, **options):
    generator = torch.Generator().manual_seed(1)
    parameters = {"w": torch.randn(4, 5, generator=generator), "b": torch.randn(5, generator=generator)}
    algorithm.start(parameters, [f"c{index}" for index in range(clients)], **options)
    return {name: tensor.clone() for name, tensor in parameters.items()}


def updates(round, clients=3, examples=(1, 2, 5)):
    generator = torch.Generator().manual_seed(round + 7)
    made = []
    for index in range(clients):
        tensors = {"w": torch.randn(4, 5, generator=generator), "b": torch.randn(5, generator=generator)}
        made.append(ClientUpdate(f"c{index}", round, tensors, {}, examples[index]))
    return made


@pytest.mark.parametrize("weighting", ["examples", "clients"])
def test_the_average_is_numpys(weighting):
    algorithm = FedAvg(weighting=weighting, server_learning_rate=0.5)
    before, sent = start(algorithm), updates(0)
    log = algorithm.aggregate(0, sent)
    weights = [update.num_examples if weighting == "examples" else 1 for update in sent]
    total = 0.0
    for name, x in before.items():
        step = np.average(np.stack([u.tensors[name].double().numpy() for u in sent]), axis=0, weights=weights)
        np.testing.assert_allclose(algorithm.parameters[name].numpy(), x.numpy() + 0.5 * step, rtol=1e-6, atol=1e-6)
        total += (step**2).sum()
    assert log.elementwise_gradient_norm == pytest.approx(total, rel=1e-5)
    assert log.step_norm == pytest.approx(0.5 * total**0.5, rel=1e-5)
    assert log.accepted == ["c0", "c1", "c2"] and not log.rejected
    assert log.norms["c1"] == pytest.approx(
        float(sum(t.double().square().sum() for t in sent[1].tensors.values())) ** 0.5
    )


def test_what_start_was_told_of_examples_is_believed():
    """A client cannot make itself heavy."""
    honest, boasting = FedAvg(), FedAvg()
    for algorithm, examples in ((honest, (1, 2, 5)), (boasting, (10**9, 2, 5))):
        start(algorithm, num_examples={"c0": 1, "c1": 2, "c2": 5})
        algorithm.aggregate(0, updates(0, examples=examples))
    assert torch.equal(honest.parameters["w"], boasting.parameters["w"])


def test_fedadam_is_reddis_without_bias_correction():
    algorithm = FedAdam(learning_rate=0.1, betas=(0.8, 0.95), tau=1e-2, weighting="clients")
    x = {name: tensor.double().numpy() for name, tensor in start(algorithm).items()}
    m, v = {name: 0.0 * value for name, value in x.items()}, {name: 0.0 * value + 1e-4 for name, value in x.items()}
    for round in range(4):
        sent = updates(round)
        algorithm.aggregate(round, sent)
        for name in x:
            d = np.mean([update.tensors[name].double().numpy() for update in sent], axis=0)
            m[name], v[name] = 0.8 * m[name] + 0.2 * d, 0.95 * v[name] + 0.05 * d**2
            x[name] = x[name] + 0.1 * m[name] / (np.sqrt(v[name]) + 1e-2)
            np.testing.assert_allclose(algorithm.parameters[name].numpy(), x[name], rtol=1e-5, atol=1e-6)


def test_how_to_train_goes_down():
    for algorithm, config in ((FedProx(proximal=0.3), {"proximal": 0.3}), (FedSGD(), {"local_steps": 1})):
        start(algorithm)
        assert algorithm.payload(0, "c0").config == config


def test_low_precision_is_kept_in_fp32():
    algorithm = FedAvg()
    algorithm.start({"w": torch.ones(3, dtype=torch.bfloat16)}, ["a"])
    algorithm.aggregate(0, [ClientUpdate("a", 0, {"w": torch.full((3,), 1e-4)}, {}, 1)])
    assert algorithm.parameters["w"].dtype == torch.float32
    assert torch.equal(algorithm.parameters["w"], torch.full((3,), 1.0) + 1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weighting": "size"}, "weighting='size'"),
        ({"clients_per_round": 0}, "clients_per_round=0"),
        ({"max_update_norm": 0.0}, "max_update_norm=0.0"),
        ({"robust": Robust(rule="median")}, "equal weight"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        FedAvg(**options)
    with pytest.raises(ValueError, match="proximal=-1"):
        FedProx(proximal=-1)
