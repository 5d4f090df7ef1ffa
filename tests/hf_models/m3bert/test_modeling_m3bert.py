"""m3BERT against its definition in float64, and what users of transformers rely on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_models.m3bert import (
    M3BertConfig,
    M3BertForMaskedLM,
    M3BertForSentenceEmbedding,
    M3BertForSequenceClassification,
    M3BertForTokenClassification,
    M3BertModel,
)
from tests.hf_models.m3bert.tiny_m3bert import HEADS, IDS, KINDS, MASK, tiny


# --- the definition


def rms(x, weight, eps):
    return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight


def reference_states(model, ids, mask):
    """Exits of the encoder for right-padded ids by the equations of the module, one text after the other."""
    c, w = model.config, {name: tensor.double() for name, tensor in model.state_dict().items()}
    heads, kv, size, eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
    states = {layer: torch.zeros(*ids.shape, c.hidden_size, dtype=torch.float64) for layer in c.mrl_layers}
    for row, length in enumerate(mask.sum(1).tolist()):
        positions = torch.arange(length)
        h = w["embed_tokens.weight"][ids[row, :length]]
        if c.position_embedding_type == "absolute":
            h = h + w["embed_positions.weight"][positions]
        h = rms(h, w["embed_norm.weight"], eps)
        for i in range(c.num_hidden_layers):
            p = {name.removeprefix(f"layers.{i}."): t for name, t in w.items() if name.startswith(f"layers.{i}.")}
            u = rms(h, p["input_layernorm.weight"], eps)
            q, k, v = (
                (u @ p[f"self_attn.{n}_proj.weight"].T).view(length, count, size)
                for n, count in (("q", heads), ("k", kv), ("v", kv))
            )
            if c.position_embedding_type == "rope":
                angle = positions[:, None] / 500000.0 ** (torch.arange(0, size, 2).double() / size)  # (length, size/2)
                turn = torch.polar(torch.ones_like(angle), angle)[:, None]
                half = size // 2
                q, k = (
                    torch.cat([z.real, z.imag], -1)
                    for z in (torch.complex(x[..., :half], x[..., half:]) * turn for x in (q, k))
                )
            k, v = (x.repeat_interleave(heads // kv, dim=1) for x in (k, v))
            probabilities = (torch.einsum("qhd,khd->hqk", q, k) / size**0.5).softmax(-1)
            mixed = torch.einsum("hqk,khd->qhd", probabilities, v).reshape(length, -1)
            h = h + mixed @ p["self_attn.o_proj.weight"].T
            u = rms(h, p["post_attention_layernorm.weight"], eps)
            gated = F.silu(u @ p["mlp.gate_proj.weight"].T) * (u @ p["mlp.up_proj.weight"].T)
            h = h + gated @ p["mlp.down_proj.weight"].T
            if i + 1 in states:
                last = i + 1 == c.num_hidden_layers
                norm = {"shared": "norm", "none": "norm" if last else None, "per_exit": f"exit_norms.{i + 1}"}
                name = norm[c.exit_norm]
                states[i + 1][row, :length] = h if name is None else rms(h, w[f"{name}.weight"], eps)
    return states


@pytest.mark.parametrize("kind", KINDS)
def test_exits_are_those_of_the_equations(kind):
    model = tiny(**KINDS[kind]).double()
    expected = reference_states(model, IDS, MASK)
    out = model(IDS, attention_mask=MASK, output_exit_states=True)
    real = MASK.bool()
    tolerance = 1e-4 if kind == "rope" else 2e-5  # norms and angles are computed in fp32
    assert len(out.exit_hidden_states) == 3
    for state, (layer, wanted) in zip(out.exit_hidden_states, expected.items(), strict=True):
        torch.testing.assert_close(state[real], wanted[real], rtol=tolerance, atol=tolerance)
        for dim in (4, 8, 16, 32):
            cell = model(IDS, attention_mask=MASK, exit_layer=layer, embed_dim=dim).last_hidden_state
            assert torch.equal(cell, state[..., :dim])
    assert torch.equal(out.last_hidden_state, out.exit_hidden_states[-1])


def test_the_head_is_that_of_the_equations_at_every_width():
    model = tiny(M3BertForMaskedLM).double()
    w = {name.removeprefix("head."): t for name, t in model.state_dict().items() if name.startswith("head.")}
    for layer in (2, 4, 6):
        state = model.model(IDS, attention_mask=MASK, exit_layer=layer).last_hidden_state
        for d in (4, 8, 16, 32):
            features = F.silu(state[..., :d] @ w["dense.weight"][:d, :d].T + w["dense.bias"][:d])
            features = rms(features, w["norm.weight"][:d], model.config.rms_norm_eps)
            expected = features @ w["decoder.weight"][:, :d].T + w["decoder.bias"]
            logits = model(IDS, attention_mask=MASK, exit_layer=layer, embed_dim=d).logits
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_parameter_counts_are_the_published_to_the_unit():
    layer, table, head = 9_438_720, 250_002 * 768, 768 * 768 + 768 + 768 + 768 * 250_002 + 250_002
    rest = 512 * 768 + 768 + 768  # positions, norm of the embeddings, final norm
    with torch.device("meta"):
        for faithful in ({"exit_norm": "none"}, {}):
            whole = M3BertForMaskedLM(M3BertConfig(**faithful))
            counts = {name: p.numel() for name, p in whole.named_parameters()}
            assert sum(n for name, n in counts.items() if name.startswith("model.layers.7.")) == layer
            assert counts["model.embed_tokens.weight"] == table == 192_001_536
            assert counts["model.embed_positions.weight"] == 393_216
            assert sum(n for name, n in counts.items() if name.startswith("head.")) == head == 192_842_898
            assert sum(counts.values()) == 498_503_826
            for layers, millions, outside in ((4, 230.2, 37.8), (8, 267.9, 75.5), (12, 305.7, 113.3)):
                # The released script cuts layers off and keeps the final norm; so does exit_norm="shared".
                body = M3BertModel(M3BertConfig(num_hidden_layers=layers, mrl_layers=[layers], **faithful))
                count = sum(p.numel() for p in body.parameters())
                assert count == table + rest + layers * layer
                assert round(count / 1e6, 1) == millions and round(layers * layer / 1e6, 1) == outside
                cut = M3BertConfig(**faithful).truncated(layers)
                final = 768 if faithful and layers < 12 else 0  # an exit that is raw has no norm to keep
                assert sum(p.numel() for p in M3BertModel(cut).parameters()) == count - final
        tied = M3BertForMaskedLM(M3BertConfig(tie_word_embeddings=True))
        assert sum(p.numel() for p in tied.parameters()) == 498_503_826 - table


# --- padding


# flex attention compiles on a CPU, and has no backward there.
@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["ours", "rope"])
@pytest.mark.compatibility("Padding", method="m3bert")
@pytest.mark.compatibility("Attention: eager and SDPA", method="m3bert", only={"implementation": "eager"})
@pytest.mark.compatibility("Attention: eager and SDPA", method="m3bert", only={"implementation": "sdpa"})
@pytest.mark.compatibility(
    "Attention: FlexAttention",
    method="m3bert",
    only={"implementation": "flex_attention"},
    note="on a CPU forward only",
)
def test_padding_on_either_side_changes_nothing_on_any_backend(kind, implementation):
    model = tiny(M3BertForSentenceEmbedding, **KINDS[kind])
    model.set_attn_implementation(implementation)
    lengths = MASK.sum(1).tolist()
    alone = torch.cat([model(row[None, :n]).embeddings for row, n in zip(IDS, lengths, strict=True)])
    more = F.pad(IDS, (0, 6), value=1)
    left = torch.stack([row.roll(9 - n) for row, n in zip(IDS, lengths, strict=True)])
    for ids in (IDS, more, left, F.pad(left, (5, 0), value=1)):
        padded = model(ids, attention_mask=(ids != 1).long()).embeddings
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)
    eager = tiny(M3BertForSentenceEmbedding, **KINDS[kind])
    torch.testing.assert_close(eager(IDS, attention_mask=MASK).embeddings, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_rows_of_nothing_but_padding_give_defined_results_and_gradients(implementation, dtype):
    mask = MASK.clone()
    mask[1] = 0
    for model_class in HEADS:
        model = tiny(model_class).to(dtype)
        model.set_attn_implementation(implementation)
        output = model(IDS, attention_mask=mask)[0]
        assert output.isfinite().all()
        output.float().pow(2).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        if model_class is M3BertModel:  # as if that row had no padding
            unmasked = model(IDS[1:2], attention_mask=torch.ones_like(IDS[1:2]))[0]
            close = {"rtol": 3e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
            torch.testing.assert_close(output[1:2], unmasked, **close)
        alone = model(IDS[:1], attention_mask=mask[:1])[0]
        torch.testing.assert_close(output[:1], alone, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=3e-2)
    for pooling in ("mean", "cls"):
        model = tiny(M3BertForSentenceEmbedding, pooling=pooling).to(dtype)
        out = model(IDS, attention_mask=mask, output_exit_embeddings=True)
        for vectors in (out.embeddings, *out.exit_embeddings):
            assert (vectors[1] == 0).all() and (vectors[[0, 2]] != 0).any()


def test_what_stands_in_the_padding_does_not_matter():
    model = tiny(M3BertForSentenceEmbedding)
    embeds = model.model.embed_tokens(IDS).detach()
    expected = model(inputs_embeds=embeds, attention_mask=MASK).embeddings
    embeds[MASK == 0] = 1e4
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=MASK).embeddings, expected)
    assert torch.equal(model(IDS, attention_mask=MASK).embeddings, expected)


# --- sentence embeddings


def test_embeddings_are_pooled_then_cut_then_brought_to_length_one():
    for pooling in ("mean", "cls"):
        model = tiny(M3BertForSentenceEmbedding, pooling=pooling)
        states = model.model(IDS, attention_mask=MASK, output_exit_states=True).exit_hidden_states
        out = model(IDS, attention_mask=MASK, output_exit_embeddings=True)
        for state, pooled, layer in zip(states, out.exit_embeddings, (2, 4, 6), strict=True):
            seen = MASK.bool()
            expected = torch.stack(
                [s[m].mean(0) if pooling == "mean" else s[0] for s, m in zip(state, seen, strict=True)]
            )
            torch.testing.assert_close(pooled, expected)
            for dim in (4, 8, 16, 32):
                cell = model(IDS, attention_mask=MASK, exit_layer=layer, embed_dim=dim).embeddings
                torch.testing.assert_close(cell, F.normalize(pooled[:, :dim], dim=-1))
        raw = tiny(M3BertForSentenceEmbedding, pooling=pooling, normalize_embeddings=False)
        assert torch.equal(raw(IDS, attention_mask=MASK).embeddings, out.exit_embeddings[-1])


def test_the_first_token_is_the_first_that_is_not_padding():
    model = tiny(M3BertForSentenceEmbedding, pooling="cls")
    left = torch.tensor([[1, 1, 0, 5, 9, 2]])
    torch.testing.assert_close(
        model(left, attention_mask=(left != 1).long()).embeddings, model(left[:, 2:]).embeddings
    )


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exit_layer": 3}, r"layer 3 is none of the trained mrl_layers=\[2, 4, 6\].*Choose one"),
        ({"exit_layer": 0}, "layer 0 is none"),
        ({"embed_dim": 5}, r"dim 5 is none of the trained mrl_dims=\[4, 8, 16, 32\].*Choose one"),
        ({"embed_dim": 0}, "dim 0 is none"),
    ],
)
@pytest.mark.parametrize("model_class", HEADS)
def test_an_untrained_cell_is_refused(model_class, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(model_class)(IDS, **arguments)


def test_more_tokens_than_positions_are_refused():
    ids = torch.full((1, 25), 5)
    with pytest.raises(ValueError, match="25 tokens are more than max_position_embeddings=24.*truncation=True"):
        tiny()(ids)
    assert tiny(position_embedding_type="rope")(ids)[0].shape == (1, 25, 32)
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        tiny()(IDS, inputs_embeds=torch.zeros(3, 9, 32))


# --- what transformers' users rely on


def test_an_exit_computes_nothing_beyond_it():
    model, ran = tiny(attn_implementation="eager"), []
    for number, layer in enumerate(model.layers, 1):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    out = model(IDS, exit_layer=4, output_exit_states=True, output_hidden_states=True, output_attentions=True)
    assert ran == [1, 2, 3, 4] and len(out.exit_hidden_states) == 2
    assert len(out.hidden_states) == 5 and torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert len(out.attentions) == 4
    assert model(IDS).exit_hidden_states is None


def test_hidden_states_are_raw_and_exits_their_norm():
    model = tiny()
    out = model(IDS, output_hidden_states=True, output_exit_states=True)
    assert len(out.hidden_states) == 7
    assert torch.equal(model.norm(out.hidden_states[2]), out.exit_hidden_states[0])
    faithful = tiny(exit_norm="none")(IDS, output_hidden_states=True, output_exit_states=True)
    assert torch.equal(faithful.hidden_states[4], faithful.exit_hidden_states[1])


def test_there_is_no_causality_and_no_cache():
    model = tiny()
    other = IDS.clone()
    other[0, -1] = 50
    first, second = model(IDS, attention_mask=MASK), model(other, attention_mask=MASK)
    assert not torch.allclose(first[0][0, 0], second[0][0, 0])
    assert "past_key_values" not in first and not hasattr(model.config, "use_cache")


def test_attention_is_returned_and_sums_to_one_over_what_is_seen():
    model = tiny(attn_implementation="eager")
    for weights in model(IDS, attention_mask=MASK, output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 9))
        assert (weights.masked_select((MASK == 0)[:, None, None]) < 1e-6).all()


@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.compatibility("bf16 inference", method="m3bert")
@pytest.mark.compatibility("Gradient checkpointing", method="m3bert")
def test_bf16_and_gradient_checkpointing(model_class):
    model = tiny(model_class)
    exact = model(IDS, attention_mask=MASK)[0]
    half = tiny(model_class).to(torch.bfloat16)(IDS, attention_mask=MASK)[0]
    assert half.dtype == torch.bfloat16 and half.isfinite().all()
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.15 * exact.abs().max().item())
    off = {"attention_dropout": 0.0, "embedding_dropout": 0.0}
    gradients = []
    for checkpointing in (False, True):
        model = tiny(model_class, **off).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, attention_mask=MASK)[0].pow(2).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("field", ["embedding_dropout", "attention_dropout", "hidden_dropout"])
def test_each_dropout_acts_in_training_only(field):
    none = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0}
    model = tiny(**none | {field: 0.5}, attn_implementation="eager")
    calm = tiny(**none)(IDS)[0]
    torch.testing.assert_close(model(IDS)[0], calm, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.train()(IDS)[0], calm, atol=1e-2)


@pytest.mark.parametrize("kind", ["ours", "tied"])
def test_resized_embeddings(kind):
    model = tiny(M3BertForMaskedLM, **KINDS[kind])
    with torch.no_grad():  # a graph that still stands keeps the old shape
        before = model(IDS, attention_mask=MASK).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70 and model.head.decoder.bias.shape == (70,)
    assert (model.head.decoder.weight is model.model.embed_tokens.weight) == (kind == "tied")
    with torch.no_grad():
        assert model(IDS, attention_mask=MASK, exit_layer=2, embed_dim=8).logits.shape == (3, 9, 70)
        torch.testing.assert_close(model(IDS, attention_mask=MASK).logits[..., :61], before)
    model.train()(IDS, labels=IDS).loss.backward()


def test_tied_tables_are_one_parameter_and_saved_once(tmp_path):
    model = tiny(M3BertForMaskedLM, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    loaded = M3BertForMaskedLM.from_pretrained(tmp_path)
    assert loaded.head.decoder.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)


def test_classifiers_learn_what_their_labels_say():
    for model_class, labels in (
        (M3BertForSequenceClassification, torch.tensor([0, 1, 2])),
        (M3BertForTokenClassification, IDS % 3),
    ):
        model = tiny(model_class)
        out = model(IDS, attention_mask=MASK, labels=labels)
        expected = F.cross_entropy(out.logits.reshape(-1, 3), labels.reshape(-1))
        torch.testing.assert_close(out.loss, expected)
        narrow = model(IDS, attention_mask=MASK, exit_layer=2, embed_dim=8)
        assert narrow.logits.shape == out.logits.shape and not torch.allclose(narrow.logits, out.logits)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "norms" not in n)


@pytest.mark.slow
@pytest.mark.parametrize("model_class", HEADS)
@pytest.mark.compatibility("torch.compile without graph breaks", method="m3bert", library="torch")
def test_the_forward_compiles_without_a_break(model_class):
    model = tiny(model_class)
    compiled = torch.compile(model, fullgraph=True)
    for arguments in ({}, {"exit_layer": 4, "embed_dim": 8}):
        torch.testing.assert_close(
            compiled(IDS, attention_mask=MASK, **arguments)[0], model(IDS, attention_mask=MASK, **arguments)[0]
        )


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 3), st.booleans())
def test_a_text_is_the_same_in_every_batch(lengths, extra, on_the_left):
    model = MODEL
    torch.manual_seed(sum(lengths))
    texts = [torch.randint(3, 61, (length,)) for length in lengths]
    width = max(lengths) + extra
    pad = [(width - len(t), 0) if on_the_left else (0, width - len(t)) for t in texts]
    ids = torch.stack([F.pad(text, sides, value=1) for text, sides in zip(texts, pad, strict=True)])
    with torch.no_grad():
        together = model(ids, attention_mask=(ids != 1).long(), exit_layer=4, embed_dim=8).embeddings
        alone = torch.cat([model(text[None], exit_layer=4, embed_dim=8).embeddings for text in texts])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


MODEL = tiny(M3BertForSentenceEmbedding)
