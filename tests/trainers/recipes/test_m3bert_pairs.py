"""Contrastive training with a plain Trainer: what a batch holds, what the loss of it is, and for which encoders."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from hf_models.m3bert import M3BertConfig, M3BertForSentenceEmbedding
from tests.trainers.recipes.tiny_encoder import TINY
from trainers.data import RetrievalSet, train_encoder_tokenizer
from trainers.recipes.m3bert_pairs import (
    PairCollator,
    PairLoss,
    cells_of,
    grid_objective,
    grid_of,
    load_encoder,
    measure_cells,
    pooled_exits,
)


ROWS = [{"input_ids": [0, 10 + i, 2], "document_ids": [0, *range(10 + i, 18 + i), 2]} for i in range(4)]
ROWS[1] = {"input_ids": [0, 30, 31, 32, 2], "document_ids": [0, 33, 2]}


@pytest.fixture(scope="module")
def tokenizer():
    return train_encoder_tokenizer(["some text to read"] * 3, vocab_size=290, show_progress=False)


def m3bert() -> M3BertForSentenceEmbedding:
    return M3BertForSentenceEmbedding(M3BertConfig(vocab_size=300, max_position_embeddings=16, **TINY))


def bert() -> BertModel:
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertModel(BertConfig(vocab_size=300, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **shape))


def loss_of(model, tokenizer, layers, dims, **options):
    batch = PairCollator(tokenizer, model)(ROWS)
    labels = batch.pop("labels")
    return PairLoss(model, grid_objective(layers, dims, temperature=0.1), **options)(model(**batch), labels)


def test_neither_side_is_padded_to_the_other(tokenizer):
    batch = PairCollator(tokenizer, m3bert())(ROWS)
    assert batch["input_ids"].shape == (4, 5) and batch["labels"]["documents"]["input_ids"].shape == (4, 10)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 5, 3, 3] and batch["output_exit_embeddings"] is True


@pytest.mark.parametrize("build", [m3bert, bert])
def test_the_loss_is_that_of_the_definition(tokenizer, build):
    model = build().eval()
    expected = 0.0
    vectors = {}
    for side in ("input_ids", "document_ids"):
        for layer in (1, 2):
            rows = []
            for row in ROWS:
                ids = torch.tensor([row[side]])
                if build is m3bert:
                    states = model.model(ids, output_exit_states=True).exit_hidden_states[layer - 1]
                else:
                    states = model(ids, output_hidden_states=True).hidden_states[layer]
                rows.append(states[0].mean(dim=0))
            vectors[side, layer] = torch.stack(rows)
    for layer in (1, 2):
        for dim in (8, 16):
            q, d = (F.normalize(vectors[side, layer][:, :dim], dim=-1) for side in ("input_ids", "document_ids"))
            expected += F.cross_entropy(q @ d.T / 0.1, torch.arange(4))
    loss = loss_of(model, tokenizer, [1, 2], [8, 16])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(loss_of(model, tokenizer, [1, 2], [8, 16], accumulation_steps=4), expected / 4)


def test_both_sides_have_gradients(tokenizer):
    model = m3bert()
    loss_of(model, tokenizer, [1], [8]).backward()
    table = model.model.embed_tokens.weight.grad.abs().sum(dim=1)
    assert table[30] > 0 and table[33] > 0, "a token of a query, one of a document"
    layers = [p.grad for p in model.model.layers[1].parameters()]
    assert all(grad is None or not grad.any() for grad in layers), "nothing above the cell learns"


def test_grids_and_exits_of_any_encoder():
    assert grid_of(m3bert()) == ([1, 2], [8, 16]) and grid_of(bert()) == ([2], [16])
    mask = torch.tensor([[1, 1, 0]])
    states = (torch.zeros(1, 3, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]]))
    pooled = pooled_exits(bert(), {"hidden_states": states}, mask)
    assert list(pooled) == [1] and pooled[1].tolist() == [[2.0, 3.0]]


def test_encoders_by_folder(tmp_path):
    ours, other = m3bert(), bert()
    ours.save_pretrained(tmp_path / "m3bert")
    other.save_pretrained(tmp_path / "bert")
    again = load_encoder(str(tmp_path / "m3bert"), mrl_layers=[2])
    assert isinstance(again, M3BertForSentenceEmbedding) and again.config.mrl_layers == [2]
    assert isinstance(load_encoder(str(tmp_path / "bert")), BertModel)
    with pytest.raises(ValueError, match="is no m3BERT: mrl_dims"):
        load_encoder(str(tmp_path / "bert"), mrl_dims=[8])


def test_cells_survive_a_results_file(tokenizer):
    model = m3bert()
    queries = RetrievalSet(["some", "text"], ["some text", "to read", "read some"], [[0], [1, 2]], ["en", "en"])
    lengths = {"query_length": 6, "document_length": 8}
    cells = measure_cells(model, tokenizer, queries, layers=[1, 2], dims=[8], **lengths)
    assert [(cell.layer, cell.dim) for cell in cells] == [(1, 8), (2, 8)]
    assert cells_of([cell.row() for cell in cells]) == cells


def test_what_a_trainer_passes_is_what_the_loss_takes():
    loss = PairLoss(None, lambda q, d: torch.tensor(1.0))
    with pytest.raises(AttributeError):  # no model: it is asked for the documents
        loss(SimpleNamespace(), {"documents": {}, "query_mask": None}, num_items_in_batch=3)
