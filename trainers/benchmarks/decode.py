"""Time one decoded token of a MoNE: the neurons that are kept read alone, against all of them, and against the mask.

The model has random weights and experts that dominate it; a step is the forward of one token of one sequence, at the
beginning of a cache. `sigma_neurons` at the ratio computes what `masked` computes; the two dense arms are the same
model with all its neurons on transformers' own backends. Setting backend and ratio is in every step. It runs on the
CPU.
"""

import argparse
import dataclasses
from collections.abc import Callable

import torch

from hf_models.moe import MoneConfig, MoneForCausalLM

from .alternating_blocks import Timing, time_alternately
from .timing_report import TimingReport, add_timing_arguments, write_report


WARMUP_STEPS = 3
# Name -> (backend, whether it uses the ratio).
ARMS = {
    "sigma_neurons": ("sigma_neurons", True),
    "dense_grouped_mm": ("grouped_mm", False),
    "dense_batched_mm": ("batched_mm", False),
    "masked_grouped_mm": ("grouped_mm", True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """`sigma_neurons` at a ratio against another arm, on two clocks."""

    ratio: float
    baseline: str
    process: Timing
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeReport(TimingReport):
    """What `decode-<device>.json` holds."""

    dtype: str
    comparisons: list[Comparison]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=10, steps_per_block=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.5, 0.25, 0.125], help="shares of the neurons")


def run(options: argparse.Namespace) -> None:
    """Measure a model of 8 experts of 2816 neurons, two of them active, write the report, print its table."""
    torch.set_num_threads(options.threads)
    config = MoneConfig(
        vocab_size=1024,
        hidden_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=2816,
        num_experts=8,
        num_experts_per_tok=2,
        scoring_func="softmax",
        dtype=options.dtype,
    )
    report = measure(config, options.ratios, blocks=options.blocks, steps_per_block=options.steps_per_block)
    path = write_report(report, options.output, variant=report.dtype)
    print(f"{markdown_table(report)}\n\nWrote {path}")


@torch.no_grad()
def measure(config: MoneConfig, ratios: list[float], *, blocks: int, steps_per_block: int) -> DecodeReport:
    """Time `sigma_neurons` at each ratio against every other arm, with as many threads as torch has."""
    torch.manual_seed(0)
    dtype = config.dtype or torch.float32
    model = MoneForCausalLM(config).to(dtype).eval()
    for router in model.routers:  # as it is loaded
        router.float()
    comparisons = []
    for ratio in ratios:
        arms = {name: _decoder(model, backend, ratio if sparse else 1.0) for name, (backend, sparse) in ARMS.items()}
        for step in arms.values():
            for _ in range(WARMUP_STEPS):
                step()
        ours = arms.pop("sigma_neurons")
        for name, step in arms.items():
            timings = time_alternately(ours, step, blocks=blocks, steps_per_block=steps_per_block)
            comparisons.append(Comparison(ratio=ratio, baseline=name, **timings))
    return DecodeReport(
        benchmark="decode",
        dtype=str(dtype).removeprefix("torch."),
        shape=config.to_diff_dict(),
        blocks=blocks,
        steps_per_block=steps_per_block,
        comparisons=comparisons,
    )


def _decoder(model: MoneForCausalLM, backend: str, ratio: float) -> Callable[[], object]:
    ids = torch.tensor([[7]])

    def step() -> None:
        model.set_experts_implementation(backend)
        model.set_active_neurons(ratio=ratio)
        model(input_ids=ids, use_cache=True)

    return step


def markdown_table(report: DecodeReport) -> str:
    """Speed-ups on the CPU's clock for one thread, on the wall for several: above 1, the neurons win."""
    clock = "process" if report.threads == 1 else "wall"
    lines = ["| neurons | against | times as fast | 95 % interval |", "|---|---|---:|---|"]
    for row in report.comparisons:
        timing: Timing = getattr(row, clock)
        median, low, high = (1 / bound for bound in (timing.ratio.median, timing.ratio.high, timing.ratio.low))
        lines.append(f"| {row.ratio:g} | {row.baseline} | {median:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(lines)
