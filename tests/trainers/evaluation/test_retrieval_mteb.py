"""A retrieval task of our own through `mteb.evaluate`, without a network, against our own grid."""

import mteb
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from hf_models.m3bert import M3BertConfig, M3BertForSentenceEmbedding
from hf_models.m3bert.sentence_transformer import save_for_sentence_transformers
from trainers.data import train_encoder_tokenizer
from trainers.evaluation import encode_with, evaluate_grid
from trainers.evaluation.retrieval_mteb import mteb_model_meta


WORDS = ["fox", "dog", "river", "mountain", "paper", "cloud", "train", "music", "garden", "winter", "stone", "lamp"]
DOCUMENTS = [f"the {a} and the {b}" for a in WORDS for b in WORDS if a < b]
QUERIES = [f"{a} with {b}" for a, b in zip(WORDS, WORDS[1:])]
RELEVANT = [[i for i, d in enumerate(DOCUMENTS) if a in d.split() or b in d.split()] for a, b in zip(WORDS, WORDS[1:])]


class LocalRetrieval(AbsTaskRetrieval):
    metadata = TaskMetadata(
        type="Retrieval",
        name="LocalRetrieval",
        main_score="ndcg_at_10",
        description="Sentences that share a word.",
        reference="https://example.com",
        dataset={"path": "local", "revision": "1"},
        category="t2t",
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-01-01"),
        dialect=[],
        domains=[],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        modalities=["text"],
        sample_creation="created",
        bibtex_citation="",
    )

    def load_data(self, **kwargs):
        split = {
            "corpus": Dataset.from_list([{"id": f"d{i}", "text": t, "title": ""} for i, t in enumerate(DOCUMENTS)]),
            "queries": Dataset.from_list([{"id": f"q{i}", "text": t} for i, t in enumerate(QUERIES)]),
            "relevant_docs": {f"q{i}": {f"d{j}": 1 for j in wanted} for i, wanted in enumerate(RELEVANT)},
            "top_ranked": None,
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    tokenizer = train_encoder_tokenizer([*DOCUMENTS, *QUERIES], vocab_size=320, show_progress=False)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    grid = {"mrl_layers": [1, 2, 3], "mrl_dims": [8, 32], "max_position_embeddings": 32}
    model = M3BertForSentenceEmbedding(M3BertConfig(vocab_size=len(tokenizer), **sizes, **grid)).eval()
    folder = save_for_sentence_transformers(model, tokenizer, tmp_path_factory.mktemp("m3bert"))
    return model, tokenizer, folder


@pytest.mark.compatibility("mteb.evaluate on a retrieval task", method="m3bert", library="mteb")
def test_scores_of_mteb_are_those_of_our_grid(saved):
    model, tokenizer, folder = saved
    meta = mteb_model_meta(folder, name="me/m3bert", languages=["eng-Latn"])
    cells = evaluate_grid(
        lambda texts: encode_with(model, tokenizer, texts, layers=(1, 3)),
        QUERIES,
        DOCUMENTS,
        RELEVANT,
        layers=(1, 3),
        dims=(8, 32),
        ks=(10,),
    )
    for cell in cells:
        loaded = meta.load_model(exit_layer=cell.layer, embed_dim=cell.dim, device="cpu")
        result = mteb.evaluate(loaded, LocalRetrieval(), cache=None, co2_tracker=False, show_progress_bar=False)
        (scores,) = result.task_results[0].scores["test"]
        for measure in ("recall", "mrr", "ndcg"):
            # MTEB rounds its scores to five digits
            assert scores[f"{measure}_at_10"] == pytest.approx(getattr(cell, measure)[10], abs=1e-5), (measure, cell)
    assert len({cell.ndcg[10] for cell in cells}) == 4


def test_results_of_different_cells_are_kept_apart(saved):
    meta = mteb_model_meta(saved[2], name="me/m3bert")
    cells = [meta.load_model(exit_layer=layer, embed_dim=8).mteb_model_meta for layer in (1, 3)]
    assert cells[0] != cells[1] and cells[0].embed_dim == 8
    assert [cell.experiment_name for cell in cells] == ["embed_dim_8__exit_layer_1", "embed_dim_8__exit_layer_3"]
    assert meta.load_model().mteb_model_meta.experiment_name is None


def test_what_was_not_trained_is_refused(saved):
    meta = mteb_model_meta(saved[2], name="me/m3bert")
    with pytest.raises(ValueError, match="16 is not in the model's supported embedding dimensions"):
        meta.load_model(embed_dim=16)
    with pytest.raises(ValueError, match="layer 4 is none of the trained"):
        meta.load_model(exit_layer=4)
    with pytest.raises(ValueError, match="organization/model_name"):
        mteb_model_meta(saved[2], name="m3bert")
