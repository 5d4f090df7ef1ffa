"""A model cut to a cell of its grid is that cell bit for bit, in memory, in files, and read from the files of the
whole."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTextEncoding,
    AutoModelForTokenClassification,
)

from hf_models.m3bert import (
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertModel,
)
from hf_models.m3bert import truncation as truncation_module
from tests.hf_models.m3bert.tiny_m3bert import HEADS, IDS, KINDS, MASK, tiny


AUTO = dict(
    zip(
        HEADS,
        (
            AutoModel,
            AutoModelForMaskedLM,
            AutoModelForSequenceClassification,
            AutoModelForTokenClassification,
            AutoModelForTextEncoding,
        ),
        strict=True,
    )
)
CELLS = [(layers, dim) for layers in (2, 4, 6) for dim in (4, 8, 16, 32)]


def compute(model, **cell):
    with torch.no_grad():
        return model(IDS, attention_mask=MASK, **cell)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_class", HEADS)
def test_truncated_is_the_exit_bit_for_bit(model_class, kind):
    model = tiny(model_class, **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for layers, dim in CELLS:
        cut = model.truncate(layers, dim)
        assert torch.equal(compute(cut), compute(model, exit_layer=layers, embed_dim=dim)), (layers, dim)
        assert (cut.config.num_hidden_layers, cut.config.width) == (layers, dim)
    assert torch.equal(compute(model.truncate()), compute(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_model_can_be_cut_again(kind):
    model = tiny(M3BertForMaskedLM, **KINDS[kind])
    for first, second in (((4, 16), (2, 16)), ((6, 16), (4, 4)), ((4, 32), (2, 8))):
        cut = model.truncate(*first)
        expected = compute(model, exit_layer=second[0], embed_dim=second[1])
        assert torch.equal(compute(cut, exit_layer=second[0], embed_dim=second[1]), expected)
        assert torch.equal(compute(cut.truncate(*second)), expected)


def test_nothing_that_is_not_needed_is_left():
    model = tiny(M3BertForMaskedLM)
    names = dict(model.truncate(2, 8).named_parameters())
    assert not [name for name in names if ".layers." in name and int(name.split(".")[2]) >= 2]
    assert names["head.dense.weight"].shape == (8, 8) and names["head.norm.weight"].shape == (8,)
    assert names["head.decoder.weight"].shape == (61, 8) and names["head.decoder.bias"].shape == (61,)
    assert names["model.embed_tokens.weight"].shape == (61, 32)
    per_exit = tiny(exit_norm="per_exit").truncate(4)
    assert [name for name, _ in per_exit.named_parameters() if "norms" in name] == [
        "exit_norms.2.weight",
        "exit_norms.4.weight",
    ]
    assert not hasattr(tiny(exit_norm="none").truncate(4), "norm")
    assert hasattr(tiny(exit_norm="none").truncate(dim=8), "norm")


def test_a_cut_model_has_tensors_of_its_own_and_trains():
    for kind in KINDS.values():
        model = tiny(M3BertForMaskedLM, **kind).train()
        cut = model.truncate(4, 16)
        assert cut.training
        ours = {tensor.data_ptr() for tensor in model.state_dict().values()}
        assert not ours & {tensor.data_ptr() for tensor in cut.state_dict().values()}
        out = cut(IDS, attention_mask=MASK, labels=IDS)
        out.loss.backward()
        assert out.grid_losses.shape == (2, 3)
        assert all(p.grad is not None for p in cut.parameters())
    assert not tiny().truncate(2).training
    tied = tiny(M3BertForMaskedLM, tie_word_embeddings=True).truncate(2, 8)
    assert tied.head.decoder.weight is tied.model.embed_tokens.weight
    half = tiny(M3BertForMaskedLM, attn_implementation="eager").to(torch.bfloat16).truncate(2, 8)
    assert half.dtype == torch.bfloat16 and half.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ({"layers": 3}, r"layer 3 is none of the trained mrl_layers=\[2, 4, 6\]"),
        ({"dim": 5}, r"dim 5 is none of the trained mrl_dims=\[4, 8, 16, 32\]"),
    ],
)
def test_an_untrained_cell_is_refused(cell, message, tmp_path):
    model = tiny(M3BertForMaskedLM)
    with pytest.raises(ValueError, match=message):
        model.truncate(**cell)
    model.save_pretrained(tmp_path)
    options = {{"layers": "num_layers", "dim": "embed_dim"}[name]: value for name, value in cell.items()}
    for loader in (M3BertForMaskedLM, AutoModelForMaskedLM, AutoModel):
        with pytest.raises(ValueError, match=message):
            loader.from_pretrained(tmp_path, **options)
    with pytest.raises(ValueError, match="layer 4 is none of the trained"):
        model.truncate(2).truncate(4)


# --- in files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.compatibility("Auto classes", method="m3bert", note="whole, or cut to a cell of the grid")
def test_saved_and_loaded_in_both_ways(model_class, kind, tmp_path):
    model = tiny(model_class, **KINDS[kind])
    model.save_pretrained(tmp_path / "whole")
    for layers, dim in ((2, 4), (4, 32), (6, 8)) if kind == "ours" else ((4, 8),):
        expected = compute(model, exit_layer=layers, embed_dim=dim)
        model.truncate(layers, dim).save_pretrained(tmp_path / "cut")
        wanted = dict.fromkeys(("missing_keys", "unexpected_keys", "mismatched_keys"), set())
        options = {"num_layers": layers, "embed_dim": dim}
        for folder, chosen in ((tmp_path / "cut", {}), (tmp_path / "whole", options)):
            for loader in (model_class, AUTO[model_class]) if chosen else (model_class,):
                loaded, info = loader.from_pretrained(folder, output_loading_info=True, **chosen)
                assert {name: info[name] for name in wanted} == wanted
                assert torch.equal(compute(loaded), expected), (layers, dim, folder.name)
                assert (
                    loaded.config.to_dict().items()
                    >= {"num_hidden_layers": layers, "architectures": [model_class.__name__]}.items()
                )
                assert loaded.name_or_path == str(folder) and not loaded.training


def test_another_head_of_the_same_file(tmp_path):
    model = tiny(M3BertForMaskedLM)
    model.save_pretrained(tmp_path / "head")
    model.model.save_pretrained(tmp_path / "body")
    expected = compute(model.model, exit_layer=4, embed_dim=8)
    for folder in ("head", "body"):
        for loader in (M3BertModel, AutoModel):
            loaded = loader.from_pretrained(tmp_path / folder, num_layers=4, embed_dim=8)
            assert torch.equal(compute(loaded), expected)
        embedding = M3BertForSentenceEmbedding.from_pretrained(tmp_path / folder, num_layers=4, embed_dim=8)
        assert torch.equal(compute(embedding.model), expected)
    classifier, info = M3BertForSequenceClassification.from_pretrained(
        tmp_path / "body", num_layers=4, num_labels=5, dtype=torch.bfloat16, output_loading_info=True
    )
    assert info["missing_keys"] == {"score.weight", "score.bias"}
    assert classifier.score.weight.shape == (5, 32) and classifier.dtype == torch.bfloat16


def test_a_config_of_a_smaller_model_cuts_as_well(tmp_path):
    model = tiny(M3BertForMaskedLM)
    model.save_pretrained(tmp_path)
    config = model.config.truncated(4)
    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path, config=config, embed_dim=8, attn_implementation="eager")
    assert loaded.config._attn_implementation == "eager"
    torch.testing.assert_close(compute(loaded), compute(model, exit_layer=4, embed_dim=8))
    whole = AutoModelForMaskedLM.from_pretrained(tmp_path, config=model.config)
    assert torch.equal(compute(whole), compute(model))
    assert torch.equal(compute(M3BertForMaskedLM.from_pretrained(tmp_path, num_layers=6)), compute(model))


@pytest.fixture
def reads(monkeypatch):
    """Every tensor that is read from a file."""
    seen = []

    class Recorder:
        def __init__(self, file, **options):
            self.stream = safe_open(file, **options)

        def __enter__(self):
            self.stream.__enter__()
            return self

        def __exit__(self, *error):
            return self.stream.__exit__(*error)

        def keys(self):
            return self.stream.keys()

        def get_slice(self, key):
            seen.append(key)
            return self.stream.get_slice(key)

    monkeypatch.setattr(truncation_module, "safe_open", Recorder)
    return seen


def test_only_what_is_needed_is_read(tmp_path, reads):
    model = tiny(M3BertForMaskedLM)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, num_layers=2, embed_dim=8)
    assert torch.equal(compute(loaded), compute(model.model, exit_layer=2, embed_dim=8))
    assert sorted(reads) == sorted(f"model.{name}" for name in loaded.state_dict())


@pytest.mark.parametrize("harm", ["absent", "damaged"])
def test_shards_that_are_not_needed_may_be_missing(tmp_path, harm):
    model = tiny(M3BertForMaskedLM)
    model.save_pretrained(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {shard for name, shard in index.items() if name in model.truncate(2, 8).state_dict()}
    spare = set(index.values()) - needed
    assert len(needed) > 1 and len(spare) > 1
    for shard in spare:
        (tmp_path / shard).write_bytes(b"damaged") if harm == "damaged" else (tmp_path / shard).unlink()
    for loader in (M3BertForMaskedLM, AutoModelForMaskedLM):
        loaded = loader.from_pretrained(tmp_path, num_layers=2, embed_dim=8)
        assert torch.equal(compute(loaded), compute(model, exit_layer=2, embed_dim=8))
    with pytest.raises(Exception, match="(?i)no such file|header|not found|deserializ"):
        M3BertForMaskedLM.from_pretrained(tmp_path)


def test_an_index_reads_no_file_elsewhere(tmp_path):
    (tmp_path / "run").mkdir()
    model = tiny(M3BertForMaskedLM)
    model.save_pretrained(tmp_path / "run", max_shard_size="12KB")
    path = tmp_path / "run" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    model.save_pretrained(tmp_path / "secret")
    for name in ("../secret/model.safetensors", str(tmp_path / "secret" / "model.safetensors"), "model.bin"):
        path.write_text(json.dumps(index | {"weight_map": dict.fromkeys(index["weight_map"], name)}))
        with pytest.raises(ValueError, match="not a plain file name"):
            M3BertForMaskedLM.from_pretrained(tmp_path / "run", num_layers=2)


def test_without_safetensors_the_remedy_is_named(tmp_path):
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="holds no safetensors files.*`model.truncate"):
        M3BertModel.from_pretrained(tmp_path, num_layers=2)


def test_variants_and_subfolders(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "inside", variant="fp32")
    loaded = M3BertModel.from_pretrained(tmp_path, num_layers=2, variant="fp32", subfolder="inside")
    assert torch.equal(compute(loaded), compute(model, exit_layer=2))
