"""Completions of held-out Python functions, and the share of them that Python's own parser accepts."""

import ast
import textwrap
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed


@dataclass(frozen=True)
class Completion:
    """What a model wrote after `prompt`, cut where the function ends, and whether the whole parses."""

    prompt: str
    completion: str
    parses: bool


@torch.no_grad()
def complete_functions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    max_new_tokens: int = 96,
    seed: int = 0,
    **generate_kwargs,
) -> list[Completion]:
    """Complete each prompt (a signature and docstring), one by one, greedily unless `generate_kwargs` say otherwise.

    A completion ends with the function: at the first non-empty line that is indented no deeper than its `def`, at the
    end of the document, or at the last full line if the budget ran out. A function without any statement of the model
    does not count as parsed.
    """
    model.eval()
    set_seed(seed)
    completions = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        out = model.generate(**inputs, max_new_tokens=max_new_tokens, **generate_kwargs)
        out = out[0, inputs["input_ids"].shape[1] :]
        ended = tokenizer.eos_token_id in out.tolist()
        body = _end_of_function(prompt, tokenizer.decode(out, skip_special_tokens=True), ended)
        completions.append(Completion(prompt, body, _parses_with_a_body(prompt + body)))
    return completions


def parsing_share(completions: list[Completion]) -> float:
    """Share in [0, 1] of the completions that parse. `ValueError` without any."""
    if not completions:
        raise ValueError("completions is empty: there is no share of nothing.")
    return sum(c.parses for c in completions) / len(completions)


def _end_of_function(prompt: str, text: str, ended: bool) -> str:
    outer = _indentation(prompt)
    lines = text.splitlines(keepends=True)
    if lines and not ended and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines):
        continues_prompt = number == 0 and not prompt.endswith("\n")
        if line.strip() and not continues_prompt and _indentation(line) <= outer:
            return "".join(lines[:number])
    return "".join(lines)


def _indentation(line: str) -> int:
    line = line.expandtabs()
    return len(line) - len(line.lstrip(" "))


def _parses_with_a_body(source: str) -> bool:
    try:
        functions = [
            n
            for n in ast.walk(ast.parse(textwrap.dedent(source)))
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return bool(functions) and len(functions[0].body) > (ast.get_docstring(functions[0]) is not None)
