"""torch.compile, where generate() and the Trainer use it; on smaller models, since a kernel costs seconds of C++."""

import shutil

import pytest
import torch
import transformers
from transformers import CompileConfig

from tests.ecosystem.test_generation import greedy, ragged_prompts
from tests.ecosystem.test_training import losses, train


needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler: install g++"
)


@pytest.fixture(autouse=True)
def counters():
    """dynamo's record of this test alone."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    return torch._dynamo.utils.counters


@pytest.mark.slow
@needs_compiler
@pytest.mark.compatibility("torch.compile in generate() with a static cache", library="torch")
def test_compiled_generation_changes_no_token_and_has_one_graph(family, counters):
    model, (ids, mask) = family.model(**family.smaller), ragged_prompts()
    # On a CPU generate() compiles only if it is told so.
    compiled = CompileConfig(fullgraph=True, mode="default")
    compiled._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": compiled, "max_new_tokens": 12, "do_sample": False}
    out = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(out, greedy(model, ids, attention_mask=mask))
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.compatibility("torch.compile in training", library="torch")
def test_a_model_that_never_ran_trains_as_one_graph(family):
    model, (ids, _) = family.model().train(), ragged_prompts()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # without C++: whether it is one graph at all
    torch.testing.assert_close(compiled(ids, labels=ids).loss, model(ids, labels=ids).loss)


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(
    transformers.__version__.startswith("5.18."),
    reason="transformers 5.18 cannot compile its experts' backward on a CPU",
)
@pytest.mark.compatibility("torch.compile in training", library="torch")
def test_compiled_training_has_no_graph_break_and_learns_the_same(family, tmp_path, counters):
    compiled = losses(train(family.model(**family.smaller), tmp_path, torch_compile=True))
    assert counters["stats"]["unique_graphs"] >= 1 and not counters["graph_break"]
    eager = losses(train(family.model(**family.smaller), tmp_path))
    torch.testing.assert_close(torch.tensor(compiled), torch.tensor(eager), rtol=1e-3, atol=0)


@torch.no_grad()  # FlexAttention has no backward on a CPU
@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("padded", [0, 3])
@pytest.mark.compatibility("Attention: FlexAttention", library="transformers", note="on a CPU forward only")
def test_flex_attention_gives_what_sdpa_gives(family, padded):
    model, ids = family.model(**family.smaller, head_dim=16), torch.randint(1, 40, (2, 16))
    mask = torch.ones_like(ids)
    mask[0, :padded] = 0
    found = []
    for backend in ("sdpa", "flex_attention"):
        model.set_attn_implementation(backend)
        found.append(model(ids, attention_mask=mask).logits[mask.bool()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
