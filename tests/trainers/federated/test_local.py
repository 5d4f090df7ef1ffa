"""One client's steps: closed forms, submodels against whole tables, low precision, no leaks between clients."""

import threading

import pytest
import torch
from torch import nn

from tests.trainers.federated.tiny_federation import Quadratic, assert_same, recommender
from trainers.federated.core import ClientMemory, Payload
from trainers.federated.local import LocalTraining, Shard, seed_of


class Examples:
    """Tensors of one client."""

    def __init__(self, **tensors):
        self.tensors = tensors

    def __len__(self):
        return len(next(iter(self.tensors.values())))

    def batch(self, indices):
        return {name: value if indices is None else value[indices] for name, value in self.tensors.items()}


def sgd(named):
    return torch.optim.SGD([parameter for _, parameter in named], lr=1.0)


def training(model, **options):
    options = {"optimizer": sgd, "learning_rate": lambda round: 0.1, "batch_size": 4, "local_steps": 5} | options
    return LocalTraining(model, **options)


CLICKS = Examples(
    items=torch.tensor([[3, 1, 0], [7, 9, 0], [9, 3, 3], [20, 0, 0], [7, 7, 1], [3, 20, 0]]),
    labels=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]),
)
OWN = torch.tensor([1, 3, 7, 9, 20])


def submodel(parameters, rows=OWN):
    tensors = parameters | {"table.weight": parameters["table.weight"][rows]}
    return Payload(3, tensors, {"table.weight": rows})


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_steps_on_a_parabola_are_a_closed_form(mu):
    """y <- y - g (2 (y - e) + mu (y - x)), five times."""
    local, data = training(Quadratic(), local_steps=5), Examples(target=torch.tensor([3.0], dtype=torch.float64))
    received = {"x": torch.tensor(1.0, dtype=torch.float64)}
    (update,) = local.run("a", data, Payload(0, received, config={"proximal": mu}))
    y = 1.0
    for _ in range(5):
        y -= 0.1 * (2 * (y - 3.0) + mu * (y - 1.0))
    assert float(update.tensors["x"]) == pytest.approx(y - 1.0, rel=1e-14)
    assert (update.client, update.round, update.num_examples, update.rows) == ("a", 0, 1, {})
    assert update.metrics["steps"] == 5 and update.metrics["loss"] > 0
    assert float(received["x"]) == 1.0


@pytest.mark.parametrize(
    ("config", "steps", "rate"),
    [
        ({"local_steps": 1}, 1, 0.1),
        ({"learning_rate": 0.02}, 5, 0.02),
        ({"step_scale": 1.6}, 8, 0.1),
        ({"step_scale": 0.01}, 1, 0.1),
        ({"loss_scale": 0.5}, 5, 0.05),
    ],
)
def test_the_payload_says_how_to_train(config, steps, rate):
    local, data = training(Quadratic()), Examples(target=torch.tensor([0.0], dtype=torch.float64))
    (update,) = local.run("a", data, Payload(0, {"x": torch.tensor(1.0, dtype=torch.float64)}, config=config))
    assert float(update.tensors["x"]) == pytest.approx((1 - 2 * rate) ** steps - 1, rel=1e-13)


def test_epochs_are_passes_over_the_examples():
    data = Examples(target=torch.zeros(10))
    local = training(Quadratic(), local_steps=None, local_epochs=2)
    (update,) = local.run("a", data, Payload(0, local.parameters))
    assert update.metrics["steps"] == 6  # of 4, 4 and 2 examples, twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_submodel_trains_as_the_whole_table_does(dtype):
    model = recommender().to(dtype)
    local = training(model)
    parameters = local.parameters
    (whole,) = local.run("a", CLICKS, Payload(3, parameters))
    (part,) = local.run("a", CLICKS, submodel(parameters))
    assert torch.equal(part.rows["table.weight"], OWN)
    assert part.tensors["table.weight"].shape == (5, 4) and part.tensors["table.weight"].dtype == torch.float32
    assert_same(part.tensors, whole.tensors | {"table.weight": whole.tensors["table.weight"][OWN]})
    untouched = torch.ones(40, dtype=torch.bool)
    untouched[OWN] = False
    assert not whole.tensors["table.weight"][untouched].any()
    assert model.table.weight.shape == (40, 4) and model.table.padding_idx == 0
    assert not model.table._forward_pre_hooks and model.table.weight.grad is None


def test_a_client_sends_its_own_rows_of_a_table_that_came_whole():
    local = training(recommender())
    (whole,) = local.run("a", CLICKS, Payload(3, local.parameters))
    local = training(recommender())
    (part,) = local.run("a", CLICKS, Payload(3, local.parameters), own_rows={"table.weight": OWN})
    assert torch.equal(part.rows["table.weight"], OWN)
    assert torch.equal(part.tensors["table.weight"], whole.tensors["table.weight"][OWN])


def test_an_id_outside_the_submodel_is_an_error_and_leaves_the_model_whole():
    model = recommender()
    local, before = training(model), model.table.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'table.weight': rows \[.*\] are read in training.*submodels=False"):
        local.run("a", CLICKS, submodel(local.parameters, OWN[:3]))
    assert torch.equal(model.table.weight, before) and not model.table._forward_pre_hooks
    (update,) = local.run("a", CLICKS, submodel(local.parameters))
    assert update.tensors["table.weight"].isfinite().all()


def test_rows_of_what_is_no_table_are_refused():
    local = training(recommender())
    payload = Payload(0, local.parameters, {"hidden.weight": torch.tensor([0])})
    with pytest.raises(ValueError, match="hidden.weight.*no trainable nn.Embedding of its own"):
        local.run("a", CLICKS, payload)


def test_a_bf16_model_steps_in_float32():
    """Each step is a hundredth of what bf16 resolves at 1; rounding in between would lose all of them."""
    model = Quadratic(1.0, dtype=torch.bfloat16)
    local = training(model, local_steps=10, learning_rate=lambda round: 1e-5)
    data = Examples(target=torch.zeros(1))
    (update,) = local.run("a", data, Payload(0, {"x": torch.tensor(1.0001)}))
    assert update.tensors["x"].dtype == torch.float32
    assert float(update.tensors["x"]) == pytest.approx(-10 * 2e-5, rel=1e-2)


def test_nothing_of_earlier_clients_matters():
    """Dropout, batch statistics, momentum: all are those of the (round, client)."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = recommender(dropout=0.5)
            self.norm = nn.BatchNorm1d(1)

        def forward(self, items, labels):
            logits = self.norm(self.body(items)["logits"][:, None])[:, 0]
            return {"loss": nn.functional.mse_loss(logits, labels)}

    def momentum(named):
        return torch.optim.SGD([parameter for _, parameter in named], lr=1.0, momentum=0.9)

    torch.manual_seed(0)
    local = training(Normed(), optimizer=momentum, max_grad_norm=0.3)
    payload = Payload(3, local.parameters)
    (first,) = local.run("a", CLICKS, payload)
    local.run("b", Examples(items=CLICKS.tensors["items"][:3], labels=CLICKS.tensors["labels"][:3]), payload)
    torch.manual_seed(99)
    (again,) = local.run("a", CLICKS, payload)
    assert_same(first.tensors, again.tensors)
    (other,) = local.run("a", CLICKS, Payload(4, payload.tensors))
    assert not torch.equal(first.tensors["body.hidden.weight"], other.tensors["body.hidden.weight"])
    assert int(local.model.norm.num_batches_tracked) == 0
    assert len({seed_of(seed, round, client) for seed in (0, 1) for round in (2, 3) for client in "ab"}) == 8


def test_the_second_chain_is_trained_apart():
    local = training(Quadratic())
    data, at = Examples(target=torch.zeros(1)), lambda x: {"x": torch.tensor(x, dtype=torch.float64)}
    payload = Payload(0, at(1.0), config={"separate_learning_rate": 0.05}, separate=at(-2.0))
    mixed, separate = local.run("a", data, payload)
    assert (mixed.chain, separate.chain) == ("mixed", "separate")
    assert float(mixed.tensors["x"]) == pytest.approx(0.8**5 - 1)
    assert float(separate.tensors["x"]) == pytest.approx(-2 * (0.9**5 - 1))
    assert local.score(data, {"mixed": at(1.0), "separate": at(3.0)}) == {"mixed": 1.0, "separate": 9.0}


def test_memory_is_asked_for_exactly_where_it_is_needed():
    local, data = training(Quadratic()), Examples(target=torch.zeros(1))
    payload = Payload(0, local.parameters, config={"learning_rate": 0.1, "accepted_round": -1})
    with pytest.raises(ValueError, match="disagree on whether clients keep"):
        local.run("a", data, payload)
    with pytest.raises(ValueError, match="disagree on whether clients keep"):
        local.run("a", data, Payload(0, local.parameters), memory=ClientMemory())
    with pytest.raises(ValueError, match="no examples"):
        local.run("a", Examples(target=torch.zeros(0)), Payload(0, local.parameters))


def test_parts_of_a_batch_add_up_to_the_batch():
    """Two shards of two examples each, one thread each, against one process with batches of four."""
    whole = training(recommender(), batch_size=4, local_steps=3)
    payload = Payload(1, whole.parameters)
    (expected,) = whole.run("a", CLICKS, payload)

    # the last batch of a pass has two examples: the second shard has none of it
    barrier, parts, found = threading.Barrier(2), [None, None], [None, None]

    def add_up(rank):
        def add(tensors):
            parts[rank] = [tensor.clone() for tensor in tensors]
            barrier.wait()
            for tensor, other in zip(tensors, parts[1 - rank]):
                tensor += other
            barrier.wait()

        return add

    def run(rank):
        local = training(recommender(), batch_size=2, local_steps=3, shard=Shard(rank, 2, add_up(rank)))
        found[rank] = local.run("a", CLICKS, payload)[0]

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert_same(found[0].tensors, found[1].tensors)
    for name, tensor in expected.tensors.items():
        torch.testing.assert_close(found[0].tensors[name], tensor, rtol=1e-5, atol=1e-7)
    assert found[0].metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-6)


def test_bad_settings_are_refused():
    for options in ({"local_steps": None}, {"local_epochs": 2}, {"local_steps": 0}):
        with pytest.raises(ValueError, match="one of them, at least 1"):
            training(Quadratic(), **options)
    with pytest.raises(ValueError, match="batch_size=0"):
        training(Quadratic(), batch_size=0)
    model = Quadratic()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        training(model)
