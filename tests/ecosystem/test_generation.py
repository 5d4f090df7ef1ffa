"""Text generation: the pipeline, every cache, beams, samples and assisted decoding."""

import itertools

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    cache_utils,
    pipeline,
)
from transformers.generation.configuration_utils import (
    ALL_CACHE_IMPLEMENTATIONS,
    ALL_STATIC_CACHE_IMPLEMENTATIONS,
    DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS,
)
from transformers.utils import is_hqq_available, is_optimum_quanto_available


PROMPTS = ["def add_3(x):", "def", "    return x + 1\n\n\ndef add_"]
NEW = 12


def compatible(feature, note=""):
    return pytest.mark.compatibility(feature, library="transformers", note=note)


def greedy(model, ids, **options):
    """What a forward over the whole text, again and again, finds most likely."""
    return model.generate(ids, do_sample=False, use_cache=False, **{"max_new_tokens": NEW} | options)


def log_probs(model, sequences, prompt_length):
    """Log-probability of each token after the prompt `(rows, new)`."""
    with torch.no_grad():
        scores = model(sequences).logits[:, prompt_length - 1 : -1].log_softmax(-1)
    return scores.gather(-1, sequences[:, prompt_length:, None])[..., 0]


def ragged_prompts(rows=(9, 6), vocabulary=40):
    """Prompts of different lengths, padded on the left, and their mask."""
    length = max(rows)
    ids = torch.randint(2, vocabulary, (len(rows), length), generator=torch.Generator().manual_seed(0))
    mask = torch.stack([torch.arange(length) >= length - real for real in rows]).long()
    return ids * mask, mask


# --- one forward -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@compatible("Attention: eager and SDPA")
def test_attention_backends_agree(family):
    model, (ids, mask) = family.model(**family.sliding_window or {}), ragged_prompts()
    found = []
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@compatible("Padding")
def test_padding_on_either_side_changes_no_token(family):
    model, (ids, mask) = family.model(), ragged_prompts()
    alone = model(ids[1:, mask[1].bool()]).logits[0]
    left = model(ids, attention_mask=mask).logits[1, mask[1].bool()]
    right = model(ids.roll(-3, 1), attention_mask=mask.flip(-1)).logits[1, : len(alone)]
    torch.testing.assert_close(left, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(right, alone, rtol=1e-4, atol=1e-4)


# --- the pipeline ----------------------------------------------------------------------------------------------------


@compatible('pipeline("text-generation")')
def test_the_pipeline_writes_what_the_model_decodes_greedily(saved, family, tokenizer, text_fields):
    pipe = pipeline("text-generation", model=str(saved), device="cpu")
    model = family.model(**text_fields)
    assert type(pipe.model) is type(model)
    batched = pipe(PROMPTS, batch_size=len(PROMPTS), do_sample=False, max_new_tokens=NEW)
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 1, "nothing would be padded"
    for prompt, [answer] in zip(PROMPTS, batched, strict=True):
        ids = greedy(model, tokenizer(prompt, return_tensors="pt")["input_ids"])
        assert answer["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True) != prompt


@compatible('pipeline("text-generation") with chat messages')
def test_the_pipeline_answers_messages_through_the_chat_template(saved, family, tokenizer, text_fields):
    messages = [{"role": "user", "content": "add 3"}]
    pipe = pipeline("text-generation", model=str(saved), device="cpu")
    [answer] = pipe(messages, do_sample=False, max_new_tokens=NEW)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    reply = greedy(family.model(**text_fields), prompt)[0, prompt.shape[1] :]
    content = tokenizer.decode(reply, skip_special_tokens=True)
    assert answer["generated_text"] == [*messages, {"role": "assistant", "content": content}] and content


# --- caches ----------------------------------------------------------------------------------------------------------


def row_of_cache(kind):
    if kind in DEPRECATED_STATIC_CACHE_IMPLEMENTATIONS:
        return f"Cache: {'offloaded_' if 'offloaded' in kind else ''}static under its deprecated names"
    return f"Cache: {kind}"


# All that this transformers offers, so that a new one is a new row and not forgotten.
EXACT_CACHES = [
    pytest.param(kind, marks=compatible(row_of_cache(kind)))
    for kind in ALL_CACHE_IMPLEMENTATIONS
    if kind != "quantized"
]


@pytest.mark.parametrize("kind", EXACT_CACHES)
def test_a_cache_changes_no_token(family, kind):
    device = "cpu"
    if "offloaded" in kind:
        if not torch.accelerator.is_available():
            pytest.skip("needs an accelerator to offload from")
        device = torch.accelerator.current_accelerator()
    for window in ({}, family.sliding_window):
        if window is None:
            continue
        model = family.model(**window).to(device)
        ids, mask = (tensor.to(device) for tensor in ragged_prompts())
        out = model.generate(
            ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=NEW,
            cache_implementation=kind,
            disable_compile=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(out.sequences, greedy(model, ids, attention_mask=mask))
        assert torch.equal(out.sequences[1:, 3:], greedy(model, ids[1:, 3:]))  # as if it had not been padded
        cache = out.past_key_values
        static = kind in ALL_STATIC_CACHE_IMPLEMENTATIONS and kind != "hybrid"  # which generate() takes for no choice
        assert type(cache) is (StaticCache if static else DynamicCache)
        assert cache.offloading == ("offloaded" in kind) and len(cache.layers) == model.config.num_hidden_layers
        assert all(layer.is_sliding == bool(window) for layer in cache.layers)


@pytest.mark.parametrize(
    ("backend", "available"),
    [
        pytest.param("fp8", hasattr(cache_utils, "Fp8QuantizedLayer"), marks=compatible("Cache: quantized, fp8")),
        pytest.param(
            "quanto",
            is_optimum_quanto_available(),
            marks=[compatible("Cache: quantized, quanto"), pytest.mark.slow],  # it builds C++ when first used
        ),
        pytest.param("hqq", is_hqq_available(), marks=compatible("Cache: quantized, hqq")),
    ],
)
def test_a_quantized_cache_changes_little(family, backend, available):
    if not available:
        pytest.skip("needs a newer transformers" if backend == "fp8" else f"needs {backend}, which is not installed")
    model, (ids, _) = family.model(), ragged_prompts(rows=(9,) * 8)
    config = {"backend": backend} | ({} if backend == "fp8" else {"q_group_size": 8})
    options = {"cache_implementation": "quantized", "cache_config": config, "do_sample": False}
    out = model.generate(ids, max_new_tokens=NEW, return_dict_in_generate=True, **options)
    assert type(out.past_key_values) is QuantizedCache

    def regret(sequences):
        """How much less likely a token is than the likeliest, on average."""
        with torch.no_grad():
            best = model(sequences).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1).amax(-1)
        return (best - log_probs(model, sequences, ids.shape[1])).mean()

    noise = torch.cat((ids, torch.randint(2, 40, (len(ids), NEW))), dim=1)
    assert regret(out.sequences) < 0.1 < 1 < regret(noise)


@compatible("Continuous batching (paged cache)")
def test_continuous_batching_changes_no_token(family):
    model = family.model()
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
    options = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1)  # -1: never stop early
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # by default half of the machine's memory
    answers = model.generate_batch(prompts, generation_config=options, continuous_batching_config=small)
    written = {tuple(answer.prompt_ids): answer.generated_tokens for answer in answers.values()}
    for prompt in prompts:
        assert written[tuple(prompt)] == greedy(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()


# --- beams and samples -----------------------------------------------------------------------------------------------


@compatible("Beam search")
def test_beams_as_wide_as_the_tree_find_the_best_of_all_continuations(family):
    vocabulary, new = 8, 3
    model = family.model(vocab_size=vocabulary)
    ids, mask = ragged_prompts(vocabulary=vocabulary)
    options = {"num_beams": vocabulary ** (new - 1), "num_return_sequences": 3, "length_penalty": 0.0}
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    found = out.sequences[:, ids.shape[1] :].reshape(2, 3, new)
    everything = torch.tensor(list(itertools.product(range(vocabulary), repeat=new)))
    for row, scores, prompt, real in zip(found, out.sequences_scores.view(2, 3), ids, mask.sum(-1), strict=True):
        sequences = torch.cat((prompt[-real:].expand(len(everything), -1), everything), dim=1)
        best = log_probs(model, sequences, real).sum(-1).topk(3)
        assert torch.equal(row, everything[best.indices])
        torch.testing.assert_close(scores, best.values, rtol=1e-4, atol=1e-4)


@compatible("Beam search")
def test_the_score_of_a_beam_is_its_mean_log_probability(family):
    model, (ids, _) = family.model(), ragged_prompts(rows=(9, 9))
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": NEW, "do_sample": False}
    out = model.generate(ids, return_dict_in_generate=True, output_scores=True, **options)
    recomputed = log_probs(model, out.sequences, ids.shape[1]).mean(-1)
    torch.testing.assert_close(out.sequences_scores, recomputed, rtol=1e-4, atol=1e-4)
    best = recomputed.view(2, 4)[:, 0]
    assert torch.equal(best, recomputed.view(2, 4).amax(-1))
    assert (best > log_probs(model, greedy(model, ids), ids.shape[1]).mean(-1)).any()


@compatible("Sampling")
def test_samples_follow_the_distribution_of_the_model(family):
    model, number = family.model(vocab_size=12), 4000
    prompt = torch.tensor([[3, 7, 5]])
    with torch.no_grad():
        logits = model(prompt).logits[0, -1].double()

    def sample(**options):
        fixed = {"do_sample": True, "top_k": 0, "max_new_tokens": 1, "num_return_sequences": number}
        return model.generate(prompt, **fixed | options)[:, -1]

    counts = sample(temperature=0.7).bincount(minlength=12).double()
    assert chisquare(counts, number * (logits / 0.7).softmax(-1)).pvalue > 1e-3
    assert chisquare(counts, number * logits.softmax(-1)).pvalue < 1e-6, "it could not tell the temperatures apart"

    ordered, tokens = logits.softmax(-1).sort(descending=True)
    nucleus = tokens[: int((ordered.cumsum(-1) < 0.6).sum()) + 1]
    assert set(sample(top_p=0.6).tolist()) == set(nucleus.tolist())


@compatible("Sampling")
def test_the_same_seed_gives_the_same_samples(family):
    model, (ids, mask) = family.model(), ragged_prompts()

    def sample(seed):
        torch.manual_seed(seed)
        return model.generate(ids, attention_mask=mask, do_sample=True, max_new_tokens=NEW, num_return_sequences=2)

    first = sample(0)
    assert torch.equal(first, sample(0)) and not torch.equal(first, sample(1))
    assert not torch.equal(first[0], first[1])


# --- assisted generation ---------------------------------------------------------------------------------------------


def count_forwards(model):
    """A list that grows by one with each forward."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


def as_assistant(model):
    """Always four guesses: an untrained model is never confident."""
    model.generation_config.num_assistant_tokens = 4
    model.generation_config.num_assistant_tokens_schedule = "constant"
    model.generation_config.assistant_confidence_threshold = 0.0
    return model


@compatible("Assisted generation")
def test_an_assistant_changes_no_token(family):
    model, (ids, _) = family.model(), ragged_prompts(rows=(9,))
    expected = greedy(model, ids)
    for seed in range(3):
        assistant = as_assistant(family.model(seed + 1, **family.smaller))
        guesses = count_forwards(assistant)
        out = model.generate(ids, assistant_model=assistant, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(out, expected) and guesses


@compatible("Assisted generation")
def test_a_good_assistant_saves_forwards(family):
    model, (ids, _) = family.model(), ragged_prompts(rows=(9,))
    expected, calls = greedy(model, ids), count_forwards(model)
    out = model.generate(ids, assistant_model=as_assistant(family.model()), do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, expected)
    assert len(calls) <= NEW / 2  # each confirms up to four guesses and adds one


@compatible("Prompt-lookup generation")
def test_prompt_lookup_changes_no_token_and_saves_forwards(family):
    model = family.model()
    once = greedy(model, torch.tensor([[5, 6, 7]]))
    ids = torch.cat((once, once[:, :3]), dim=1)  # what follows the repetition may well be repeated, too
    expected = greedy(model, ids)
    calls = count_forwards(model)
    out = model.generate(ids, prompt_lookup_num_tokens=4, do_sample=False, max_new_tokens=NEW)
    assert torch.equal(out, expected) and len(calls) < NEW
