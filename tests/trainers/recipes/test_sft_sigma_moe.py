import json

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.data import train_tokenizer
from trainers.recipes.arguments import DataArguments, parse_arguments
from trainers.recipes.sft_sigma_moe import PRESETS, SftArguments, load_for_context, post_train
from trainers.report import read_results


ANSWERS = {f"Say {word}": word * 3 for word in ("red", "blue", "green", "yellow", "black", "white", "pink", "grey")}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([*ANSWERS, *ANSWERS.values()] * 3, vocab_size=290, model_max_length=32)
    torch.manual_seed(0)
    shape = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "max_position_embeddings": 32}
    config = SigmaMoeConfig.from_preset("demo", **shape, **ids, head_dim=16, vocab_size=len(tokenizer), num_experts=4)
    SigmaMoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def conversations(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in ANSWERS.items()
    ]
    rows += [
        {"messages": [{"role": "user", "content": f"{q} twice"}, *r["messages"][1:]]} for q, r in zip(ANSWERS, rows)
    ]
    Dataset.from_list(rows).to_json(tmp_path / "chat.jsonl")
    return str(tmp_path / "chat.jsonl")


def run(base, conversations, output, *argv):
    argv = ["--model_name_or_path", str(base), "--dataset_name", conversations, "--output_dir", str(output), *argv]
    argv += "--report_to none --use_cpu true --logging_steps 5 --held_out_fraction 0.3 --warmup_steps 1".split()
    argv += ["--lr_scheduler_kwargs", json.dumps({"num_decay_steps": 2})]
    types = (SftArguments, DataArguments, TrainingArguments)
    preset, (args, data, training) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    return post_train(preset, args, data, training)


def test_post_training_extends_the_context_and_lowers_the_loss(base, conversations, tmp_path):
    options = "--max_steps 18 --save_steps 9 --sequence_length 64 --rope_theta 50000 --learning_rate 5e-3".split()
    folder = run(base, conversations, tmp_path / "chat", *options)
    loss = read_results(folder).metrics["held_out_assistant_loss"]
    assert loss.value < loss.baseline["before_post_training"].value
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.max_position_embeddings == 64 and model.config.rope_parameters["rope_theta"] == 50000
    expected = 1 / 50000 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in model.generation_config.eos_token_id
    assert (folder / "logs" / "balance.jsonl").exists()

    run(base, conversations, tmp_path / "chat", *options)  # goes on from the last checkpoint: nothing left to train
    again = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_a_longer_context_needs_a_base(base):
    with pytest.raises(ValueError, match=r"sequence_length=64 .*max_position_embeddings=32.*--rope_theta"):
        load_for_context(str(base), 64, None)


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="'gpt2'"):
        load_for_context(str(tmp_path), 16, None)


def test_a_conversation_longer_than_the_context_is_named(base, conversations, tmp_path):
    with pytest.raises(ValueError, match="sequence_length"):
        run(base, conversations, tmp_path / "x", *"--max_steps 1 --sequence_length 4 --on_too_long error".split())
