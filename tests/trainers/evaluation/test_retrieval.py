"""Metrics against closed forms and two libraries, search against brute force, grids of embeddings that are known."""

import math

import numpy as np
import pytest
import pytrec_eval
import torch
from sklearn.metrics import ndcg_score
from torch.nn import functional as F

from trainers.evaluation import retrieval
from trainers.evaluation.retrieval import (
    RetrievalCell,
    evaluate_grid,
    exact_search,
    grid_metrics,
    grid_table,
    pareto,
    retrieval_metrics,
)
from trainers.evaluation.retrieval_figure import plot_pareto
from trainers.report import Data, Model, Results, read_results, write_results


BACKENDS = [
    "torch",
    pytest.param("faiss", marks=pytest.mark.skipif(not retrieval.FAISS_IS_INSTALLED, reason="no faiss")),
]


def random_rankings(queries=40, documents=30, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(queries, documents, generator=generator)
    gains = torch.randint(0, 4, (queries, documents), generator=generator) * (
        torch.rand(queries, documents, generator=generator) < 0.2
    )
    gains[:, 7] = 1  # every query has something to find
    relevant = [{d: float(g) for d, g in enumerate(row) if g > 0} for row in gains.tolist()]
    return scores, gains, relevant


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_closed_form_with_several_relevant_documents():
    ranked = torch.tensor([[5, 1, 9, 2], [3, 4, 8, 0]])
    found = retrieval_metrics(ranked, [{1, 2, 6}, [3]], ks=(1, 2, 4))
    # First query: hits at ranks 2 and 4 of three relevant documents. Second: the only one at rank 1.
    assert found.recall == pytest.approx({1: (0 + 1) / 2, 2: (1 / 3 + 1) / 2, 4: (2 / 3 + 1) / 2})
    assert found.mrr == pytest.approx({1: 0.5, 2: 0.75, 4: 0.75})
    ideal = {2: 1 + 1 / math.log2(3), 4: 1 + 1 / math.log2(3) + 1 / 2}
    hits = {2: 1 / math.log2(3), 4: 1 / math.log2(3) + 1 / math.log2(5)}
    assert found.ndcg == pytest.approx({1: 0.5, **{k: (hits[k] / ideal[k] + 1) / 2 for k in (2, 4)}})


def test_a_random_order_finds_k_of_n_and_a_perfect_one_everything():
    generator = torch.Generator().manual_seed(1)
    ranked = torch.stack([torch.randperm(50, generator=generator) for _ in range(4000)])
    found = retrieval_metrics(ranked, [[0]] * 4000, ks=(10, 50))
    assert found.recall[10] == pytest.approx(10 / 50, abs=0.02) and found.recall[50] == 1
    assert found.mrr[50] == pytest.approx(sum(1 / rank for rank in range(1, 51)) / 50, rel=0.05)
    perfect = retrieval_metrics(torch.tensor([[2, 0, 1]]), [{2: 3.0, 0: 2.0, 1: 1.0}], ks=(1, 3))
    assert perfect.ndcg == {1: 1, 3: 1} and perfect.recall == pytest.approx({1: 1 / 3, 3: 1})


@pytest.mark.parametrize("k", [1, 3, 10, 30])
def test_ndcg_is_that_of_scikit_learn(k):
    scores, gains, relevant = random_rankings()
    expected = ndcg_score(gains.numpy(), scores.numpy(), k=k)
    assert retrieval_metrics(scores, relevant, ks=[k]).ndcg[k] == pytest.approx(expected, abs=1e-12)


def test_all_three_are_those_of_trec_eval():
    scores, gains, relevant = random_rankings(seed=2)
    found = retrieval_metrics(scores, relevant, ks=(5, 10))
    judgements = {str(q): {str(d): int(g) for d, g in enumerate(row)} for q, row in enumerate(gains.tolist())}
    run = {str(q): {str(d): s for d, s in enumerate(row)} for q, row in enumerate(scores.tolist())}
    evaluator = pytrec_eval.RelevanceEvaluator(judgements, {"recall.5,10", "ndcg_cut.5,10", "recip_rank"})
    by_query = evaluator.evaluate(run).values()
    for k in (5, 10):
        assert found.recall[k] == pytest.approx(np.mean([row[f"recall_{k}"] for row in by_query]))
        assert found.ndcg[k] == pytest.approx(np.mean([row[f"ndcg_cut_{k}"] for row in by_query]))
        # trec_eval does not cut the reciprocal rank: a first hit beyond k is 1 / rank there and 0 here
        cut = [rank if rank >= 1 / k - 1e-9 else 0 for rank in (row["recip_rank"] for row in by_query)]
        assert found.mrr[k] == pytest.approx(np.mean(cut))


def test_missing_documents_and_cut_offs_beyond_the_ranking():
    found = retrieval_metrics(torch.tensor([[4, -1, -1]]), [[4, 5]], ks=(1, 3, 100))
    assert found.recall == {1: 0.5, 3: 0.5, 100: 0.5} and found.mrr[100] == 1


@pytest.mark.parametrize(
    ("ranked", "relevant", "ks", "message"),
    [
        (torch.tensor([[1]]), [[]], (1,), "Query 0 has no relevant document"),
        (torch.tensor([[1]]), [{1: -1.0, 2: 1.0}], (1,), "negative gain"),
        (torch.tensor([[1]]), [[1], [2]], (1,), "1 rankings for 2 sets"),
        (torch.zeros(0, 3, dtype=torch.long), [], (1,), "0 rankings"),
        (torch.tensor([[1]]), [[1]], (0,), "at least 1"),
        (torch.tensor([[1]]), [[1]], (), "at least 1"),
    ],
)
def test_bad_input_to_the_metrics(ranked, relevant, ks, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(ranked, relevant, ks=ks)


# --- search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("documents", "k", "batch_size"), [(500, 10, 7), (500, 600, 64), (3, 2, 1)])
def test_search_finds_what_sorting_all_scores_finds(backend, documents, k, batch_size):
    queries, corpus = F.normalize(torch.randn(23, 16)), F.normalize(torch.randn(documents, 16))
    found = exact_search(queries, corpus, k, batch_size=batch_size, backend=backend)
    scores, ids = (queries.double() @ corpus.double().T).sort(dim=1, descending=True)
    assert torch.equal(found.ids, ids[:, :k])
    torch.testing.assert_close(found.scores, scores[:, :k].float())
    assert found.ms_per_query > 0


def test_blocks_of_documents_change_nothing():
    queries, corpus = torch.randn(9, 8), torch.randn(1000, 8)
    whole = retrieval._torch_search(corpus, 20, None)(queries)
    for block in (1, 7, 64, 999):
        scores, ids = retrieval._torch_search(corpus, 20, None, block=block)(queries)
        assert torch.equal(ids, whole[1])
        torch.testing.assert_close(scores, whole[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_are_ordered_by_id(backend):
    corpus = torch.eye(4)[[0, 1, 0, 1, 0]]
    found = exact_search(torch.eye(4)[:2], corpus, 5, backend=backend)
    assert found.ids.tolist() == [[0, 2, 4, 1, 3], [1, 3, 0, 2, 4]]


def test_the_choice_of_a_backend(monkeypatch):
    queries, corpus = torch.randn(3, 4), torch.randn(9, 4)
    assert retrieval.FAISS_IS_INSTALLED
    with_faiss = exact_search(queries, corpus, 9)
    monkeypatch.setattr(retrieval, "FAISS_IS_INSTALLED", False)
    assert torch.equal(exact_search(queries, corpus, 9).ids, with_faiss.ids)
    with pytest.raises(ImportError, match=r"hf-sigma\[retrieval\]"):
        exact_search(queries, corpus, 9, backend="faiss")


def test_bad_input_to_the_search():
    good = torch.randn(2, 4)
    with pytest.raises(ValueError, match="Cannot search"):
        exact_search(good, torch.randn(3, 5), 1)
    with pytest.raises(ValueError, match="Cannot search"):
        exact_search(good, torch.empty(0, 4), 1)
    with pytest.raises(ValueError, match="documents hold NaN"):
        exact_search(good, torch.full((3, 4), float("nan")), 1)
    with pytest.raises(ValueError, match="leave out `device`"):
        exact_search(good, good, 1, backend="faiss", device="cpu")


# --- the grid --------------------------------------------------------------------------------------------------------


def known_encode(texts):
    """Text "topic-copy": exit 2 knows the topic in its first four entries, exit 1 only in entries 4 to 7."""
    topics = torch.tensor([int(text.split("-")[0]) for text in texts])
    noise = torch.tensor([[math.sin(37 * (i + 1) * (j + 1)) for j in range(4)] for i in map(hash_of, texts)])
    topic = F.one_hot(topics, 4).float()
    return {1: torch.cat([noise, 9 * topic], dim=1), 2: torch.cat([100 * topic, noise], dim=1)}


def hash_of(text: str) -> int:
    return sum(7**i * ord(c) for i, c in enumerate(text)) % 1009


QUERIES = [f"{topic}-query" for topic in range(4)]
DOCUMENTS = [f"{topic}-{copy}" for topic in range(4) for copy in range(5)]
RELEVANT = [[i for i, d in enumerate(DOCUMENTS) if d.startswith(f"{topic}-")] for topic in range(4)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_grid_whose_answer_is_known(backend):
    cells = evaluate_grid(
        known_encode, QUERIES, DOCUMENTS, RELEVANT, layers=(1, 2), dims=(4, 8), ks=(1, 5), backend=backend
    )
    assert [(cell.layer, cell.dim) for cell in cells] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert [cell.index_bytes for cell in cells] == [20 * 4 * 4, 20 * 8 * 4] * 2
    for cell in cells[1:]:
        assert cell.recall[5] == cell.mrr[5] == cell.ndcg[5] == 1 and cell.recall[1] == pytest.approx(1 / 5)
    assert cells[0].recall[5] < 0.7 and cells[0].ms_per_query > 0
    assert pareto(cells, k=5) == [cells[0], cells[1], cells[2]]


def test_chunks_prompts_and_times_reach_the_cells():
    seen = []

    def counting(texts):
        seen.append(len(texts))
        return known_encode(texts)

    whole = evaluate_grid(known_encode, QUERIES, DOCUMENTS, RELEVANT, layers=[2], dims=[8], ks=[5])
    cells = evaluate_grid(
        counting,
        QUERIES,
        DOCUMENTS,
        RELEVANT,
        layers=[2],
        dims=[8],
        ks=[5],
        documents_at_once=8,
        encode_queries=lambda texts: {2: known_encode(texts)[2].flip(0)},
        encode_ms={2: 1.5},
    )
    assert seen == [8, 8, 4] and cells[0].encode_ms_per_query == 1.5
    assert whole[0].recall[5] == 1 and cells[0].recall[5] == 0  # queries in the wrong order find other topics


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [3]}, r"gives layers \[1, 2\], not 3"),
        ({"dims": [9]}, "dim 9 was asked for"),
        ({"relevant": [[0], [1], [2], [20]]}, "document 20, but there are 20"),
        ({"relevant": [[0]]}, "1 sets of relevant documents"),
        ({"documents": []}, "0 documents"),
        ({"dims": []}, "dims"),
    ],
)
def test_bad_input_to_the_grid(change, message):
    arguments = {"queries": QUERIES, "documents": DOCUMENTS, "relevant": RELEVANT, "layers": [1], "dims": [4]} | change
    with pytest.raises(ValueError, match=message):
        evaluate_grid(known_encode, **arguments)


def cell(layer, dim, recall):
    return RetrievalCell(layer, dim, {10: recall}, {10: recall}, {10: recall}, 0.1, 1000 * dim * 4)


GRID = [cell(4, 32, 0.5), cell(4, 64, 0.7), cell(8, 32, 0.6), cell(8, 64, 0.65), cell(12, 32, 0.6), cell(12, 64, 0.8)]


def test_the_front_holds_what_nothing_beats():
    front = pareto(GRID)
    # (8, 64) loses to (4, 64), which is shallower and better; (12, 32) to (8, 32), which is shallower and as good.
    assert [(c.layer, c.dim) for c in front] == [(4, 32), (4, 64), (8, 32), (12, 64)]
    assert pareto([GRID[0], GRID[0]]) == [GRID[0], GRID[0]]


def test_table_rows_and_figure(tmp_path):
    assert grid_table(GRID).splitlines() == [
        "| recall@10 | 32 dims | 64 dims |",
        "|---|---:|---:|",
        "| 4 layers | **0.500** | **0.700** |",
        "| 8 layers | **0.600** | 0.650 |",
        "| 12 layers | 0.600 | **0.800** |",
    ]
    assert GRID[0].row()["recall@10"] == 0.5 and GRID[0].row()["index_bytes"] == 128_000
    paths = [plot_pareto(GRID, tmp_path / f"{i}.png", others={"plain, cut": GRID[:4]}) for i in range(2)]
    assert paths[0].read_bytes() == paths[1].read_bytes() and paths[0].stat().st_size > 5000
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_pareto([], tmp_path / "x.png")


def test_runs_become_metrics_of_the_report(tmp_path):
    ours = [[cell(4, 32, 0.5 + 0.001 * seed), cell(12, 64, 0.8)] for seed in range(3)]
    plain = [[cell(4, 32, 0.3 + 0.001 * seed)] for seed in range(3)]
    metrics = grid_metrics(ours, baselines={"plain": plain})
    small = metrics["recall_at_10_layer_4_dim_32"]
    assert small.n == 3 and small.value == pytest.approx(0.501) and small.baseline["plain"].verdict == "holds"
    assert metrics["recall_at_10_layer_12_dim_64"].baseline == {}
    results = Results(
        method="m3bert",
        title="m3BERT",
        preset="demo",
        seeds=[0, 1, 2],
        command="",
        device="cpu",
        versions={},
        wall_seconds=1.0,
        metrics=metrics,
        evidence={"grid": [c.row() for c in ours[0]]},
        data=Data(name="x", fingerprint="0", license="mit", language=["en"]),
        model=Model(parameters_total=1, parameters_active=1, parameters_non_embedding=1),
    )
    write_results(tmp_path, results)
    assert read_results(tmp_path).metrics == metrics
    with pytest.raises(ValueError, match="same cells"):
        grid_metrics([ours[0], plain[0]])
