import json

import pytest
import torch

from hf_models.moe import MoneForCausalLM, SigmaMoeConfig, SigmaMoeForCausalLM
from trainers.data import train_tokenizer
from trainers.recipes.arguments import DataArguments, parse_arguments
from trainers.recipes.prune_neurons import PRESETS, PruneArguments, prune, table


def test_the_curve_of_a_saved_model_begins_at_its_own_loss(tmp_path):
    corpus, model_folder = tmp_path / "corpus", tmp_path / "model"
    corpus.mkdir()
    texts = [f"def f{number}(x):\n    return x + {number}\n\n" * 8 for number in range(40)]
    for number, text in enumerate(texts):
        (corpus / f"{number}.py").write_text(text)
    tokenizer = train_tokenizer(iter(texts), vocab_size=280, model_max_length=32, show_progress=False)
    torch.manual_seed(0)
    config = SigmaMoeConfig(
        vocab_size=320,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        moe_intermediate_size=16,
        num_experts=4,
        initializer_range=0.5,
    )
    model = SigmaMoeForCausalLM(config)
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    argv = ["--model", str(model_folder), "--dataset_name", str(corpus), "--sequence_length", "32"]
    argv += ["--held_out_fraction", "0.2", "--max_eval_blocks", "4", "--pruned_shares", "0", "0.5"]
    argv += ["--output_dir", str(tmp_path / "out")]
    _, (args, data_args) = parse_arguments((PruneArguments, DataArguments), PRESETS, argv, default_preset="default")
    whole, half = prune(args, data_args)
    assert (whole.ratio, half.ratio, half.active_expert_share) == (1.0, 0.5, pytest.approx(2 / 3))
    assert whole.loss.nats_per_token != half.loss.nats_per_token
    written = json.loads((tmp_path / "out" / "curve.json").read_text())
    assert [point["loss"]["nats_per_token"] for point in written["points"]] == [
        whole.loss.nats_per_token,
        half.loss.nats_per_token,
    ]
    assert (tmp_path / "out" / "curve.png").stat().st_size > 1000
    assert f"| 50% | 67% | {half.loss.nats_per_token:.4f} |" in table([whole, half])
    assert MoneForCausalLM.from_moe(model_folder, neuron_ratio=1.0).num_parameters() == model.num_parameters()
