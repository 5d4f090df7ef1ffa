"""Adapters, and what a user has afterwards: AutoModel loads it, the Hub has it, and nothing else left."""

import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.hub.client import run_client
from tests.hub.server import LoopbackHub
from tests.model_cards.tiny_run import TOKEN
from tests.trainers.federated.tiny_federation import assert_same, federation
from trainers.federated import MMPSGD, BlockSchedule, FedAvg, FedSubAvg


def language_model(**options):
    config = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        **({"tie_word_embeddings": False} | options),
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def texts(clients=4):
    """Each client has words of its own."""
    rows = []
    for client in range(clients):
        for start in range(5):
            ids = [1, *(2 + client * 8 + (start + step) % 8 for step in range(7))]
            rows.append({"user": f"u{client}", "input_ids": ids, "labels": ids})
    return Dataset.from_list(rows)


def test_only_the_adapter_travels(tmp_path):
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(language_model(), lora)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    fed = federation(tmp_path / "run", model, texts(), FedAvg(), rounds=3, args={"learning_rate": 0.5})
    fed.train()
    assert fed.strategy.parameters and all("lora_" in name for name in fed.strategy.parameters)
    assert_same(frozen, {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad})
    assert any(tensor.any() for name, tensor in fed.strategy.parameters.items() if "lora_B" in name)
    fed.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(language_model(), tmp_path / "adapter")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model.eval()(ids).logits)


def test_rows_of_the_input_embeddings_travel_and_automodel_loads_what_is_served(tmp_path):
    fed = federation(tmp_path / "run", language_model(), texts(), FedSubAvg(), rounds=2)
    fed.train()
    rows = fed.strategy.payload(2, "u1").rows
    assert rows["model.embed_tokens.weight"].tolist() == [1, *range(10, 18)]
    fed.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same(dict(fed.strategy.parameters), {name: p.detach() for name, p in again.named_parameters()})
    assert not (tmp_path / "model" / "training_args.bin").exists()


def test_tied_embeddings_have_no_rows_of_their_own(tmp_path):
    fed = federation(tmp_path, language_model(tie_word_embeddings=True), texts(), FedSubAvg(), rounds=1)
    with pytest.raises(ValueError, match="tied ones get dense gradients.*tie_word_embeddings=False"):
        fed.train()


def test_the_predictor_of_each_block_is_saved_beside(tmp_path):
    dataset = texts()
    blocks = [row % 2 for row in range(len(dataset))]
    strategy = MMPSGD(BlockSchedule.by_rounds([1, 1]))
    fed = federation(tmp_path / "run", language_model(), dataset, strategy, rounds=4, block_by=blocks)
    fed.train()
    fed.save_pretrained(tmp_path / "model")
    for folder, block in (("model", None), ("model/block_0", 0), ("model/block_1", 1)):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert_same(strategy.predictor(block), {name: p.detach() for name, p in loaded.named_parameters()})


PUSH = """
import sys
from tests.trainers.federated.test_published import language_model, texts
from tests.trainers.federated.tiny_federation import federation
from trainers.federated import FedLaAvg
args = {"hub_model_id": "alice/federated", "hub_token": sys.argv[2], "save_strategy": "steps"}
fed = federation(sys.argv[1], language_model(), texts(), FedLaAvg(learning_rate=0.1), rounds=2, args=args)
fed.train()
fed.save_model()  # training_args.bin, with the token, in output_dir
fed.push_to_hub()
"""
LOAD = """
from transformers import AutoModelForCausalLM
print("\\n" + str(AutoModelForCausalLM.from_pretrained("alice/federated").num_parameters()))
"""


@pytest.mark.slow
def test_the_hub_gets_the_model_and_nothing_about_clients(tmp_path, request):
    root = request.config.rootpath
    with LoopbackHub({TOKEN: "alice"}) as hub:
        settings = {"PYTHONPATH": str(root)}
        arguments = [tmp_path / "run", TOKEN]
        run_client(PUSH, hub, home=tmp_path, token=TOKEN, cwd=root, env=settings, arguments=arguments, timeout=300)
        files = hub.files("alice/federated")
        loaded = run_client(LOAD, hub, home=tmp_path / "reader", token=None, cwd=tmp_path, timeout=300)
    assert int(loaded.stdout.splitlines()[-1]) == language_model().num_parameters()
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors", ".gitattributes"}
    assert files.keys() <= expected and files.keys() >= expected - {".gitattributes", "generation_config.json"}
    here = {path.name for path in (tmp_path / "run").iterdir()}
    assert here >= {"training_args.bin", "rounds", "clients", "federated_log.jsonl"}
    for content in files.values():
        assert TOKEN.encode() not in content
    card = files["README.md"].decode()
    assert "4 clients by `FedLaAvg` in 2 rounds" in card and "u1" not in card
    assert json.loads(files["config.json"])["model_type"] == "llama"
