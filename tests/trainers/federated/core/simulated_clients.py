"""Clients whose local training is a closed form or a few lines, and a round of an algorithm over them."""

import torch

from trainers.federated.core import ClientMemory, ClientUpdate


def quadratic(minimum, *, rate, steps=1):
    """Local training on (x - minimum)^2 of every parameter: what it changes, and exactly."""

    def train(received):
        changed = {}
        for name, x in received.items():
            y = x
            for _ in range(steps):
                y = y - rate * 2 * (y - minimum)
            changed[name] = y - x
        return changed

    return train


def update_of(algorithm, round, client, train, *, memories=None, num_examples=1):
    """What a client sends, with the memory that it needs if the algorithm has its gradients kept by clients."""
    payload = algorithm.payload(round, client)
    tensors = train(payload.tensors)
    if "client_memory" in algorithm.requires:
        tensors = memories.setdefault(client, ClientMemory()).upload(payload, tensors)
    return ClientUpdate(client, round, tensors, payload.rows, num_examples)


def run_round(algorithm, round, trains, *, available=None, memories=None, num_examples=None, lose=()):
    """One round over clients `{name: train}`; `lose` names those whose upload does not arrive."""
    updates = []
    for client in algorithm.select(round, trains if available is None else available):
        examples = 1 if num_examples is None else num_examples[client]
        update = update_of(algorithm, round, client, trains[client], memories=memories, num_examples=examples)
        if client not in lose:
            updates.append(update)
    return algorithm.aggregate(round, updates)


def scalar(algorithm, name="x"):
    return float(algorithm.parameters[name])


def assert_same_state(one, other):
    """Of two algorithms, bit for bit."""
    a, b = one.state_dict(), other.state_dict()
    assert a["record"] == b["record"]
    assert a["tensors"].keys() == b["tensors"].keys()
    for group, tensors in a["tensors"].items():
        assert tensors.keys() == b["tensors"][group].keys()
        for key, tensor in tensors.items():
            assert tensor.dtype == b["tensors"][group][key].dtype and torch.equal(tensor, b["tensors"][group][key])
