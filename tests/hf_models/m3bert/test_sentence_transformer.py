"""Sentence Transformers on folders saved by us: every cell, every way to ask for it, and the library's own losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.modules import Normalize
from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    Matryoshka2dLoss,
    MultipleNegativesRankingLoss,
)
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding, M3BertModel
from hf_models.m3bert.sentence_transformer import (
    M3BertSentenceTransformer,
    M3BertTransformer,
    save_for_sentence_transformers,
)
from trainers.data import train_encoder_tokenizer


LAYERS, DIMS = (1, 2, 3), (8, 16, 32)
CELLS = [(layer, dim) for layer in LAYERS for dim in DIMS]
TEXTS = ["the quick brown fox jumps over the lazy dog", "a fox", "dogs and foxes sleep", ""]


@pytest.fixture(scope="module")
def tokenizer():
    return train_encoder_tokenizer([*TEXTS, "query: passage: "] * 4, vocab_size=300, show_progress=False)


def build(tokenizer, kind=M3BertForSentenceEmbedding, **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    grid = {"mrl_layers": list(LAYERS), "mrl_dims": list(DIMS), "max_position_embeddings": 64}
    config = M3BertConfig(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **sizes, **grid, **changes)
    return kind(config).eval()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="module")
def folder(model, tokenizer, tmp_path_factory):
    return str(save_for_sentence_transformers(model, tokenizer, tmp_path_factory.mktemp("saved")))


@torch.no_grad()
def expected(model, tokenizer, layer=None, dim=None, texts=TEXTS):
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return model(batch.input_ids, batch.attention_mask, exit_layer=layer, embed_dim=dim).embeddings


def encoded(model, texts=TEXTS, **arguments):
    return model.encode(texts, convert_to_tensor=True, show_progress_bar=False, **arguments)


# --- the library's own class -----------------------------------------------------------------------------------------


@pytest.mark.compatibility("SentenceTransformer", method="m3bert", library="sentence-transformers")
def test_every_cell_equals_the_model_whatever_the_padding(folder, model, tokenizer):
    loaded = SentenceTransformer(folder)
    for layer, dim in CELLS:
        wanted = expected(model, tokenizer, layer, dim)
        for batch_size in (1, 3, 32):
            found = encoded(loaded, exit_layer=layer, embed_dim=dim, batch_size=batch_size)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="layer 4 is none of the trained"):
        loaded.encode(TEXTS, exit_layer=4)
    with pytest.raises(ValueError, match="dim 9 is none of the trained"):
        loaded.encode(TEXTS, embed_dim=9)


def test_truncate_dim_of_the_library_keeps_cosines_and_loses_the_length(folder, model, tokenizer):
    loaded = SentenceTransformer(folder, truncate_dim=8)
    wanted = expected(model, tokenizer, None, 8)
    torch.testing.assert_close(encoded(loaded, normalize_embeddings=True), wanted, atol=1e-6, rtol=1e-5)
    raw = encoded(loaded)
    assert raw.shape == (4, 8) and (raw.norm(dim=-1) < 0.99).all()
    torch.testing.assert_close(loaded.similarity(raw, raw), wanted @ wanted.T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("layer", "dim"), [(1, None), (2, 8), (None, 16)])
def test_cut_at_load_time(folder, model, tokenizer, layer, dim):
    asked = {name: value for name, value in (("num_layers", layer), ("embed_dim", dim)) if value is not None}
    loaded = SentenceTransformer(folder, model_kwargs=asked, truncate_dim=dim)
    assert len(loaded[0].model.layers) == (layer or 3) and loaded.get_embedding_dimension() == (dim or 32)
    torch.testing.assert_close(encoded(loaded), expected(model, tokenizer, layer, dim), atol=1e-6, rtol=1e-5)


def test_an_untrained_cut_is_refused_at_load_time(folder):
    with pytest.raises(ValueError, match="layer 7 is none of the trained"):
        SentenceTransformer(folder, model_kwargs={"num_layers": 7})


def test_the_folder_is_what_the_library_itself_writes_and_any_head_loads_from_it(folder, tmp_path):
    SentenceTransformer(folder).save_pretrained(str(tmp_path))
    own = ["modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    for name in [*own, "1_Pooling/config.json", "2_Normalize/config.json"]:
        assert json.loads(Path(folder, name).read_text()) == json.loads((tmp_path / name).read_text()), name
    assert isinstance(AutoModel.from_pretrained(folder), M3BertModel)
    assert AutoTokenizer.from_pretrained(folder)(TEXTS[0]).input_ids


@pytest.mark.parametrize("changes", [{"pooling": "cls"}, {"normalize_embeddings": False}, {"exit_norm": "none"}])
def test_pooling_norms_and_length_follow_the_config(tokenizer, tmp_path, changes):
    model = build(tokenizer, **changes)
    save_for_sentence_transformers(model, tokenizer, tmp_path)
    loaded, ours = SentenceTransformer(str(tmp_path)), M3BertSentenceTransformer(str(tmp_path))
    for layer, dim in CELLS[::2]:
        wanted = expected(model, tokenizer, layer, dim)
        found = [encoded(loaded, exit_layer=layer, embed_dim=dim), encoded(ours, exit_layer=layer, truncate_dim=dim)]
        for embeddings in found:
            torch.testing.assert_close(embeddings, wanted, atol=1e-6, rtol=1e-5)


def test_prompts(model, tokenizer, tmp_path):
    prompts = {"query": "query: ", "document": "passage: "}
    save_for_sentence_transformers(model, tokenizer, tmp_path, prompts=prompts)
    for loaded in (SentenceTransformer(str(tmp_path)), M3BertSentenceTransformer(str(tmp_path))):
        for encode, prompt in ((loaded.encode_query, "query: "), (loaded.encode_document, "passage: ")):
            wanted = expected(model, tokenizer, 2, 8, [prompt + text for text in TEXTS])
            found = encode(TEXTS, exit_layer=2, embed_dim=8, convert_to_tensor=True)
            torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_folder_of_save_pretrained_is_pooled_as_its_config_says(tokenizer, tmp_path, pooling):
    model = build(tokenizer, pooling=pooling)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    vectors = M3BertSentenceTransformer(str(tmp_path)).encode(TEXTS[:3], exit_layer=2, embed_dim=16)
    batch = tokenizer(TEXTS[:3], padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**batch, exit_layer=2, embed_dim=16).embeddings
    torch.testing.assert_close(torch.as_tensor(vectors), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.compatibility(
    "SentenceTransformer by the code of the repository", method="m3bert", library="sentence-transformers"
)
def test_a_process_without_this_package_loads_the_code_of_the_repository(folder, model, tokenizer, tmp_path):
    code = (
        "import json, sys; from sentence_transformers import SentenceTransformer; "
        f"model = SentenceTransformer({folder!r}, trust_remote_code=True); "
        f"found = model.encode({TEXTS!r}, exit_layer=2, embed_dim=8); "
        "assert not any(name.startswith('hf_models') for name in sys.modules); print(json.dumps(found.tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    torch.testing.assert_close(found, expected(model, tokenizer, 2, 8), atol=1e-5, rtol=1e-4)


# --- our class -------------------------------------------------------------------------------------------------------


def test_contexts_choose_the_cell_and_give_the_rest_back(folder, model, tokenizer):
    ours = M3BertSentenceTransformer(folder)
    for layer, dim in CELLS:
        with ours.truncate_layers(layer), ours.truncate_embeddings(dim):
            assert ours.get_embedding_dimension() == dim
            found = encoded(ours)
        torch.testing.assert_close(found, expected(model, tokenizer, layer, dim), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(found.norm(dim=-1), torch.ones(4))
    assert ours.exit_layer is ours.truncate_dim is None
    torch.testing.assert_close(encoded(ours), expected(model, tokenizer), atol=1e-6, rtol=1e-5)


def test_constructor_arguments_of_encode_and_the_order_of_precedence(folder, model, tokenizer):
    ours = M3BertSentenceTransformer(folder, exit_layer=2, truncate_dim=16)
    for arguments, cell in (
        ({}, (2, 16)),
        ({"exit_layer": 1}, (1, 16)),
        ({"truncate_dim": 8}, (2, 8)),
        ({"embed_dim": 8, "exit_layer": 3}, (3, 8)),
    ):
        found = encoded(ours, **arguments)
        torch.testing.assert_close(found, expected(model, tokenizer, *cell), atol=1e-6, rtol=1e-5)


def test_what_was_not_trained_is_refused_everywhere(folder):
    ours = M3BertSentenceTransformer(folder)
    for attempt in (
        lambda: M3BertSentenceTransformer(folder, truncate_dim=9),
        lambda: M3BertSentenceTransformer(folder, exit_layer=4),
        lambda: ours.truncate_layers(4).__enter__(),
        lambda: ours.truncate_embeddings(9).__enter__(),
        lambda: ours.encode(TEXTS, truncate_dim=9),
        lambda: ours.encode(TEXTS, exit_layer=0),
    ):
        with pytest.raises(ValueError, match="is none of the trained"):
            attempt()
    assert ours.exit_layer is ours.truncate_dim is None


def test_another_architecture_is_refused(tokenizer, tmp_path):
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no m3BERT but 'bert'"):
        M3BertSentenceTransformer(str(tmp_path))


def test_it_saves_what_the_plain_class_loads_also_after_a_cut(folder, model, tokenizer, tmp_path):
    ours = M3BertSentenceTransformer(folder, model_kwargs={"num_layers": 2, "embed_dim": 16})
    assert ours.get_embedding_dimension() == 16
    ours.save_pretrained(str(tmp_path))
    assert "hf_models" not in (tmp_path / "modules.json").read_text()
    assert type(ours[0]) is M3BertTransformer
    loaded = SentenceTransformer(str(tmp_path))
    assert len(loaded[0].model.layers) == 2 and loaded.get_embedding_dimension() == 16
    torch.testing.assert_close(encoded(loaded), expected(model, tokenizer, 2, 16), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        encoded(loaded, exit_layer=1, embed_dim=8), expected(model, tokenizer, 1, 8), atol=1e-6, rtol=1e-5
    )


def test_a_checkpoint_of_transformers_alone_gets_the_modules(tokenizer, tmp_path):
    model = build(tokenizer, M3BertForMaskedLM)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = M3BertSentenceTransformer(str(tmp_path), exit_layer=1, truncate_dim=8)
    assert isinstance(ours[-1], Normalize)
    embedder = M3BertForSentenceEmbedding(model.config).eval()
    embedder.model = model.model
    torch.testing.assert_close(encoded(ours), expected(embedder, tokenizer, 1, 8), atol=1e-6, rtol=1e-5)


# --- the library's losses --------------------------------------------------------------------------------------------


ANCHORS, POSITIVES = ["the quick fox", "lazy dogs"], ["a brown fox", "dogs sleep"]
PAIRS = Dataset.from_dict({"anchor": ANCHORS * 4, "positive": POSITIVES * 4})


def train(model, loss, folder, steps=2):
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    trainer = SentenceTransformerTrainer(model=model, args=arguments, train_dataset=PAIRS, loss=loss)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("kind", [SentenceTransformer, M3BertSentenceTransformer])
@pytest.mark.compatibility("Training with Matryoshka2dLoss", method="m3bert", library="sentence-transformers")
def test_two_steps_with_matryoshka_2d(kind, folder, tmp_path):
    model = kind(folder)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = Matryoshka2dLoss(model, MultipleNegativesRankingLoss(model), list(DIMS), n_layers_per_step=-1)
    losses = train(model, loss, tmp_path)
    assert len(losses) == 2 and all(0 < value < 100 for value in losses)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p.cpu(), before[name])]
    assert any("layers.0." in name for name in moved) and any(name.endswith("model.norm.weight") for name in moved)
    assert not model.config.output_hidden_states
    assert encoded(model, exit_layer=1, embed_dim=8).isfinite().all()


def layers_seen(model):
    """What AdaptiveLayerLoss would train: the list that the first module gives while all layers are asked for."""
    model.eval()
    model.config.output_hidden_states = True
    try:
        with torch.no_grad():
            features = model[0](model.preprocess(TEXTS))
    finally:
        model.config.output_hidden_states = False
    return features


def test_adaptive_layers_are_the_exits_of_our_class_and_raw_states_of_the_plain_one(folder, model, tokenizer):
    with torch.no_grad():
        features = layers_seen(M3BertSentenceTransformer(folder))
        exits = model.model(features["input_ids"], features["attention_mask"], output_exit_states=True)
        assert len(features["all_layer_embeddings"]) == 3
        for found, wanted in zip(features["all_layer_embeddings"], exits.exit_hidden_states):
            torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(features["token_embeddings"], exits.last_hidden_state)

        plain = layers_seen(SentenceTransformer(folder))["all_layer_embeddings"]
        assert len(plain) == 4  # the embedding layer, too
        assert not torch.allclose(plain[1], exits.exit_hidden_states[0], atol=1e-2)
        torch.testing.assert_close(model.model.norm(plain[1]), exits.exit_hidden_states[0])
        torch.testing.assert_close(plain[-1], exits.last_hidden_state)


def test_with_exit_norm_none_the_plain_class_trains_the_exits(tokenizer, tmp_path):
    model = build(tokenizer, exit_norm="none")
    save_for_sentence_transformers(model, tokenizer, tmp_path)
    features = layers_seen(SentenceTransformer(str(tmp_path)))
    with torch.no_grad():
        exits = model.model(features["input_ids"], features["attention_mask"], output_exit_states=True)
    for found, wanted in zip(features["all_layer_embeddings"][1:], exits.exit_hidden_states):
        torch.testing.assert_close(found, wanted)


def test_the_loss_of_all_exits_is_that_of_the_model_at_each(folder, tokenizer):
    """AdaptiveLayerLoss without KL over our exits: the last plus the mean of the others, of in-batch negatives."""
    ours = M3BertSentenceTransformer(folder).eval()
    loss = AdaptiveLayerLoss(ours, MultipleNegativesRankingLoss(ours), n_layers_per_step=-1, kl_temperature=0)
    with torch.no_grad():
        found = loss([ours.preprocess(ANCHORS), ours.preprocess(POSITIVES)], None)
    by_layer = []
    for layer in LAYERS:
        scores = 20 * encoded(ours, ANCHORS, exit_layer=layer) @ encoded(ours, POSITIVES, exit_layer=layer).T
        by_layer.append(F.cross_entropy(scores, torch.arange(2)).item())
    assert found.item() == pytest.approx(by_layer[2] + (by_layer[0] + by_layer[1]) / 2, rel=1e-4)
