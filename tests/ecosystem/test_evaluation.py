"""lm-eval's `hf` model on local tasks: its numbers are those of a plain forward."""

import json
import math
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.ecosystem.families import CAUSAL_LMS, TEXT_WRITERS


QUESTIONS = [
    {"question": f"def add_{n}(x):\n    return x +", "choices": [f" {n}", f" {n + 1}", " y", " x"], "answer": n % 4}
    for n in range(8)
]
TEXTS = [f"def add_{n}(x):\n    return x + {n}\n" * (n % 3 + 1) for n in range(5)]
TASKS = {
    "choices.yaml": """\
task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/choices.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "texts.yaml": """\
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
""",
}


@pytest.fixture
def lm_eval():
    return pytest.importorskip("lm_eval", reason="needs lm-eval, which is not installed")


@pytest.fixture
def tasks(tmp_path):
    """Folder with two tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("choices", QUESTIONS), ("texts", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / name).write_text(text.format(folder=folder))
    return folder


def log_likelihood(model, context, continuation):
    with torch.no_grad():
        scores = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1].log_softmax(-1)
    return scores.gather(-1, torch.tensor(continuation)[:, None]).sum().item()


def expected_results(model, tokenizer):
    """Log-likelihood of every choice, accuracy, and bits per byte, one forward for each."""
    encode = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    choices = []
    for row in QUESTIONS:
        question = encode(row["question"])
        whole = [encode(row["question"] + choice) for choice in row["choices"]]
        choices.append([log_likelihood(model, question, ids[len(question) :]) for ids in whole])
    hits = [max(range(4), key=lambda i, row=row: row[i]) == q["answer"] for row, q in zip(choices, QUESTIONS)]
    nats = sum(log_likelihood(model, [tokenizer.eos_token_id], encode(text)) for text in TEXTS)
    bits = -nats / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    return choices, sum(hits) / len(hits), bits


@pytest.mark.parametrize(
    "family",
    [*CAUSAL_LMS, *(pytest.param(family, marks=pytest.mark.slow) for family in TEXT_WRITERS)],
    ids=lambda family: family.method,
)
@pytest.mark.compatibility("lm-eval's `hf` model", library="lm-eval")
def test_likelihoods_are_those_of_a_plain_forward(lm_eval, tasks, family, text_fields, tokenizer):
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = family.model(**text_fields)
    answer = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=64),
        tasks=["choices", "texts"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    choices, accuracy, bits = expected_results(model, tokenizer)
    for sample, scores in zip(answer["samples"]["choices"], choices, strict=True):
        assert [score for score, _ in sample["filtered_resps"]] == pytest.approx(scores, rel=1e-4)
    assert answer["results"]["choices"]["acc,none"] == accuracy
    assert answer["results"]["texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)


@pytest.mark.slow
@pytest.mark.compatibility("lm-eval's command on a saved folder, by the code that it brings", library="lm-eval")
def test_the_command_evaluates_a_folder_by_the_code_that_it_brings(lm_eval, tasks, saved, tokenizer, tmp_path):
    arguments = [
        *("--model", "hf", "--model_args", f"pretrained={saved},trust_remote_code=True,dtype=float32,max_length=64"),
        *("--tasks", "choices,texts", "--include_path", str(tasks), "--output_path", str(tmp_path / "out.json")),
        *("--device", "cpu", "--batch_size", "4"),
    ]
    command = [sys.executable, "-m", "lm_eval", "run", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("out*.json")
    results = json.loads(file.read_text())["results"]
    _, accuracy, bits = expected_results(AutoModelForCausalLM.from_pretrained(saved), tokenizer)
    assert results["choices"]["acc,none"] == accuracy
    assert results["texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
