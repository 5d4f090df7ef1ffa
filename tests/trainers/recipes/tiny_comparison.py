"""The comparing recipes in a form that a test can afford: the preset's arms and measurements, a shape and a corpus of
nothing. Not for numbers."""

import json
from pathlib import Path

from transformers import TrainingArguments

from hf_models.moe import configuration_sigma_moe
from trainers.recipes.arguments import DataArguments, parse_arguments
from trainers.recipes.comparison import Comparison, ComparisonArguments, Job
from trainers.recipes.language_model import Fit


TINY = configuration_sigma_moe.PRESETS["evidence"] | {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "num_experts": 8,
    "initializer_range": 0.1,
}
OPTIONS = {
    "model_preset": "tiny",
    "dataset_name": "corpus",
    "held_out_fraction": 0.2,
    "output_dir": "run",
    "warmup_steps": 1,
    "logging_steps": 2,
    "sequence_length": 32,
    "tokenizer_vocab_size": 300,
    "max_eval_blocks": 8,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "workers": 0,
}


def add_tiny_preset(monkeypatch) -> None:
    monkeypatch.setitem(configuration_sigma_moe.PRESETS, "tiny", TINY)


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.py").write_text(f"def f{number}(x):\n    return x + {number}\n\n" * 8)


def command_line(**options) -> list[str]:
    """The options of a recipe, `OPTIONS` with changes; None leaves one out."""
    argv = []
    for name, value in (OPTIONS | options).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            argv += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return argv


def arguments_of(recipe, own: type, *argv: str) -> tuple[str, ComparisonArguments, object, DataArguments, object]:
    """What a recipe makes of a command line: preset, comparison, its own arguments, data, training."""
    types = (ComparisonArguments, own, DataArguments, TrainingArguments)
    preset, values = parse_arguments(types, recipe.PRESETS, list(argv), default_preset="demo")
    return preset, *values


def finished(root: Path, bits: dict[str, list[float]], *, steps: int = 10) -> Comparison:
    """A comparison whose runs ended at `bits[arm][seed]`."""
    comparison = Comparison({}, {}, root)
    for arm, values in bits.items():
        jobs = [Job(arm, seed, 1e-3, steps) for seed, _ in enumerate(values)]
        fits = {
            job: Fit(
                name=arm,
                seed=job.seed,
                steps=steps,
                tokens=100 * steps,
                learning_rate=1e-3,
                train_seconds=1.0,
                nats_per_token=2 * value,
                bits_per_character=value,
                parameters=12_000,
                history=[],
            )
            for job, value in zip(jobs, values, strict=True)
        }
        comparison.add(arm, jobs, fits)
    return comparison


def times_of_fits(root: Path) -> dict[Path, int]:
    """When each training run below `root` wrote its result."""
    return {file: file.stat().st_mtime_ns for file in sorted(root.rglob("fit.json"))}
