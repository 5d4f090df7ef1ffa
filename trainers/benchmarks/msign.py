"""Cost of MSign in a training step: AdamW with it and without, a period of steps in turns.

Both arms start from the same weights and train on the same random token ids, at a learning rate so small that they do
the same work throughout. A block is one period of steps of each arm, so that it holds exactly one application. The
applications are also timed by themselves: their share is their median over a period of AdamW's steps.
"""

import argparse
import copy
import dataclasses
import time
from collections.abc import Callable
from itertools import cycle

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

from ..optimizers import MSign, select_targets
from .alternating_blocks import MIN_BLOCKS, Timing, TimingVerdict, judge, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


LIMIT = 1.01
RESOLUTION = 0.01  # an interval wider than this resolves nothing
WARMUP_STEPS = 3
# The second is the 1B model of the paper (arXiv 2602.01734, appendix A), for GPUs.
SHAPES = {
    "demo": lambda: SigmaMoeForCausalLM(SigmaMoeConfig.from_preset("demo")),
    "llama-1b": lambda: LlamaForCausalLM(
        LlamaConfig(hidden_size=2048, intermediate_size=5440, num_hidden_layers=16, num_attention_heads=16)
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MSignReport(TimingReport):
    """What `msign-<shape>-<device>.json` holds. `application_seconds`: wall time of each application; `share`: their
    median over the wall time of a period of AdamW's steps."""

    clock: str
    data: str
    model: str
    parameters: int
    matrices: int
    targets: str
    period: int
    batch_size: int
    sequence_length: int
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing
    application_seconds: list[float]
    share: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark; `--steps-per-block` is the period."""
    add_timing_arguments(parser, blocks=MIN_BLOCKS, steps_per_block=100)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--targets", choices=("attention", "all_2d"), default="all_2d")
    parser.add_argument("--device", default="cpu", help="of torch; on a GPU the model is bfloat16")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--sequence-length", type=int, default=256)


def run(options: argparse.Namespace) -> None:
    """Measure, write the report, print it."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SHAPES[options.shape]().to(options.device)
    report = measure(
        model if options.device == "cpu" else model.bfloat16(),
        name=options.shape,
        targets=options.targets,
        period=options.steps_per_block,
        blocks=options.blocks,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
    )
    path = write_report(report, options.output, variant=options.shape)
    print(f"{summary(report)}\n\nWrote {path}")


def measure(
    model: PreTrainedModel,
    *,
    name: str,
    targets: str,
    period: int,
    blocks: int,
    batch_size: int = 4,
    sequence_length: int = 256,
) -> MSignReport:
    """Time both arms on the device of `model`, which serves the one without; a copy serves the other."""
    clock = clock_of(torch.get_num_threads()) if model.device.type == "cpu" else "wall"
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (8, batch_size, sequence_length), generator=generator)
    ids = ids.to(model.device)
    ours = copy.deepcopy(model)
    selected = select_targets(ours, targets)
    optimizer = TimedMSign(_adamw(ours), selected, period=period)
    arms = [_training_step(ours, optimizer, ids), _training_step(model, _adamw(model), ids)]
    for arm in arms:
        for _ in range(WARMUP_STEPS):
            arm()
    timings = time_alternately(*arms, blocks=blocks, steps_per_block=period)
    applications = sorted(optimizer.seconds)
    share = applications[len(applications) // 2] / (period * timings["wall"].baseline_seconds)
    return MSignReport(
        benchmark="msign",
        shape=model.config.to_diff_dict(),
        blocks=blocks,
        steps_per_block=period,
        clock=clock,
        data="random token ids",
        model=name,
        parameters=model.num_parameters(),
        matrices=sum(m[..., 0, 0].numel() for target in selected for _, m in target.matrices(target.parameter)),
        targets=targets,
        period=period,
        batch_size=batch_size,
        sequence_length=sequence_length,
        limit=LIMIT,
        resolution=RESOLUTION,
        verdict=judge(timings[clock].ratio, limit=LIMIT, resolution=RESOLUTION),
        application_seconds=optimizer.seconds,
        share=share,
        **timings,
    )


class TimedMSign(MSign):
    """Keeps how long each application took, in seconds of wall time."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.__dict__["seconds"] = []

    def _apply_if_due(self) -> None:
        self.__dict__["last_report"] = {}
        _wait(self.param_groups[0]["params"][0].device)
        start = time.perf_counter()
        super()._apply_if_due()
        _wait(self.param_groups[0]["params"][0].device)
        if self.last_report:
            self.seconds.append(time.perf_counter() - start)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _adamw(model: PreTrainedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.1, fused=True)


def _training_step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    batches = cycle(ids)

    def step() -> None:
        batch = next(batches)
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(ids.device)

    return step


def summary(report: MSignReport) -> str:
    """The report in a sentence each for ratio and share."""
    ratios = ", ".join(
        f"{name} time {timing.ratio.median:.4f} [{timing.ratio.low:.4f}, {timing.ratio.high:.4f}]"
        for name, timing in (("process", report.process), ("wall", report.wall))
    )
    applications = sorted(report.application_seconds)
    return (
        f"Training step of {report.model} with MSign ({report.targets}, {report.matrices} matrices, P = "
        f"{report.period}) over AdamW's alone, {report.device}, {report.batch_size} x {report.sequence_length} tokens "
        f"({report.data}); {report.blocks} alternating blocks of {report.period} steps: {ratios}; limit "
        f"{report.limit} by {report.clock} time: {report.verdict}.\nAn application: "
        f"{applications[len(applications) // 2]:.3f} s, {report.share:.2%} of the steps of a period by itself."
    )
