"""The part of `compare_collaboration` that writes: a small M-MoE on the cloud, drafters of it on the device."""

import copy
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments, set_seed

from hf_models.moe import MMoeConfig, MMoeForCausalLM

from ..callbacks.matryoshka_experts import MatryoshkaExpertsCallback
from ..data.standard_library import read_standard_library
from ..device_cloud.budget import DeviceBudget
from ..device_cloud.collaboration_generation import (
    AssistedGeneration,
    CloudGeneration,
    DeviceGeneration,
    GenerationTask,
    written_as_json,
)
from ..federated.core import RoundStore, WireMeter
from .arguments import training_arguments_of
from .kept_results import deciding_settings, kept
from .training import build_trainer, train


WRITERS = (
    AssistedGeneration(drafter="experts"),
    AssistedGeneration(drafter="layers"),
    CloudGeneration(),
    DeviceGeneration(drafter="experts"),
    DeviceGeneration(drafter="layers"),
)
BLOCK, REQUESTS, CHARACTERS = 64, 24, 128  # tokens are ASCII characters


class Blocks(Dataset):
    """Blocks of token ids, labels being the same."""

    def __init__(self, ids: torch.Tensor):
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def read_blocks(limit: int = 400_000) -> torch.Tensor:
    """Characters of the standard library's sources, `(blocks, BLOCK)`."""
    text = "".join(read_standard_library()["text"][:200])[:limit]
    ids = torch.frombuffer(bytearray(text.encode("ascii", errors="replace")), dtype=torch.uint8).long()
    return ids[: len(ids) // BLOCK * BLOCK].view(-1, BLOCK)


def writer_config() -> MMoeConfig:
    """Four layers of eight experts, up to four of them active; trained for any number."""
    return MMoeConfig(
        vocab_size=CHARACTERS,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok_per_layer=[4, 4, 4, 4],
        k_min=1,
        k_max=4,
        max_position_embeddings=2 * BLOCK,
        pad_token_id=0,
    )


def generation_task(
    args: TrainingArguments, blocks: torch.Tensor, steps: int, seed: int, folder: Path
) -> GenerationTask:
    """The cloud's model of a seed, trained or read, and blocks at the end of the text that it has not seen."""
    held_out = blocks[-REQUESTS:]
    own = training_arguments_of(
        args, output_dir=str(folder / "trainer"), max_steps=steps, learning_rate=3e-3, per_device_train_batch_size=16
    )
    own = dataclasses.replace(own, seed=seed, lr_scheduler_type="cosine", remove_unused_columns=False)
    store = RoundStore(folder / "writer")
    kept(folder / "writer.json", {"training": deciding_settings(own), "blocks": blocks.sum().item()}, lambda: None)
    set_seed(seed)
    model = MMoeForCausalLM(writer_config())
    if store.latest() is None:
        trainer = build_trainer(
            model, own, [MatryoshkaExpertsCallback()], train_dataset=Blocks(blocks[: -2 * REQUESTS])
        )
        train(trainer, None)
        store.commit(0, {"model": model.state_dict()})
    model.load_state_dict(store.load(0)[0]["model"])
    return GenerationTask(model=lambda: copy.deepcopy(model).eval(), texts=held_out)


def compare_writers(
    args: TrainingArguments, steps: int, seeds: list[int], root: Path, budget: DeviceBudget | None
) -> dict[str, list[dict[str, Any]]]:
    """What each way of writing comes to, by its name, one a seed; finished ones are kept."""
    blocks = read_blocks()
    outcomes: dict[str, list[dict[str, Any]]] = {writer.name: [] for writer in WRITERS}
    for seed in seeds:
        folder = root / "runs" / "text" / f"seed{seed}"
        task = generation_task(args, blocks, steps, seed, folder)
        for writer in WRITERS:

            def write(writer=writer, task=task) -> dict[str, Any]:
                start, meter = time.perf_counter(), WireMeter()
                found = written_as_json(writer.train(task, meter, budget), meter, task)
                return found | {"seconds": time.perf_counter() - start}

            made_of = {
                "method": repr(writer),
                "task": task.fingerprint,
                "budget": budget and dataclasses.asdict(budget),
            }
            outcomes[writer.name].append(kept(folder / f"{writer.name}.json", made_of, write))
    return outcomes


__all__ = ["WRITERS", "compare_writers", "generation_task", "read_blocks", "writer_config"]
