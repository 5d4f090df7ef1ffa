"""Time neuron experts at decoding against dense ones: shares of neurons, with and without the transposed copy.

All arms get the same tokens and weights and take turns. `dense` is the same layer with all neurons, a matrix-vector
product for each (token, slot) pair; those of transformers are dense too. Beside every measured speed stands the most
that the bytes of the weights allow, 3 / (1 + 2 r).
"""

import argparse
import itertools
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from ..compile_report import MODELS, Model
from ..neuron_topk import bytes_per_token, neuron_topk_mlp
from .experts import RESULTS, captured, versions
from .layers import Layer, of_transformers
from .report import results_file, write
from .timing import Arm, Clock, median_interval, prepared_device, time_in_turns


SHARES = (0.5, 0.25, 0.125)
SHAPES = {"16x1024x2816": Model(16, 2, 1024, 2816), "16x1024x4096": Model(16, 2, 1024, 4096)} | MODELS
SHOWN = {"cpu": ("16x1024x2816", "16x1024x4096", "Sigma-MoE-Tiny"), "cuda": ("Sigma-MoE-Tiny", "OLMoE-1B-7B")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BASELINES = ("dense", "eager", "batched_mm", "grouped_mm")
ROUTINGS = 64  # drawn before, and used in turn: on a CPU no cache holds the experts of all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device")
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), help="experts x hidden x neurons, or a model")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=list(DTYPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1])
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--blocks", type=int, default=20, help="alternating blocks of a cell, at least ten")
    parser.add_argument("--steps", type=int, default=5, help="steps of each arm in a block")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")


def run(options: argparse.Namespace) -> int:
    """Measure and report."""
    device, name, clock = prepared_device(options.device, options.threads)
    cells = {}
    shapes = options.shapes or SHOWN[device.type]
    for shape, dtype, tokens in itertools.product(shapes, options.dtypes, options.tokens):
        key = f"{shape}/{dtype}/{tokens}"
        print(key, flush=True)
        model = SHAPES[shape]
        cells[key] = measure(
            model, DTYPES[dtype], tokens, device, clock=clock, blocks=options.blocks, steps=options.steps
        )
    results = {"benchmark": "neurons", "device": name, "versions": versions(), "cells": cells}
    path = results_file(options.output, "neurons", name)
    print(f"{write(results, markdown(results), path)}\nWrote {path.name} and its .md.")
    return 0


@torch.inference_mode()
def measure(
    model: Model, dtype: torch.dtype, tokens: int, device: torch.device, *, clock: Clock, blocks: int, steps: int
) -> dict:
    """All arms of one shape, as they go into the file."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    x = draw(tokens, model.hidden).to(dtype)
    gate_up = (draw(model.experts, 2 * model.inner, model.hidden) * model.hidden**-0.5).to(dtype)
    down = (draw(model.experts, model.hidden, model.inner) * model.inner**-0.5).to(dtype)
    scores = torch.rand(ROUTINGS, tokens, model.experts, generator=generator, device=device)
    top = scores.softmax(-1).topk(model.slots)
    arms = _layers(gate_up, down, down.transpose(1, 2).contiguous())
    if x.is_cuda:
        del arms["eager"]  # it asks the GPU which experts have tokens, which no graph can
    inputs = itertools.cycle(zip(top.indices, top.values))
    fixed = next(inputs)

    def arm(name: str, layer: Layer) -> Arm:
        if x.is_cuda:  # as decoding loops replay it; the clock empties the cache
            return Arm(name, lambda: None, captured(lambda _: layer(x, *fixed)))
        return Arm(name, lambda: next(inputs), lambda routing: layer(x, *routing))

    expected = arms["dense"](x, *fixed)
    differences = {name: _difference(layer(x, *fixed), expected) for name, layer in arms.items()}
    seconds = time_in_turns([arm(name, layer) for name, layer in arms.items()], clock, blocks=blocks, steps=steps)
    count = partial(bytes_per_token, model.hidden, model.inner, model.slots, width=dtype.itemsize)
    found = {}
    for name, values in seconds.items():
        kept = round(_share(name) * model.inner)
        moved = tokens * count(kept, transposed="columns" not in name)
        found[name] = {
            "weight_bytes": moved,
            "at_most": tokens * count(model.inner) / moved,
            "differs_from_dense": differences[name],
            "microseconds": asdict(median_interval([1e6 * value for value in values])),
            "faster_than": {
                other: asdict(median_interval([theirs / ours for theirs, ours in zip(seconds[other], values)]))
                for other in BASELINES
                if other != name and other in seconds
            },
        }
    return {"model": asdict(model), "tokens": tokens, "arms": found}


def _share(name: str) -> float:
    return float(name.split()[0].removeprefix("r=")) if name.startswith("r=") else 1.0


def _layers(gate_up: torch.Tensor, down: torch.Tensor, down_t: torch.Tensor) -> dict[str, Layer]:
    def neurons(share: float, down_proj_t: torch.Tensor | None) -> Layer:
        kept = round(share * down.shape[2])
        return lambda x, index, weights: neuron_topk_mlp(
            x, gate_up, down, index, weights, kept, down_proj_t=down_proj_t
        )

    found = {"dense": neurons(1.0, None), "eager": _eager(gate_up, down)}
    # Parameters, as transformers wants them: the tensors were made for inference and learn nothing.
    parameters = [nn.Parameter(weight, requires_grad=False) for weight in (gate_up, down)]
    found |= {name: of_transformers(name, *parameters) for name in ("batched_mm", "grouped_mm")}
    for share in SHARES:
        found |= {f"r={share:g}": neurons(share, down_t), f"r={share:g} columns": neurons(share, None)}
    return found


def _eager(gate_up: torch.Tensor, down: torch.Tensor) -> Layer:
    """transformers' loop over the experts that have a token."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, hidden, inner = down.shape
    config = SimpleNamespace(
        num_experts=experts,
        num_local_experts=experts,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        hidden_act="silu",
        _experts_implementation="eager",
    )
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(down, requires_grad=False)
    # The loop sums in the dtype of the routing weights times that of the rows.
    return lambda x, index, weights: module(x, index, weights.to(x.dtype))


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got.float() - expected.float()).norm() / expected.float().norm()).item()


def markdown(results: dict) -> str:
    """One line an arm of each cell."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Neuron experts at decoding, {results['device']}",
        "",
        f"{used}. Arms take turns; medians of blocks with order-statistic intervals. `r=`: share of neurons kept; "
        "`columns`: without the transposed copy of W_down. On random weights outputs differ from the dense layer's "
        "by what is left out; this is about time alone. Weight MB: of the gates and of what is kept, which bounds the "
        "speed over `dense` (at most). A CPU reads all of W_up or W_down where that is faster: see `neuron_topk.py`.",
        "",
        "| shape | dtype | tokens | layer | us [interval] | weight MB | at most | "
        + " | ".join(f"faster than {name}" for name in BASELINES)
        + " |",
        "|" + "---|" * (7 + len(BASELINES)),
    ]
    for key, cell in results["cells"].items():
        for name, arm in cell["arms"].items():
            micro, ratios = arm["microseconds"], arm["faster_than"]
            texts = [
                f"{ratios[b]['median']:.2f} [{ratios[b]['low']:.2f}, {ratios[b]['high']:.2f}]" if b in ratios else ""
                for b in BASELINES
            ]
            line = [*key.split("/"), name, f"{micro['median']:.0f} [{micro['low']:.0f}, {micro['high']:.0f}]"]
            line += [f"{arm['weight_bytes'] / 1e6:.1f}", f"{arm['at_most']:.2f}", *texts]
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines) + "\n"
