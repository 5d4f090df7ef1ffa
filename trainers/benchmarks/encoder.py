"""Time the encoding of sentences by m3BERT, whole and at its exits, against a ModernBERT of the same shape.

The peer is transformers' own, of the same width, depth, heads, feed-forward size and vocabulary. Both models are
freshly initialised, which changes nothing of what a forward pass costs, and encode the same batches of random token
ids: lengths are drawn from the upper half of the range up to `--lengths`; texts are padded to the longest, pooled by
their mean and brought to length 1. Attention is SDPA for both. Tokenising is not in it.
"""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from itertools import cycle

import torch
from torch.nn import functional as F
from transformers import ModernBertConfig, ModernBertModel, PreTrainedModel

from hf_models.m3bert import M3BertConfig, M3BertForSentenceEmbedding

from .alternating_blocks import Timing, TimingVerdict, judge, time_alternately
from .timing_report import TimingReport, add_timing_arguments, clock_of, write_report


RESOLUTION = 0.05  # an interval wider than this resolves nothing
BATCHES = 4
Step = Callable[[], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderComparison:
    """m3BERT up to `layer` against the whole ModernBERT on sentences of at most `length` tokens: seconds of a batch,
    and sentences a second by wall time. The limit of the ratio is 1: no slower."""

    layer: int
    length: int
    ours_sentences_per_second: float
    baseline_sentences_per_second: float
    limit: float
    resolution: float
    verdict: TimingVerdict
    process: Timing
    wall: Timing


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderReport(TimingReport):
    """What `encoder-<device>.json` holds; `clock` names the one that the verdicts rest on."""

    clock: str
    data: str
    dtype: str
    batch_size: int
    parameters: dict[str, int]
    baseline_shape: dict
    comparisons: list[EncoderComparison]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    add_timing_arguments(parser, blocks=10, steps_per_block=2)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-layers", type=int, default=12, help="a multiple of three: the exits are its thirds")
    parser.add_argument("--num-heads", type=int, default=12)
    parser.add_argument("--intermediate-size", type=int, default=3072)
    parser.add_argument("--vocab-size", type=int, default=50368, help="ModernBERT's; a lookup costs the same in any")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 512], help="longest sentence of each run")
    parser.add_argument("--batch-size", type=int, default=8)


def run(options: argparse.Namespace) -> None:
    """Measure on CUDA where there is a device, else on the CPU, write the report, print its table."""
    torch.set_num_threads(options.threads)
    config = M3BertConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.num_layers,
        num_attention_heads=options.num_heads,
        intermediate_size=options.intermediate_size,
        max_position_embeddings=max(options.lengths),
    )
    report = measure(
        config,
        lengths=options.lengths,
        batch_size=options.batch_size,
        blocks=options.blocks,
        steps_per_block=options.steps_per_block,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    print(f"{markdown_table(report)}\n\nWrote {write_report(report, options.output)}")


def measure(
    config: M3BertConfig,
    *,
    lengths: Sequence[int],
    batch_size: int,
    blocks: int,
    steps_per_block: int,
    device: str = "cpu",
) -> EncoderReport:
    """Every exit of `config` at every length; in bf16 on CUDA, fp32 on the CPU."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    clock = "wall" if device == "cuda" else clock_of(torch.get_num_threads())
    torch.manual_seed(0)
    ours = M3BertForSentenceEmbedding(config).to(device, dtype).eval()
    baseline = ModernBertModel(modernbert_like(config)).to(device, dtype).eval()
    comparisons = []
    for length in lengths:
        batches = _batches(config, length, batch_size, device)
        other = _encoding(lambda batch: _mean_pooled(baseline, batch), batches, device)
        for layer in config.mrl_layers:
            own = _encoding(lambda batch, layer=layer: ours(**batch, exit_layer=layer).embeddings, batches, device)
            own(), other()  # the first pass allocates
            timings = time_alternately(own, other, blocks=blocks, steps_per_block=steps_per_block)
            comparisons.append(
                EncoderComparison(
                    layer=layer,
                    length=length,
                    ours_sentences_per_second=batch_size / timings["wall"].ours_seconds,
                    baseline_sentences_per_second=batch_size / timings["wall"].baseline_seconds,
                    limit=1.0,
                    resolution=RESOLUTION,
                    verdict=judge(timings[clock].ratio, limit=1.0, resolution=RESOLUTION),
                    **timings,
                )
            )
    return EncoderReport(
        benchmark="encoder",
        shape=config.to_diff_dict(),
        baseline_shape=baseline.config.to_diff_dict(),
        blocks=blocks,
        steps_per_block=steps_per_block,
        clock=clock,
        data="random token ids, lengths uniform in the upper half of each range",
        dtype=str(dtype).removeprefix("torch."),
        batch_size=batch_size,
        parameters={"m3bert": ours.num_parameters(), "modernbert": baseline.num_parameters()},
        comparisons=comparisons,
    )


def modernbert_like(config: M3BertConfig) -> ModernBertConfig:
    """ModernBERT with the width, depth, heads, feed-forward size, vocabulary and length of an m3BERT."""
    return ModernBertConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        **{f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("pad", "bos", "eos")},
        cls_token_id=config.bos_token_id,
        sep_token_id=config.eos_token_id,
    )


def _batches(config: M3BertConfig, length: int, batch_size: int, device: str) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        ids = torch.randint(3, config.vocab_size, (batch_size, length), generator=generator)
        lengths = torch.randint(max(1, length // 2), length + 1, (batch_size, 1), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        ids = torch.where(mask.bool(), ids, config.pad_token_id)
        batches.append({"input_ids": ids.to(device), "attention_mask": mask.to(device)})
    return batches


def _encoding(encode: Callable[[dict], torch.Tensor], batches: list[dict[str, torch.Tensor]], device: str) -> Step:
    turns = cycle(batches)

    def step() -> None:
        with torch.inference_mode():
            encode(next(turns))
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def _mean_pooled(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    states = model(**batch).last_hidden_state
    weights = batch["attention_mask"][:, :, None].to(states.dtype)
    return F.normalize((states * weights).sum(dim=1) / weights.sum(dim=1), dim=-1)


def markdown_table(report: EncoderReport) -> str:
    """Sentences a second and ratios of the report; verdicts rest on its `clock`."""
    lines = [
        f"Encoding, {report.device}, {report.dtype}, batches of {report.batch_size} ({report.data}); {report.blocks} "
        f"alternating blocks of {report.steps_per_block} batches; verdicts by {report.clock} time, limit 1. "
        f"m3BERT {report.parameters['m3bert'] / 1e6:.1f}M, ModernBERT {report.parameters['modernbert'] / 1e6:.1f}M "
        "parameters.",
        "",
        "| length | m3BERT layers | sentences/s | ModernBERT sentences/s | time ratio, process | wall | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for item in report.comparisons:
        process, wall = (
            f"{ratio.median:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            for ratio in (item.process.ratio, item.wall.ratio)
        )
        lines.append(
            f"| {item.length} | {item.layer} | {item.ours_sentences_per_second:.1f} | "
            f"{item.baseline_sentences_per_second:.1f} | {process} | {wall} | {item.verdict} |"
        )
    return "\n".join(lines)
