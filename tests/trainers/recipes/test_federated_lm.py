"""The recipe of LoRA over speakers who sleep: who is whom, what travels, and a shrunken run."""

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.trainers.recipes.tiny_federation_data import made_speeches
from trainers.recipes import federated_lm as recipe
from trainers.recipes.arguments import RecipeTrainingArguments, parse_arguments
from trainers.recipes.federated_cells import Cell, Experiment
from trainers.report import read_results


SMALL = [
    *("--clients", "4", "--vocab_size", "300", "--sequence_length", "16", "--hidden_size", "16"),
    *("--num_hidden_layers", "1", "--num_attention_heads", "2", "--base_steps", "4", "--rounds", "6"),
    *("--rounds_per_day", "6", "--evaluate_every", "3", "--local_steps", "2", "--clients_per_round", "2"),
]


@pytest.fixture(autouse=True)
def speeches(monkeypatch):
    monkeypatch.setattr(recipe, "read_shakespeare_characters", made_speeches)


def parsed(preset, folder, *options):
    types = (recipe.FederatedLmArguments, RecipeTrainingArguments)
    argv = ["--preset", preset, "--output_dir", str(folder), *options]
    return parse_arguments(types, recipe.PRESETS, argv, default_preset="demo")[1]


def test_clients_and_those_who_made_the_base_model_are_different_people(tmp_path, monkeypatch):
    args, _ = parsed("demo", tmp_path, *SMALL)
    found = recipe.read_speeches(args, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert set(found.parts["train"].speakers) == {0, 2, 4, 6} and set(found.base.speakers) == {1, 3, 5, 7}
    for part in (*found.parts.values(), found.base):
        for speaker in np.unique(part.speakers):
            text = tokenizer.decode(part.input_ids[torch.from_numpy(part.speakers == speaker)].flatten())
            assert {f"word{other}" in text for other in range(8) if other != speaker} == {False}
    assert found.fingerprint == recipe.read_speeches(args, tmp_path).fingerprint
    args.clients = 5
    monkeypatch.setattr(recipe, "read_shakespeare_characters", lambda **options: made_speeches(max_users=8))
    with pytest.raises(ValueError, match="8 parts are as large, 10 are needed"):
        recipe.read_speeches(args, tmp_path)


def test_bits_per_character_weigh_speakers_alike():
    class Uniform(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids):
            # the first speaker's blocks are of token 0, which has half of the probability; the other's of token 1
            scores = torch.tensor([0.5, 0.25, 0.25]).log().expand(*input_ids.shape, 3)
            return type("Output", (), {"logits": scores})

    part = recipe.Blocks(torch.tensor([[0] * 4] * 3 + [[1] * 4]), np.array([0, 0, 0, 1]))
    assert recipe.bits_per_character(Uniform(), part, 2.0) == pytest.approx((1 + 2) / 2 / 2)


def test_adapters_alone_travel_and_a_third_is_awake(tmp_path):
    args, base = parsed("demo", tmp_path, *SMALL, "--seeds", "0")
    names = [f for f in recipe.LmSetting.__dataclass_fields__ if f != "batch_size"]
    setting = recipe.LmSetting(batch_size=4, **{name: getattr(args, name) for name in names})
    found = recipe.read_speeches(args, tmp_path)
    folder = recipe.base_model(setting, found, 0, base, tmp_path / "base")
    assert recipe.base_model(setting, found, 0, base, tmp_path / "base") == folder
    cell = Cell(Experiment("speakers", setting, ["fed_avg"]), "fed_avg", 0, 0.3)
    fed = recipe.federation(cell, found, folder, base)
    assert all("lora" in name for name in fed.local.parameters)
    there = [len(fed.availability.available(round)) for round in range(6)]
    assert sum(there) == 6 * 4 / 3
    with pytest.raises(ValueError, match="trained with other settings"):
        recipe.base_model(setting, found, 1, base, tmp_path / "base")


def test_a_shrunken_demo_and_its_repetition(tmp_path, monkeypatch):
    command = ["--preset", "demo", "--output_dir", str(tmp_path), *SMALL]
    recipe.main(command)
    results = read_results(tmp_path)
    bits = results.metrics["bits_per_character"]
    assert set(bits.baseline) == {"fed_avg", "base"} and bits.value > 0
    whole = results.model.parameters_total
    assert results.metrics["bytes"].value < 6 * 2 * 2 * 4 * whole / 4
    assert (tmp_path / results.figures[0].path).exists()
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    assert any("lora_B" in name and float(p.detach().abs().sum()) > 0 for name, p in model.named_parameters())
    monkeypatch.setattr(recipe, "run_cell", lambda *args, **options: pytest.fail("it was run again"))
    recipe.main(command)
    assert read_results(tmp_path).metrics["bits_per_character"].values == bits.values
