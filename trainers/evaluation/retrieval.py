"""Retrieval over the whole grid of exits and prefixes: one pass of the encoder, then exact search in every cell."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..report import Metric, summarise, verdict


Encode = Callable[[Sequence[str]], Mapping[int, Tensor]]
Measure = Literal["recall", "mrr", "ndcg"]
FP32_BYTES = 4
FAISS_IS_INSTALLED = find_spec("faiss") is not None  # the extra `retrieval`; the same search runs in torch


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over the queries, by cut-off k; all in [0, 1]."""

    recall: dict[int, float]
    mrr: dict[int, float]
    ndcg: dict[int, float]


@dataclass(frozen=True)
class SearchResult:
    """The best documents of each query, best first, `(queries, k)` both; the median over batches of their time."""

    ids: Tensor
    scores: Tensor
    ms_per_query: float


@dataclass(frozen=True)
class RetrievalCell:
    """One cell of the grid: exit `layer`, the first `dim` entries of its embedding.

    `ms_per_query` is the exact search alone, `encode_ms_per_query` what the encoder takes up to that exit, where it
    was measured; `index_bytes` is the document matrix in fp32.
    """

    layer: int
    dim: int
    recall: dict[int, float]
    mrr: dict[int, float]
    ndcg: dict[int, float]
    ms_per_query: float
    index_bytes: int
    encode_ms_per_query: float | None = None

    def row(self) -> dict[str, Any]:
        """The cell as it goes into results.json: `recall@10` and the like beside the rest."""
        row = {"layer": self.layer, "dim": self.dim}
        for measure in ("recall", "mrr", "ndcg"):
            row |= {f"{measure}@{k}": value for k, value in getattr(self, measure).items()}
        row |= {"ms_per_query": self.ms_per_query, "index_bytes": self.index_bytes}
        return row | {"encode_ms_per_query": self.encode_ms_per_query}


def retrieval_metrics(
    ranked: Tensor, relevant: Sequence[Collection[int] | Mapping[int, float]], *, ks: Sequence[int] = (10, 100)
) -> RetrievalMetrics:
    r"""Recall@k, MRR@k and nDCG@k, averaged over the queries.

    With `g_i` the gain of the document at rank i (1 or 0, or what a mapping gives) and R the number of relevant ones:

        recall@k = |{i <= k : g_i > 0}| / R,    mrr@k = 1 / (first i <= k with g_i > 0), else 0,
        ndcg@k = sum_{i <= k} g_i / log2(i + 1), divided by the same sum for the best possible order

    the definitions of trec_eval (`recall`, `recip_rank` cut at k, `ndcg_cut` with linear gains).

    Args:
        ranked: `(queries, n)`, either ids of documents, best first (-1 where there is none), or, in floating point,
            the scores of all documents.
        relevant: for each query the ids of its relevant documents, or a mapping from id to gain.

    Raises:
        ValueError: lengths differ, a query has no relevant document, a negative gain, or a k below 1.
    """
    if not ks or min(ks) < 1:
        raise ValueError(f"ks={list(ks)}: every cut-off must be at least 1.")
    if len(ranked) != len(relevant) or not len(relevant):
        raise ValueError(f"{len(ranked)} rankings for {len(relevant)} sets of relevant documents.")
    if ranked.is_floating_point():
        ranked = _by_score_then_id(*ranked.float().topk(min(max(ks), ranked.shape[1])))[1]
    depth = max(ks)
    gains = torch.zeros(len(ranked), depth, dtype=torch.float64)
    ideal = torch.zeros_like(gains)
    counts = torch.zeros(len(ranked), dtype=torch.float64)
    for query, (ids, wanted) in enumerate(zip(ranked[:, :depth].tolist(), relevant)):
        wanted = dict(wanted) if isinstance(wanted, Mapping) else dict.fromkeys(wanted, 1.0)
        positive = sorted((gain for gain in wanted.values() if gain > 0), reverse=True)
        if not positive or min(wanted.values()) < 0:
            raise ValueError(f"Query {query} has no relevant document or a negative gain: {wanted}; leave it out.")
        gains[query, : len(ids)] = torch.tensor([wanted.get(id_, 0.0) for id_ in ids], dtype=torch.float64)
        ideal[query, : len(positive)] = torch.tensor(positive[:depth], dtype=torch.float64)
        counts[query] = len(positive)

    ranks = torch.arange(1, depth + 1, dtype=torch.float64)
    found = (gains > 0).double()
    reciprocal = (found / ranks).cummax(dim=1).values  # the first relevant rank gives the largest
    dcg, best = ((g / (ranks + 1).log2()).cumsum(dim=1) for g in (gains, ideal))
    recall = found.cumsum(dim=1) / counts[:, None]
    return RetrievalMetrics(
        recall={k: recall[:, k - 1].mean().item() for k in ks},
        mrr={k: reciprocal[:, k - 1].mean().item() for k in ks},
        ndcg={k: (dcg[:, k - 1] / best[:, k - 1]).mean().item() for k in ks},
    )


def exact_search(
    queries: Tensor,
    documents: Tensor,
    k: int,
    *,
    batch_size: int = 1024,
    backend: Literal["faiss", "torch"] | None = None,
    device: torch.device | str | None = None,
) -> SearchResult:
    """The `k` documents of largest inner product for each query, among all documents, none approximated.

    FAISS' `IndexFlatIP` if it is installed and no `device` is asked for, else matrix products over blocks of
    documents. Both find the same documents up to the last bits of the scores. Equal scores are ordered by id; which of
    them make it, where they straddle the k-th place, is left open.

    Args:
        queries, documents: `(queries, d)` and `(documents, d)`, normalised by the caller if cosines are meant.
        batch_size: queries at a time; the time of a query is measured on such batches, so 1 measures single queries.

    Raises:
        ValueError: widths differ, nothing to search, values that are not finite, `faiss` with a device.
        ImportError: `backend="faiss"` without it.
    """
    if queries.shape[-1] != documents.shape[-1] or not len(queries) or not len(documents):
        raise ValueError(f"Cannot search {tuple(documents.shape)} documents for {tuple(queries.shape)} queries.")
    for name, vectors in (("queries", queries), ("documents", documents)):
        if not vectors.isfinite().all():
            raise ValueError(f"The {name} hold NaN or an infinity: the encoder diverged.")
    if backend == "faiss" and device is not None:
        raise ValueError("FAISS searches on the CPU here; leave out `device`, or take backend='torch'.")
    if backend == "faiss" and not FAISS_IS_INSTALLED:
        raise ImportError("faiss is not installed: `pip install 'hf-sigma[retrieval]'`, or backend='torch'.")
    if backend is None:
        backend = "faiss" if FAISS_IS_INSTALLED and device is None else "torch"
    k = min(k, len(documents))
    search = _faiss_search(documents, k) if backend == "faiss" else _torch_search(documents, k, device)
    batches = queries.float().split(batch_size)
    search(batches[0])  # threads and buffers come into being outside the measured time
    ids, scores, times = [], [], []
    for batch in batches:
        start = time.perf_counter()
        batch_scores, batch_ids = search(batch)
        times.append(1e3 * (time.perf_counter() - start) / len(batch))
        batch_scores, batch_ids = _by_score_then_id(batch_scores, batch_ids)
        ids.append(batch_ids)
        scores.append(batch_scores)
    return SearchResult(torch.cat(ids), torch.cat(scores), statistics.median(times))


def _faiss_search(documents: Tensor, k: int) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    import faiss

    index = faiss.IndexFlatIP(documents.shape[1])
    index.add(documents.float().cpu().contiguous().numpy())

    def search(batch: Tensor) -> tuple[Tensor, Tensor]:
        scores, ids = index.search(batch.cpu().contiguous().numpy(), k)
        return torch.from_numpy(scores), torch.from_numpy(ids)

    return search


def _torch_search(
    documents: Tensor, k: int, device: torch.device | str | None, block: int = 65_536
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    documents = documents.float().to(device or documents.device)

    def search(batch: Tensor) -> tuple[Tensor, Tensor]:
        batch, best = batch.to(documents.device), None
        for start in range(0, len(documents), block):
            scores = batch @ documents[start : start + block].T  # (batch, block)
            scores, ids = scores.topk(min(k, scores.shape[1]))
            ids += start
            if best is not None:
                scores, ids = torch.cat([best[0], scores], dim=1), torch.cat([best[1], ids], dim=1)
                scores, order = scores.topk(min(k, scores.shape[1]))
                ids = ids.gather(1, order)
            best = scores, ids
        return best[0].cpu(), best[1].cpu()  # waits for the device, so the clock sees all of it

    return search


def _by_score_then_id(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    ids, order = ids.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, ids.gather(1, order)


def evaluate_grid(
    encode: Encode,
    queries: Sequence[str],
    documents: Sequence[str],
    relevant: Sequence[Collection[int] | Mapping[int, float]],
    *,
    layers: Sequence[int],
    dims: Sequence[int],
    ks: Sequence[int] = (10, 100),
    encode_queries: Encode | None = None,
    encode_ms: Mapping[int, float] | None = None,
    batch_size: int = 1024,
    documents_at_once: int = 50_000,
    backend: Literal["faiss", "torch"] | None = None,
    device: torch.device | str | None = None,
) -> list[RetrievalCell]:
    """Retrieval quality and cost of every cell, layers outside, dims inside, in the order given.

    A cell slices the pooled embedding of its exit, L2-normalises the slice, and searches exactly, so that one pass of
    the encoder over the texts serves the whole grid.

    Args:
        encode: texts -> pooled embeddings `(texts, H)` by layer, not normalised; see [`encode_with`].
        relevant: for each query the indices in `documents` that answer it, or a mapping from index to gain.
        encode_queries: as `encode`, where queries need a prompt of their own.
        encode_ms: milliseconds that the encoder takes for a query, by layer; goes into the cells.
        documents_at_once: how many texts go to `encode` in one call; the widest prefix asked for is kept of them.
        batch_size, backend, device: see [`exact_search`].

    Raises:
        ValueError: nothing to search, an index out of range, a layer that `encode` does not give, a dim beyond it.
    """
    if len(queries) != len(relevant) or not len(queries) or not len(documents) or not layers or not dims:
        raise ValueError(
            f"{len(queries)} queries, {len(relevant)} sets of relevant documents, {len(documents)} documents, layers "
            f"{list(layers)}, dims {list(dims)}: a grid needs some of each, and as many sets as queries."
        )
    outside = [index for wanted in relevant for index in wanted if not 0 <= index < len(documents)]
    if outside:
        raise ValueError(f"`relevant` names document {outside[0]}, but there are {len(documents)}.")
    sides = ((encode_queries or encode, queries), (encode, documents))
    encoded = [_encoded(side, texts, layers, max(dims), documents_at_once) for side, texts in sides]
    cells = []
    for layer in layers:
        for dim in dims:
            sliced = [F.normalize(vectors[layer][:, :dim], dim=-1) for vectors in encoded]
            found = exact_search(*sliced, max(ks), batch_size=batch_size, backend=backend, device=device)
            cells.append(
                RetrievalCell(
                    layer=layer,
                    dim=dim,
                    **vars(retrieval_metrics(found.ids, relevant, ks=ks)),
                    ms_per_query=found.ms_per_query,
                    index_bytes=len(documents) * dim * FP32_BYTES,
                    encode_ms_per_query=(encode_ms or {}).get(layer),
                )
            )
    return cells


def _encoded(
    encode: Encode, texts: Sequence[str], layers: Sequence[int], width: int, at_once: int
) -> dict[int, Tensor]:
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for start in range(0, len(texts), at_once):
        chunk = texts[start : start + at_once]
        exits = encode(chunk)
        for layer in layers:
            if layer not in exits:
                raise ValueError(f"`encode` gives layers {sorted(exits)}, not {layer}.")
            if exits[layer].shape[0] != len(chunk) or exits[layer].shape[1] < width:
                raise ValueError(
                    f"`encode` gives {tuple(exits[layer].shape)} for {len(chunk)} texts at layer {layer}, but dim "
                    f"{width} was asked for."
                )
            parts[layer].append(exits[layer][:, :width].float().clone())
    return {layer: torch.cat(chunks) for layer, chunks in parts.items()}


def pareto(cells: Sequence[RetrievalCell], *, measure: Measure = "recall", k: int = 10) -> list[RetrievalCell]:
    """The cells that no other beats: none is as good with no larger index and no deeper exit, and better in one.

    In the order of `cells`. Equal cells keep each other.
    """

    def dominates(one: RetrievalCell, other: RetrievalCell) -> bool:
        no_worse = (
            getattr(one, measure)[k] >= getattr(other, measure)[k]
            and one.index_bytes <= other.index_bytes
            and one.layer <= other.layer
        )
        same = (getattr(one, measure)[k], one.index_bytes, one.layer) == (
            getattr(other, measure)[k],
            other.index_bytes,
            other.layer,
        )
        return no_worse and not same

    return [cell for cell in cells if not any(dominates(other, cell) for other in cells)]


def grid_table(cells: Sequence[RetrievalCell], *, measure: Measure = "recall", k: int = 10) -> str:
    """Markdown: a line for each layer, a column for each dim, cells of the Pareto front in bold."""
    layers, dims = (list(dict.fromkeys(getattr(cell, name) for cell in cells)) for name in ("layer", "dim"))
    front = {(cell.layer, cell.dim) for cell in pareto(cells, measure=measure, k=k)}
    values = {(cell.layer, cell.dim): getattr(cell, measure)[k] for cell in cells}

    def shown(layer: int, dim: int) -> str:
        if (layer, dim) not in values:
            return ""
        text = f"{values[layer, dim]:.3f}"
        return f"**{text}**" if (layer, dim) in front else text

    lines = [
        f"| {measure}@{k} | " + " | ".join(f"{dim} dims" for dim in dims) + " |",
        "|---" + "|---:" * len(dims) + "|",
    ]
    lines += [f"| {layer} layers | " + " | ".join(shown(layer, dim) for dim in dims) + " |" for layer in layers]
    return "\n".join(lines) + "\n"


def grid_metrics(
    runs: Sequence[Sequence[RetrievalCell]],
    *,
    baselines: Mapping[str, Sequence[Sequence[RetrievalCell]]] | None = None,
    measure: Measure = "recall",
    k: int = 10,
) -> dict[str, Metric]:
    """`{"recall_at_10_layer_4_dim_64": Metric, ...}` over the seeds in `runs`, for [`Results.metrics`].

    `baselines` are the same grids of other models, seed by seed in the order of `runs`; each is compared cell by cell,
    with a verdict where three seeds or more carry one. A cell that a baseline lacks has no such baseline.

    Raises:
        ValueError: no run, runs with different cells, or another number of seeds in a baseline.
    """
    ours = _values_by_cell(runs, measure, k)
    metrics = {}
    for (layer, dim), values in ours.items():
        metric = summarise(values, higher_is_better=True)
        for name, others in (baselines or {}).items():
            theirs = _values_by_cell(others, measure, k).get((layer, dim))
            if theirs is None:
                continue
            metric.baseline[name] = summarise(theirs, higher_is_better=True)
            if min(len(values), len(theirs)) >= 3:
                metric.baseline[name].verdict = verdict(values, theirs, higher_is_better=True)
        metrics[f"{measure}_at_{k}_layer_{layer}_dim_{dim}"] = metric
    return metrics


def _values_by_cell(
    runs: Sequence[Sequence[RetrievalCell]], measure: Measure, k: int
) -> dict[tuple[int, int], list[float]]:
    by_run = [{(cell.layer, cell.dim): getattr(cell, measure)[k] for cell in run} for run in runs]
    if not by_run or any(run.keys() != by_run[0].keys() for run in by_run):
        raise ValueError("Every run needs the same cells, and there must be a run.")
    return {cell: [run[cell] for run in by_run] for cell in by_run[0]}
