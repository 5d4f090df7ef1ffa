r"""Find wrong kernels before they cost a run: a candidate against a reference, forward, backward and ten Adam steps.

    python -m trainers.reliability.numcheck [--dtype bfloat16] [--tokens 512] [--device cuda]

checks the expert backends (`batched_mm`, `grouped_mm`, and `sigma_triton` where it runs) against `eager`, and exits
with 1 if one fails. After the numerical tests of the SIGMA stack (arXiv 2512.13488, section 5 of our digest): fixed
seed 42, normal inputs, loss = mean of the output, Adam with learning rate 1e-3, no clipping, cosine of the flattened
tensors in fp64, alarm under 0.99. Forward-only checks miss what shows in gradients and accumulates. Ours: a bound on
the relative error beside the cosine, which does not see a wrong scale.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_models.moe import SigmaMoeConfig
from hf_models.moe.modeling_sigma_moe import SigmaMoeExperts


SEED = 42
LEARNING_RATE = 1e-3
Inputs = Callable[[torch.Generator], Sequence[torch.Tensor]]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Comparison:
    """One tensor of candidate and reference, means over the repeats. `noise`: the largest relative difference between
    two runs of the same side, and `noise_cosine` the smallest cosine; on a deterministic device 0 and 1."""

    name: str
    cosine: float
    relative_error: float
    noise_cosine: float
    noise: float
    passed: bool


@dataclass(frozen=True)
class NumcheckReport:
    """`comparisons` of outputs, input gradients (`dx`), weight gradients (`dw`) and weights after the last step."""

    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether every tensor passed."""
        return all(each.passed for each in self.comparisons)

    @property
    def failures(self) -> tuple[Comparison, ...]:
        """Those that did not."""
        return tuple(each for each in self.comparisons if not each.passed)

    def __str__(self) -> str:
        rows = [("tensor", "cosine", "rel. error", "noise cos.", "noise", "")]
        for each in self.comparisons:
            numbers = (each.cosine, each.relative_error, each.noise_cosine, each.noise)
            shown = (f"{numbers[0]:.6f}", f"{numbers[1]:.2e}", f"{numbers[2]:.6f}", f"{numbers[3]:.2e}")
            rows.append((each.name, *shown, "ok" if each.passed else "FAILS"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def numcheck(
    candidate: nn.Module | Callable[..., torch.Tensor],
    reference: nn.Module | Callable[..., torch.Tensor],
    make_inputs: Inputs,
    *,
    steps: int = 10,
    repeats: int = 3,
    min_cosine: float = 0.99,
    max_error: float = 0.01,
    seed: int = SEED,
) -> NumcheckReport:
    """Compare two implementations of the same thing.

    Outputs, input gradients and weight gradients are those of the first step, where both have the same weights; the
    weights are those after `steps` Adam steps, each on its own trajectory, so that errors accumulate. A tensor passes
    with a cosine of at least `min_cosine` *and* a relative error ||a - b|| / ||b|| of at most `max_error` beyond the
    noise floor, the largest difference between the `repeats` runs of one side. Both sides are left as they were.

    Args:
        candidate, reference: modules with the same parameters (the reference's values are given to the candidate's
            copy), or functions without any. They take the inputs and return a tensor, or a tuple whose first is one.
        make_inputs: the inputs of one step from a generator on the CPU, on the device of the modules. Floating-point
            ones get gradients.

    Raises:
        ValueError: parameters that differ in name or shape, or fewer than one step or two repeats.
    """
    if steps < 1 or repeats < 2:
        raise ValueError(f"steps={steps}, repeats={repeats}: give at least 1 step and 2 repeats (the noise floor).")
    weights = _state(reference)
    if _shapes(weights) != _shapes(_state(candidate)):
        raise ValueError(
            f"The parameters differ: {_shapes(weights)} in the reference, {_shapes(_state(candidate))} in the "
            "candidate. Give modules of the same class, or convert the candidate's weights first."
        )
    runs = {
        side: [_run(module, weights, make_inputs, steps, seed) for _ in range(repeats)]
        for side, module in (("candidate", candidate), ("reference", reference))
    }
    comparisons = []
    for name in runs["reference"][0]:
        ours, theirs = ([run[name].double().flatten() for run in runs[side]] for side in ("candidate", "reference"))
        pairs = [(side[i], side[j]) for side in (ours, theirs) for i in range(repeats) for j in range(i + 1, repeats)]
        noise, noise_cosine = max(relative_error(*pair) for pair in pairs), min(cosine(*pair) for pair in pairs)
        mine, right = torch.stack(ours).mean(0), torch.stack(theirs).mean(0)
        alike, error = cosine(mine, right), relative_error(mine, right)
        # Written so that NaN fails.
        passed = alike >= min_cosine and error <= max_error + noise
        comparisons.append(Comparison(name, alike, error, noise_cosine, noise, passed))
    return NumcheckReport(tuple(comparisons))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two flat fp64 tensors; 1 if both are 0, 0 if one is."""
    norms = a.norm() * b.norm()
    if norms == 0:
        return 1.0 if a.norm() == b.norm() else 0.0
    return float(a @ b / norms)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """||a - b|| / ||b||; infinite if b alone is 0."""
    difference = (a - b).norm()
    return 0.0 if difference == 0 else float(difference / b.norm())


def _run(
    module: Any, weights: dict[str, torch.Tensor], make_inputs: Inputs, steps: int, seed: int
) -> dict[str, torch.Tensor]:
    """The tensors of one run, on the CPU."""
    module = copy.deepcopy(module) if isinstance(module, nn.Module) else module
    parameters = dict(module.named_parameters()) if isinstance(module, nn.Module) else {}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE) if parameters else None
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, torch.Tensor] = {}
    for step in range(steps if parameters else 1):
        inputs = [_leaf(tensor) for tensor in make_inputs(generator)]
        output = module(*inputs)
        output = output[0] if isinstance(output, tuple) else output
        for parameter in parameters.values():
            parameter.grad = None
        output.float().mean().backward()
        if step == 0:
            kept["output"] = output.detach().cpu()
            for i, tensor in enumerate(inputs):
                if tensor.requires_grad and tensor.grad is not None:
                    kept[f"dx {i}"] = tensor.grad.cpu()
            kept |= {f"dw {n}": p.grad.cpu().clone() for n, p in parameters.items() if p.grad is not None}
        if optimizer is not None:
            optimizer.step()
    return kept | {f"w{steps} {name}": parameter.detach().cpu() for name, parameter in parameters.items()}


def _leaf(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def _state(module: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.named_parameters()} if isinstance(module, nn.Module) else {}


def _shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


# --- our expert backends ---------------------------------------------------------------------------------------------


def expert_backends(device: torch.device) -> list[str]:
    """The backends that run on `device`, without `eager`."""
    backends = ["batched_mm", "grouped_mm"]
    try:
        from sigma_kernels import can_run
    except ImportError:  # no Triton
        return backends
    return backends + (["sigma_triton"] if can_run(device) else [])


def check_experts(
    backend: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    tokens: int = 64,
    hidden: int = 64,
    intermediate: int = 32,
    experts: int = 8,
    top_k: int = 2,
    **options: Any,
) -> NumcheckReport:
    """[`numcheck`] of one backend against `eager` on Sigma-MoE's experts; `options` are those of `numcheck`. Tokens
    go to random experts with random weights; gradients of both the tokens (`dx 0`) and the weights (`dx 2`) count."""

    def build(implementation: str) -> nn.Module:
        config = SigmaMoeConfig(
            hidden_size=hidden,
            moe_intermediate_size=intermediate,
            num_experts=experts,
            num_experts_per_tok=top_k,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=2,
        )
        config._experts_implementation = implementation
        module = SigmaMoeExperts(config, 0).to(device, dtype)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for parameter in module.parameters():
                # By the fan-in: outputs of order 1, gradients that bf16 resolves.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
        return module

    def make_inputs(generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        x = torch.randn(tokens, hidden, generator=generator)
        scores = torch.rand(tokens, experts, generator=generator)
        weights, indices = scores.topk(top_k, dim=-1)  # (tokens, top_k)
        return x.to(device, dtype), indices.to(device), weights.to(device, dtype)

    return numcheck(build(backend), build("eager"), make_inputs, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m trainers.reliability.numcheck", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--backends", nargs="+", help="default: all that run on the device")
    for name, default in (("tokens", 64), ("hidden", 64), ("intermediate", 32), ("experts", 8), ("top_k", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--min_cosine", type=float, default=0.99)
    parser.add_argument("--max_error", type=float, default=0.01)
    options = vars(parser.parse_args(arguments))
    backends = options.pop("backends") or expert_backends(torch.device(options["device"]))
    options["dtype"], passed = DTYPES[options["dtype"]], True
    for backend in backends:
        report = check_experts(backend, **options)
        print(f"{backend} against eager: {'passed' if report.passed else 'FAILED'}\n{report}\n")
        passed = passed and report.passed
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())


__all__ = [
    "Comparison",
    "NumcheckReport",
    "check_experts",
    "cosine",
    "expert_backends",
    "main",
    "numcheck",
    "relative_error",
]
