import shlex

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from trainers.redaction import command_line


OPTIONS = ["--hub_token", "--token", "--api-key", "--hubToken", "--wandb_secret", "--my_password", "--key", "-token"]
TEMPLATES = [
    ["{name}", "{secret}"],
    ["{name}", "{secret}", "{secret}"],
    ["{name}={secret}"],
    ["{name}=a{secret}=b"],
    ['{{"a": 1, "{bare}": "{secret}", "b": 2}}'],
    ["--config={{'{bare}': ['{secret}']}}"],
    ["{{{bare}: {secret}}}"],
    ["env", "{bare}={secret}"],
    ["--set", "train.{bare}={secret}"],
    ["--endpoint", "https://user:{secret}@example.org/a"],
]
SECRETS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="@"), min_size=10, max_size=40)


@settings(max_examples=300)
@given(st.sampled_from(TEMPLATES), st.sampled_from(OPTIONS), SECRETS, st.sampled_from([[], ["--seed", "0"], ["run"]]))
@example(["{name}", "{secret}"], "--hub_token", "hf_" + "a" * 34, [])
def test_no_named_secret_survives(template, option, secret, rest):
    assume(not secret.startswith("-") and not ("/" in secret and "--endpoint" in template))
    values = {"name": option, "bare": option.strip("-"), "secret": secret}
    argv = ["python", "-m", "x", *(word.format(**values) for word in template), *rest]
    line = command_line(argv)
    assert secret not in line and secret not in line.replace("'\"'\"'", "'")


@settings(max_examples=100)
@given(
    st.text(alphabet="abcXYZ019", min_size=16, max_size=40), st.sampled_from(["hf_", "api_org_", "ghp_"]), st.text()
)
def test_no_token_shape_survives(body, prefix, around):
    assume(body not in around)
    assert body not in command_line(["x", around + " " + prefix + body])


def test_what_is_not_secret_stays():
    words = "python -m x --tokenizer_name gpt2 --max_tokens 1024 --num_key_value_heads 4 --tokens=1e6 --pad_token_id 0"
    assert command_line(words.split()) == words
    assert command_line(["x", "--push_to_hub", "--hub_token", "--seed", "3"]) == "x --push_to_hub --hub_token --seed 3"
    assert "hf_models" in command_line(["python", "-m", "hf_models.moe"])
    assert command_line(["x", "https://example.org/a/b"]) == "x https://example.org/a/b"


@pytest.mark.parametrize(
    "word, shown",
    [
        ("{here}/runs/demo", "runs/demo"),
        ("/elsewhere/data/corpus.txt", "corpus.txt"),
        ("--output_dir={here}/runs/demo", "--output_dir=runs/demo"),
        ("--data=/elsewhere/my files/x.txt", "--data=x.txt"),
        ("-I/elsewhere/include", "-Iinclude"),
        ("{here}/../other/x", "x"),
        ("/a/b:/c/d", "d"),
        ("PYTHONPATH=/a/b:{here}/c", "PYTHONPATH=c"),
        ('{{"data": "/elsewhere/x", "out": "{here}/y"}}', '{"data": "x", "out": "y"}'),
        ("file:///elsewhere/x", "x"),
        ("//elsewhere/x", "x"),
        ("C:\\Users\\me\\x.txt", "x.txt"),
        ("runs/demo", "runs/demo"),
        ("../demo", "../demo"),
    ],
)
def test_paths_are_shortened(word, shown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = command_line(["x", word.format(here=tmp_path)])
    assert line == shlex.join(["x", shown])
    assert str(tmp_path) not in line


def test_command_of_this_process():
    assert command_line().startswith("python ")
