"""A run folder as a recipe leaves it, small enough to be made in a second: model, code, tokenizer, results, and what
must never leave it."""

from pathlib import Path

import torch
from transformers import TrainingArguments

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM
from tests.model_cards.test_build import make_run
from trainers.data import train_tokenizer


TOKEN = "hf_fake" + "Ab12" * 8
TEXTS = ["def area(width, height):\n    return width * height\n"] * 2


def write_tiny_run(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", token: str = TOKEN, **fields) -> None:
    """Write the run into `folder`, with `token` and the folder's path wherever a real run has them."""
    make_run(folder)
    tokenizer = train_tokenizer(TEXTS, vocab_size=300, show_progress=False)
    shape = {"vocab_size": 300, "hidden_size": 32, "moe_intermediate_size": 16, "num_experts": 8}
    shape |= {"num_hidden_layers": 3, "num_experts_per_tok_per_layer": [3, 1, 2], "max_position_embeddings": 128}
    torch.manual_seed(seed)
    model = SigmaMoeForCausalLM(SigmaMoeConfig.from_preset("demo", **(shape | {"head_dim": 8} | fields)))
    for router in model.routers:
        torch.nn.init.normal_(router.e_score_correction_bias)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)

    arguments = TrainingArguments(str(folder), hub_token=token, report_to="none", use_cpu=True)
    torch.save(arguments, folder / "training_args.bin")
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    torch.save({"state": {}, "note": token}, checkpoint / "optimizer.pt")
    (checkpoint / "trainer_state.json").write_text(f'{{"best_model_checkpoint": "{checkpoint}"}}')
    (folder / "logs").mkdir()
    (folder / "logs" / "run.jsonl").write_text(f'{{"argv": "--hub_token {token} --output_dir {folder}"}}\n')
    (folder / ".env").write_text(f"HF_TOKEN={token}\n")
    (folder / "fit.json").write_text(f'{{"folder": "{folder}"}}')
    (folder / "notes.py").write_text(f"TOKEN = {token!r}\n")
