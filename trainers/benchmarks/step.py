"""Time a whole training step (forward, backward, AdamW) of Sigma-MoE: against Qwen3-MoE, and against itself without
balance.

All arms start from the same weights and train on the same random token ids. Their learning rate is so small that they
route alike throughout; what a step costs does not depend on it. The step is that of the demo's Trainer: no padding, no
cache, fused AdamW. Gradient clipping and the data loader are not in it. It runs on the CPU.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from itertools import cycle

import torch
from transformers import (
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..callbacks import ExpertBalanceCallback
from .alternating_blocks import Timing, TimingVerdict, judge, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


RECORD_EVERY = 10  # steps between two records of the balance, the demo's `logging_steps`
RESOLUTION = 0.03  # an interval wider than this resolves nothing
WARMUP_STEPS = 3

Step = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two arms, the limit of their ratio, and the verdict on the clock of the report."""

    ours: str
    baseline: str
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepReport(TimingReport):
    """What `step-<device>.json` holds; `clock` names the one that the verdicts rest on."""

    clock: str
    data: str
    batch_size: int
    sequence_length: int
    startup_seconds: dict[str, float]
    comparisons: list[Comparison]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=10, steps_per_block=10)


def run(options: argparse.Namespace) -> None:
    """Measure at the demo's shape, write the report, print its table."""
    torch.set_num_threads(options.threads)
    config = SigmaMoeConfig.from_preset("demo")
    report = measure(config, blocks=options.blocks, steps_per_block=options.steps_per_block)
    print(f"{markdown_table(report)}\n\nWrote {write_report(report, options.output)}")


def measure(
    config: SigmaMoeConfig, *, blocks: int, steps_per_block: int, batch_size: int = 4, sequence_length: int = 256
) -> StepReport:
    """Run all comparisons with as many threads as torch has."""
    clock = clock_of(torch.get_num_threads())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (8, batch_size, sequence_length), generator=generator)

    with tempfile.TemporaryDirectory() as logs:
        arms, startup = _started_arms(config, ids, logs)
        comparisons = []
        for ours, baseline, limit in (
            ("sigma_moe", "qwen3_moe", 1.0),
            ("sigma_moe", "sigma_moe_without_balance", 1.03),
            ("sigma_moe_with_callback", "sigma_moe_without_balance", 1.03),
        ):
            timings = time_alternately(arms[ours], arms[baseline], blocks=blocks, steps_per_block=steps_per_block)
            verdict = judge(timings[clock].ratio, limit=limit, resolution=RESOLUTION)
            comparisons.append(
                Comparison(
                    ours=ours, baseline=baseline, limit=limit, resolution=RESOLUTION, verdict=verdict, **timings
                )
            )
    return StepReport(
        benchmark="step",
        clock=clock,
        data="random token ids",
        shape=config.to_diff_dict(),
        batch_size=batch_size,
        sequence_length=sequence_length,
        blocks=blocks,
        steps_per_block=steps_per_block,
        startup_seconds=startup,
        comparisons=comparisons,
    )


def _started_arms(config: SigmaMoeConfig, ids: torch.Tensor, logs: str) -> tuple[dict[str, Step], dict[str, float]]:
    """Every arm after its first steps, and the seconds of wall time that these took."""
    torch.manual_seed(0)
    sigma = SigmaMoeForCausalLM(config).train()
    step = _training_step(sigma, ids)
    arms = {
        "sigma_moe": step,
        "qwen3_moe": _training_step(_qwen3_moe_like(sigma), ids),
        "sigma_moe_without_balance": _without_balance(sigma, step),
        "sigma_moe_with_callback": _with_callback(sigma, step, logs),
    }
    startup = {}
    for name, arm in arms.items():
        start = time.perf_counter()
        for _ in range(WARMUP_STEPS):
            arm()
        startup[name] = time.perf_counter() - start
    return arms, startup


def _qwen3_moe_like(sigma: SigmaMoeForCausalLM) -> Qwen3MoeForCausalLM:
    """transformers' own model of the same shape with the same weights, its balance loss included."""
    known = {field.name for field in dataclasses.fields(Qwen3MoeConfig)} | {"head_dim"}
    shape = {field: value for field, value in sigma.config.to_dict().items() if field in known}
    # At k = 1 a normalised weight would be the constant 1, which computes less than ours.
    changes = {"norm_topk_prob": False, "output_router_logits": True, "architectures": None}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, **changes}))
    keys = model.load_state_dict(sigma.state_dict(), strict=False)
    if keys.missing_keys or not all(key.endswith(".e_score_correction_bias") for key in keys.unexpected_keys):
        raise RuntimeError(f"The two models are not of one shape: {keys}.")
    return model.train()


def _training_step(model: PreTrainedModel, ids: torch.Tensor) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)
    batches = cycle(ids)
    targets = ids[0, :, 1:].numel()

    def step() -> None:
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch, use_cache=False, num_items_in_batch=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _without_balance(model: SigmaMoeForCausalLM, step: Step) -> Step:
    """The same step without balance losses, statistics, and the recording of router logits that they read."""

    def step_without() -> None:
        # The head asks its own flag whether it is learning; the body below it has one of its own and goes on training.
        model.training = False
        try:
            step()
        finally:
            model.training = True

    return step_without


def _with_callback(model: SigmaMoeForCausalLM, step: Step, logs: str) -> Step:
    """The same step inside the calls that a Trainer makes to [`ExpertBalanceCallback`]."""
    args = TrainingArguments(output_dir=logs, use_cpu=True, report_to=[])
    state, control = TrainerState(logging_steps=RECORD_EVERY), TrainerControl()
    # Its alarm would be right about random tokens, and off the point.
    callback = ExpertBalanceCallback(record_vectors=True, alarm_violation=float("inf"))
    callback.on_train_begin(args, state, control, model=model)
    model.routing_window.managed = False  # for the other arms, which share the model

    def step_with() -> None:
        model.routing_window.managed = True
        callback.on_step_begin(args, state, control, model=model)
        step()
        callback.on_optimizer_step(args, state, control, model=model)
        state.global_step += 1
        callback.on_step_end(args, state, control, model=model)
        model.routing_window.managed = False

    return step_with


def markdown_table(report: StepReport) -> str:
    """The ratios of the report; verdicts rest on its `clock`."""
    lines = [
        f"Training step, {report.device}, {report.batch_size} x {report.sequence_length} tokens ({report.data}); "
        f"{report.blocks} alternating blocks of {report.steps_per_block} steps; median ratio with its order-statistic "
        f"interval; verdicts by {report.clock} time.",
        "",
        "| ours | baseline | ratio, process time | ratio, wall time | process ms | limit | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        process, wall = (
            f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            for ratio in (item.process.ratio, item.wall.ratio)
        )
        milliseconds = f"{1e3 * item.process.ours_seconds:.0f} / {1e3 * item.process.baseline_seconds:.0f}"
        lines.append(
            f"| {item.ours} | {item.baseline} | {process} | {wall} | {milliseconds} | {item.limit} | {item.verdict} |"
        )
    startup = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.startup_seconds.items())
    return "\n".join([*lines, "", f"Start-up, wall time of the first {WARMUP_STEPS} steps: {startup}."])
