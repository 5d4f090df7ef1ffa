import pytest
import torch
from transformers import PretrainedConfig

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.data import train_tokenizer
from trainers.evaluation import Completion, complete_functions, parsing_share


PROMPT = 'def add(left, right):\n    """Add."""\n'


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([PROMPT * 5], vocab_size=280, show_progress=False)


class Scripted(torch.nn.Module):
    """A model that has one thing to say; only its words are made up, not what is done with them."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text, ends):
        super().__init__()
        self.config = PretrainedConfig()
        self.words = tokenizer(text).input_ids + [tokenizer.eos_token_id] * ends

    def generate(self, input_ids, max_new_tokens, **kwargs):
        return torch.tensor([input_ids[0].tolist() + self.words[:max_new_tokens]])


def complete(tokenizer, text, *, prompt=PROMPT, ends=False, **kwargs) -> Completion:
    [completion] = complete_functions(Scripted(tokenizer, text, ends), tokenizer, [prompt], **kwargs)
    assert completion.prompt == prompt
    return completion


@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("    return left\n\n\ndef other():\n    pass\n", "    return left\n\n\n"),
        ("    return left\nclass Other:\n", "    return left\n"),
        (
            "    if left:\n        return 1\n\n    return 2\nx = 3\n",
            "    if left:\n        return 1\n\n    return 2\n",
        ),
        ("    return left\n# a comment at the margin\n    return 2\n", "    return left\n"),
        ("\n    return left\n", "\n    return left\n"),
        ("    return left\n", "    return left\n"),
    ],
)
def test_a_function_ends_where_its_indentation_ends(tokenizer, text, kept, ends):
    completion = complete(tokenizer, text, ends=ends)
    assert completion.completion == kept and completion.parses


@pytest.mark.parametrize(
    ("text", "ends", "kept", "parses"),
    [
        ("    total = left\n    return tot", False, "    total = left\n", True),  # the budget ran out in a line
        ("    total = left\n    return tot", True, "    total = left\n    return tot", True),  # the document ended
        ("    return (left", False, "", False),
        ("    return (left", True, "    return (left", False),
        ("    return (left +\n", False, "    return (left +\n", False),
        ("    return )\n", True, "    return )\n", False),
        ("      x = 1\n    return x\n", True, "      x = 1\n    return x\n", False),  # unindent to another level
        ("", True, "", False),
        ("\n\n", True, "\n\n", False),
        ("def other():\n    pass\n", True, "", False),  # nothing of the function itself
        ("    x = '\0'\n", True, "    x = '\0'\n", False),
    ],
)
def test_what_is_kept_and_whether_it_parses(tokenizer, text, ends, kept, parses):
    completion = complete(tokenizer, text, ends=ends)
    assert (completion.completion, completion.parses) == (kept, parses)


def test_the_budget(tokenizer):
    text = "    a = 1\n" * 50
    length = len(tokenizer(text).input_ids)
    assert complete(tokenizer, text, max_new_tokens=length).completion == text
    cut = complete(tokenizer, text, max_new_tokens=length // 2).completion
    assert text.startswith(cut) and len(cut) < len(text) and cut.endswith("\n")


def test_a_prompt_that_stops_inside_a_line(tokenizer):
    prompt = PROMPT + "    return"
    completion = complete(tokenizer, " left\nprint(1)\n", prompt=prompt)
    assert completion.completion == " left\n" and completion.parses


def test_a_method_is_measured_from_its_own_def(tokenizer):
    prompt = '    def add(self):\n        """Add."""\n'
    text = "        return 1\n\n    def other(self):\n        pass\n"
    completion = complete(tokenizer, text, prompt=prompt)
    assert completion.completion == "        return 1\n\n" and completion.parses


def test_a_real_model(tokenizer):
    torch.manual_seed(0)
    model = SigmaMoeForCausalLM(
        SigmaMoeConfig(
            vocab_size=320,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            moe_intermediate_size=8,
            num_experts=2,
            initializer_range=0.5,
        )
    )
    greedy = complete_functions(model, tokenizer, [PROMPT, PROMPT[:20]], max_new_tokens=12)
    assert greedy == complete_functions(model, tokenizer, [PROMPT, PROMPT[:20]], max_new_tokens=12)
    assert [completion.prompt for completion in greedy] == [PROMPT, PROMPT[:20]]
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 2.0}
    sampled = [complete_functions(model, tokenizer, [PROMPT] * 3, seed=seed, **options) for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1]


def test_share():
    completions = [Completion("", "", parses) for parses in (True, False, False, True, True)]
    assert parsing_share(completions) == 0.6
    assert parsing_share(completions[:1]) == 1.0
