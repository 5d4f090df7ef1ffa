"""A small Trainer run in a process of its own, which can be killed at a step or at one of its file operations."""

import gc
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from tests.forked import SERVER
from trainers.callbacks.validated_checkpoint import ValidatedCheckpointCallback
from trainers.reliability.checkpoints import find_last_valid_checkpoint


def tiny_model(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    options = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64} | options
    config = LlamaConfig(num_attention_heads=2, attention_dropout=0.1, max_position_embeddings=32, **options)
    return LlamaForCausalLM(config)


def tiny_data(rows: int = 40, *, first: int = 0) -> Dataset:
    """Each row tells its number by its first two tokens."""
    rows = range(first, first + rows)
    ids = [[i // 8 % 64, i % 8] + [(7 * i + 3 * j) % 64 for j in range(6)] for i in rows]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def tiny_trainer(folder: Path, *callbacks: TrainerCallback, data=None, model=None, eval_dataset=None, **options):
    """Ten steps of four rows, saved every second step; `options` are those of `TrainingArguments`."""
    options = {"max_steps": 10, "save_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2} | options
    options = {"logging_steps": 100, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1} | options
    return Trainer(
        model=model or tiny_model(),
        args=TrainingArguments(output_dir=str(folder), **options),
        train_dataset=tiny_data() if data is None else data,
        eval_dataset=eval_dataset,
        data_collator=default_data_collator,
        callbacks=list(callbacks),
    )


class KillAtStep(TrainerCallback):
    """SIGKILL to this very process when `step` steps are finished and the next begins."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def kill_at_file_operation(folder: Path, within: str, number: int) -> None:
    """SIGKILL to this process just before its `number`-th file operation on a path of `folder` that holds `within`,
    counted from 1 over all threads. Python announces each to audit hooks."""
    seen = [0]

    def hook(event, arguments):
        if event in FILE_EVENTS and any(
            isinstance(a, (str, os.PathLike)) and os.fspath(a).startswith(str(folder)) and within in os.fspath(a)
            for a in arguments
        ):
            seen[0] += 1
            if seen[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_when_it_appears(file: Path) -> None:
    """SIGKILL to this process as soon as `file` is there: what torch and safetensors write raises no audit event."""

    def watch():
        while not file.exists():
            time.sleep(1e-5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def train(
    folder: Path, *, kill_at_step=None, kill_at_file=None, kill_at=None, manifests=True, background=True, **options
) -> None:
    """Train in this process, from the last valid checkpoint on if there is one, and save the model at the end."""
    torch.set_num_threads(1)
    gc.freeze()  # else Trainer's gc.collect() copies every page that is shared with the server
    callbacks = [ValidatedCheckpointCallback(background=background)] if manifests else []
    if kill_at_step is not None:
        callbacks.append(KillAtStep(kill_at_step))
    trainer = tiny_trainer(folder, *callbacks, **options)
    checkpoint = find_last_valid_checkpoint(folder)
    if kill_at_file is not None:
        kill_at_file_operation(folder, *kill_at_file)
    if kill_at is not None:
        kill_when_it_appears(folder / kill_at)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_model()


def in_process(function, *arguments, **options) -> int:
    """The exit code of a process that calls `function`; minus the signal that ended it."""
    process = SERVER.Process(target=function, args=arguments, kwargs=options)
    process.start()
    process.join(120)
    assert process.exitcode is not None, "no end after 120 s"
    return process.exitcode


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same_weights(a: Path, b: Path) -> bool:
    one, other = weights(a), weights(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
