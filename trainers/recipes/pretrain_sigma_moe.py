"""Pre-train Sigma-MoE with progressive sparsification (Sigma-MoE-Tiny, arXiv 2512.16248).

    accelerate launch -m trainers.recipes.pretrain_sigma_moe --preset demo --output_dir runs/demo
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.pretrain_sigma_moe --preset paper \\
        --dataset_name ORG/CORPUS

The same command goes on where a run was interrupted. The folder ends up as a Hub repository: model, tokenizer, code,
`results.json`, figures; `python -m model_cards.build FOLDER` writes its card.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)
from transformers.utils import logging

from hf_models.moe import SIGMA_MOE_TINY_INITIAL_TOP_K

from .arguments import DataArguments, RecipeTrainingArguments, parse_arguments, training_arguments_of
from .expert_parallel import require_expert_parallel
from .language_model import Fit, fit, prepare_language_data, require_writable
from .moe_family import OPTIMIZER, model_config
from .sigma_moe_arms import ARMS, Schedule, build_arm
from .sigma_moe_probes import LiveBalanceFigure, SwitchProbe
from .sigma_moe_results import describe_run, final_screen


logger = logging.get_logger(__name__)


@dataclasses.dataclass
class SigmaMoeArguments:
    """The model, its schedule, and what it is compared with."""

    model_preset: str = dataclasses.field(
        default="demo", metadata={"help": "Shape: demo, sigma-moe-tiny, sigma-v2-200b."}
    )
    initial_top_k: list[int] | None = dataclasses.field(
        default=None,
        metadata={"help": "Active experts of each layer in the initial stage; none: top-1 from the start."},
    )
    switch_at: float = dataclasses.field(
        default=0.9,
        metadata={"help": "Fraction of the run after which every layer activates one expert (our proposal)."},
    )
    router_aux_loss_coef: float | None = dataclasses.field(default=None, metadata={"help": "Default: the preset's."})
    baselines: list[str] = dataclasses.field(
        default_factory=list,
        metadata={
            "help": "Runs beside the main one: lbl_top1, top1_lbl, loss_free, qwen3_moe, dense, dense_equal_seconds."
        },
    )
    num_completions: int = dataclasses.field(default=0, metadata={"help": "Held-out Python functions to complete."})
    ngram_order: int = dataclasses.field(
        default=0, metadata={"help": "Compare with a character n-gram model; 0: do not."}
    )


@dataclasses.dataclass
class PretrainArguments(SigmaMoeArguments):
    """And how its experts are computed."""

    experts_implementation: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Backend of the experts of every run, such as sigma_triton; default: transformers'."},
    )
    expert_parallel_size: int = dataclasses.field(
        default=1,
        metadata={"help": "Processes that own the experts of one model and exchange tokens; cannot be resumed."},
    )


PRESETS = {
    "demo": OPTIMIZER
    | {
        "model_preset": "demo",
        "initial_top_k": [8, 4, 2, 1, 1, 1],
        "baselines": ["lbl_top1", "dense", "dense_equal_seconds"],
        "num_completions": 40,
        "ngram_order": 5,
        "sequence_length": 256,
        "max_eval_blocks": 128,
        "tokenizer_vocab_size": 4096,
        "dataset_license": "PSF-2.0",
        "dataset_language": "code",
        "output_dir": "runs/demo",
        "per_device_train_batch_size": 4,
        "max_steps": 650,
        "learning_rate": 2e-3,
        "warmup_steps": 40,
        "lr_scheduler_kwargs": {"num_decay_steps": 200, "min_lr_ratio": 0.05},
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 130,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
    },
    "paper": OPTIMIZER
    | {
        "model_preset": "sigma-moe-tiny",
        "initial_top_k": SIGMA_MOE_TINY_INITIAL_TOP_K,
        "sequence_length": 4096,
        "tokenizer_vocab_size": 200064,
        "streaming": True,
        "max_eval_blocks": 512,
        "output_dir": "runs/sigma-moe-tiny",
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "gradient_checkpointing": True,
        "bf16": True,
        "max_steps": 100_000,
        "learning_rate": 4e-4,
        "warmup_steps": 2000,
        "lr_scheduler_kwargs": {"num_decay_steps": 10_000, "min_lr_ratio": 0.1},
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 1000,
        "save_steps": 500,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
    },
}


def pretrain(preset: str, args: PretrainArguments, data_args: DataArguments, training_args: TrainingArguments) -> Path:
    """Train the model and its baselines, measure, and write `results.json`; the run folder is returned."""
    start = time.perf_counter()
    folder = Path(training_args.output_dir)
    require_writable(folder)
    data = prepare_language_data(data_args, training_args)
    config = model_config(args, data, data_args.sequence_length)
    if args.expert_parallel_size != 1:
        require_expert_parallel(args.expert_parallel_size, config.num_experts, training_args)
        if args.baselines:
            raise ValueError(
                f"expert_parallel_size={args.expert_parallel_size}: baselines would run otherwise, and their seconds "
                "would not compare. Leave --baselines empty."
            )
    main_arm = "progressive" if args.initial_top_k else "lbl_top1"
    schedule = Schedule(args.initial_top_k or [1] * config.num_hidden_layers, args.switch_at)

    fits = {}
    for name in [main_arm, *args.baselines]:
        own_args = training_args
        if name == "dense_equal_seconds":
            own_args = training_arguments_of(
                training_args, max_steps=steps_in_equal_seconds(fits[main_arm], fits["dense"])
            )
        if name != main_arm:
            own_args = training_arguments_of(
                own_args, output_dir=str(folder / "baselines" / name), resume_from_checkpoint=None
            )
        model, callbacks = build_arm(name.removesuffix("_equal_seconds"), config, schedule, training_args.seed)
        if args.experts_implementation and hasattr(model.config, "num_experts"):
            model.set_experts_implementation(args.experts_implementation)
        if name == "progressive":
            callbacks = [SwitchProbe(callbacks[0], data), *callbacks, LiveBalanceFigure()]
        print(f"\n{name}: {model.num_parameters() / 1e6:.1f}M parameters, {own_args.max_steps} steps", flush=True)
        fits[name] = fit(name, model, data, own_args, callbacks, expert_parallel_size=args.expert_parallel_size)
        if name == main_arm:
            trained = model

    state = PartialState()
    if state.is_main_process:
        reloaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        if state.num_processes == 1:  # a sharded model cannot be called by one process alone
            _require_equal(reloaded, trained, AutoTokenizer.from_pretrained(folder))
        results = describe_run(
            preset, args, data_args, training_args, data, fits, reloaded, time.perf_counter() - start
        )
        print(final_screen(folder, results))
    state.wait_for_everyone()
    return folder


def steps_in_equal_seconds(ours: Fit, baseline: Fit) -> int:
    """Steps that `baseline` makes in the time of `ours`. `ValueError` if a run was too short to be timed."""
    if not ours.train_seconds or not baseline.train_seconds:
        raise ValueError(
            f"{ours.steps} steps are too few to measure their speed (the first ones count as start-up), so "
            "dense_equal_seconds has no number of steps. Raise --max_steps, or leave it out of --baselines."
        )
    return max(1, round(baseline.steps * ours.train_seconds / baseline.train_seconds))


def _require_equal(reloaded: PreTrainedModel, trained: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The saved model, loaded as any user loads it, computes what was trained."""
    ids = tokenizer("def main():\n    return", return_tensors="pt").input_ids
    with torch.no_grad():
        saved, kept = reloaded(ids).logits, trained.eval().cpu()(ids).logits
    if not torch.allclose(saved, kept, atol=1e-4):
        raise RuntimeError(
            f"The saved model differs from the trained one by {(saved - kept).abs().max()} in its logits."
        )


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    preset, (args, data_args, training_args) = parse_arguments(
        (PretrainArguments, DataArguments, RecipeTrainingArguments), PRESETS, argv, default_preset="demo"
    )
    # Known before hours of training, not after.
    unknown = sorted(set(args.baselines) - {*ARMS, "dense_equal_seconds"})
    if unknown:
        raise SystemExit(
            f"--baselines {' '.join(unknown)}: not known. Choose from {', '.join([*ARMS, 'dense_equal_seconds'])}."
        )
    if (
        "dense_equal_seconds" in args.baselines
        and "dense" not in args.baselines[: args.baselines.index("dense_equal_seconds")]
    ):
        raise SystemExit(
            "--baselines dense_equal_seconds needs dense before it: its speed decides the number of steps."
        )
    try:
        pretrain(preset, args, data_args, training_args)
    except KeyboardInterrupt:
        goes_on = f"The same command goes on from the last checkpoint in {training_args.output_dir}."
        print("\nInterrupted." if args.expert_parallel_size > 1 else f"\nInterrupted. {goes_on}")
        sys.exit(130)


if __name__ == "__main__":
    main()
