"""InfoNCE: against its formula, at constant memory, and on two gloo processes against one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from sigma_kernels.benchmarks.allocations import allocations
from tests.gloo_ranks import results_of_ranks
from trainers.losses import in_batch_negatives


WORLD = 2
FP64 = torch.float64


def embeddings(queries=6, documents=6, width=5, dtype=FP64):
    pairs = (torch.randn(rows, width, dtype=dtype) for rows in (queries, documents))
    return [F.normalize(rows, dim=-1).requires_grad_() for rows in pairs]


def naive(query, document, targets, temperature=0.05):
    """`-1/N sum_i log softmax(q_i . d / tau)[t(i)]`, with all similarities."""
    return F.cross_entropy(query @ document.T / temperature, targets)


@pytest.mark.parametrize("documents", [6, 15])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_it_is_the_cross_entropy_of_all_similarities(documents, temperature):
    query, document = embeddings(documents=documents)
    loss = in_batch_negatives(query, document, temperature=temperature)
    expected = naive(query, document, torch.arange(6), temperature)
    torch.testing.assert_close(loss, expected)
    for got, want in zip(*(torch.autograd.grad(value, (query, document)) for value in (loss, expected))):
        torch.testing.assert_close(got, want)


def test_gradients_are_those_of_finite_differences():
    torch.autograd.gradcheck(lambda q, d: in_batch_negatives(q, d, symmetric=True), embeddings(4, 7, 3))


def test_queries_may_share_documents_and_have_none():
    query, document = embeddings(documents=9)
    targets = torch.tensor([8, 2, 2, -100, 0, -100])
    loss = in_batch_negatives(query, document, targets=targets)
    torch.testing.assert_close(loss, naive(query, document, targets))
    nothing = in_batch_negatives(query, document, targets=torch.full((6,), -100), symmetric=True)
    assert nothing == 0 and nothing.requires_grad


def test_the_symmetric_loss_is_the_mean_of_both_directions():
    query, document = embeddings(documents=9)
    targets = torch.tensor([8, 2, 2, -100, 0, 1])
    counts = targets != -100
    mirrored = naive(document[targets.clamp(min=0)], query, torch.arange(6).masked_fill(~counts, -100))
    loss = in_batch_negatives(query, document, targets=targets, symmetric=True)
    torch.testing.assert_close(loss, (naive(query, document, targets) + mirrored) / 2)


def test_without_a_process_group_there_is_nothing_to_gather():
    query, document = embeddings()
    assert torch.equal(in_batch_negatives(query, document, gather=True), in_batch_negatives(query, document))


def test_memory_does_not_grow_with_queries_times_documents():
    query, document = embeddings(2048, 6144, 8, dtype=torch.float32)
    step = lambda: in_batch_negatives(query, document, symmetric=True).backward()  # noqa: E731
    assert allocations(step, torch.device("cpu")).peak < 4 * 2048 * 6144 / 4


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4)), {}, r"got \(2, 3\) and \(2, 4\)"),
        ((torch.zeros(3, 3), torch.zeros(2, 3)), {}, "3 queries and 2 documents: give `targets`"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"temperature": 0.0}, "temperature=0.0"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"targets": torch.zeros(3, dtype=torch.int64)}, r"must be \(2,\)"),
        ((torch.zeros(2, 3), torch.zeros(2, 3)), {"targets": torch.tensor([0, 2])}, "A label is 2"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        in_batch_negatives(*arguments, **options)


# --- ranks

QUERIES, DOCUMENTS = (3, 5), (7, 6)  # of each rank; documents beyond the queries are hard negatives


def union():
    """Queries and documents of all ranks, the document of each query, and a projection that ranks train."""
    generator = torch.Generator().manual_seed(0)
    queries, documents = (torch.randn(sum(rows), 4, generator=generator, dtype=FP64) for rows in (QUERIES, DOCUMENTS))
    torch.manual_seed(1)
    encoder = nn.Linear(4, 3, dtype=FP64)
    targets = torch.cat([torch.arange(rows) + sum(DOCUMENTS[:at]) for at, rows in enumerate(QUERIES)])
    targets[4] = -100
    return queries, documents, targets, encoder


def encoded(encoder, queries, documents):
    """Both in one forward, as DDP wants."""
    return F.normalize(encoder(torch.cat([queries, documents])), dim=-1).split([len(queries), len(documents)])


def loss_of_rank(symmetric=False):
    rank = dist.get_rank()
    queries, documents, targets, encoder = union()
    queries, targets = (t.split(QUERIES)[rank] for t in (queries, targets))
    targets = torch.where(targets == -100, -100, targets - sum(DOCUMENTS[:rank]))
    model = DistributedDataParallel(encoder)
    pair = encoded(model, queries, documents.split(DOCUMENTS)[rank])
    loss = in_batch_negatives(*pair, targets=targets, gather=True, symmetric=symmetric)
    loss.backward()
    return loss.item(), encoder.weight.grad, encoder.bias.grad


def loss_of_an_empty_rank():
    """The last rank has no query that counts, and must take part nevertheless."""
    query, document = (t.detach().requires_grad_() for t in embeddings())
    targets = torch.arange(6) if dist.get_rank() == 0 else torch.full((6,), -100)
    loss = in_batch_negatives(query, document, targets=targets, gather=True)
    loss.backward()
    return loss.item(), query.grad.abs().sum().item(), document.grad.abs().sum().item()


JOBS = {
    "one way": loss_of_rank,
    "symmetric": lambda: loss_of_rank(symmetric=True),
    "empty": loss_of_an_empty_rank,
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of_ranks(__name__, tmp_path_factory.mktemp("ranks"), world_size=WORLD)


@pytest.mark.parametrize("name", ["one way", "symmetric"])
def test_two_ranks_are_one_process_on_the_union(results, name):
    queries, documents, targets, encoder = union()
    loss = in_batch_negatives(*encoded(encoder, queries, documents), targets=targets, symmetric=name == "symmetric")
    loss.backward()
    losses, weights, biases = zip(*results(name))
    assert sum(losses) / WORLD == pytest.approx(loss.item(), rel=1e-12)
    assert losses[0] != pytest.approx(losses[1])
    for weight, bias in zip(weights, biases):
        torch.testing.assert_close(weight, encoder.weight.grad)
        torch.testing.assert_close(bias, encoder.bias.grad)


def test_a_rank_without_queries_takes_part_with_its_documents(results):
    (loss, _, _), (nothing, of_queries, of_documents) = results("empty")
    assert loss > 0 and nothing == 0 and of_queries == 0 and of_documents > 0
