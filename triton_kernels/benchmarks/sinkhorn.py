"""Time and memory of transport plans, and of their gradients, beside other implementations.

`loop` is torch's `logsumexp` over the whole batch, as many iterations as ours; `POT log` and `POT` are the batched
solvers of POT in the log domain and without it, from a start of their own and with a tolerance of 0, so that they do
not stop before; `GeomLoss` makes as many of its averaged, annealed iterations, whose plan is another one on the way.
With gradients, `loop` and POT go back through their iterations, GeomLoss through its last one, `sinkhorn` takes the
implicit gradient. Arms take turns; memory is the peak above the beginning, results included.
"""

import argparse
import contextlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import torch

from .. import reference
from ..sinkhorn import sinkhorn
from .allocations import allocations
from .experts import RESULTS, versions
from .report import results_file, write
from .timing import Arm, Clock, median_interval, prepared_device, time_in_turns


OURS = "sinkhorn"
MODES = ("plan", "plan and gradient")
PACKAGES = {"POT log": ("ot.batch", "pot"), "POT": ("ot.batch", "pot"), "GeomLoss": ("geomloss.ot", "geomloss")}


@dataclass(frozen=True)
class Cell:
    """Plans of cosine distances."""

    images: int
    rows: int
    columns: int
    iterations: int = 30
    eps: float = 0.1

    @property
    def key(self) -> str:
        """Its sizes."""
        return f"{self.images}x{self.rows}x{self.columns}, eps {self.eps:g}"


# Patches and concepts of DOT-CBM at its own sizes, and of a small model; on a CPU of a batch that does not take hours.
SHOWN = {
    "cpu": (Cell(32, 64, 45), Cell(8, 324, 112), Cell(8, 324, 312), Cell(8, 324, 312, eps=0.005)),
    "cuda": (Cell(32, 64, 45), Cell(128, 324, 112), Cell(128, 324, 312), Cell(128, 324, 312, eps=0.005)),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this benchmark."""
    parser.add_argument("--device", default="cpu", help="cpu, or a CUDA device")
    parser.add_argument("--cells", type=int, nargs="+", help="numbers of those shown for the device, from 0")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--blocks", type=int, default=10, help="alternating blocks of a cell, at least ten")
    parser.add_argument("--steps", type=int, default=1, help="steps of each arm in a block")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results")


def run(options: argparse.Namespace) -> int:
    """Measure and report."""
    device, name, clock = prepared_device(options.device, options.threads)
    cells, shown = {}, SHOWN[device.type]
    for cell in (shown[at] for at in options.cells or range(len(shown))):
        for mode in MODES:
            print(f"{cell.key}, {mode}", flush=True)
            found = measure(cell, mode, device, clock, blocks=options.blocks, steps=options.steps)
            cells[f"{cell.key}, {mode}"] = {"cell": asdict(cell), "mode": mode, "arms": found}
    used, missing = _installed()
    results = {"benchmark": "sinkhorn", "device": name, "versions": versions() | used, "missing": missing}
    results |= {"cells": cells}
    path = results_file(options.output, "sinkhorn", name)
    print(f"{write(results, markdown(results), path)}\nWrote {path.name} and its .md.")
    return 0


# --- arms


Solver = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def arms_of(cell: Cell, mode: str) -> dict[str, Solver]:
    """What makes the plans; what is not installed is left out."""
    common = {"eps": cell.eps, "num_iterations": cell.iterations}
    ours = partial(sinkhorn, **common, gradient="detached" if mode == "plan" else "implicit")
    found = {"loop": partial(reference.sinkhorn, **common), OURS: ours}
    for name, (module, _) in PACKAGES.items():
        with contextlib.suppress(ImportError):
            solve = import_module(module).solve_batch
            if name == "GeomLoss":
                found[name] = partial(_geomloss, solve, cell)
            else:
                method = "log_sinkhorn" if "log" in name else "sinkhorn"
                grad = "detach" if mode == "plan" else "autodiff"
                found[name] = partial(_pot, solve, cell, method=method, grad=grad)
    return found


def _pot(solve, cell, cost, theta, gamma, **options):
    return solve(cost, cell.eps, theta, gamma, max_iter=cell.iterations, tol=0.0, **options).plan


def _geomloss(solve, cell, cost, theta, gamma):
    return solve(cost, reg=cell.eps, a=theta, b=gamma, max_iter=cell.iterations).plan


def _installed() -> tuple[dict[str, str], list[str]]:
    used, missing = {}, []
    for package in sorted({package for _, package in PACKAGES.values()}):
        try:
            used[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    return used, missing


def inputs(cell: Cell, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Distances of unit features that have a direction in common, and marginals of a softmax."""
    generator = torch.Generator(device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=device)
    shared = draw(64)
    patches, concepts = draw(cell.images, cell.rows, 64) + shared, draw(cell.columns, 64) + shared
    patches, concepts = (t / t.norm(dim=-1, keepdim=True) for t in (patches, concepts))
    theta, gamma = draw(cell.images, cell.rows), draw(cell.images, cell.columns)
    return 1 - patches @ concepts.T, theta.softmax(1), (0.1 * gamma).softmax(1)


def measure(cell: Cell, mode: str, device: torch.device, clock: Clock, *, blocks: int, steps: int) -> dict[str, dict]:
    """All arms of a cell, as they go into the file."""
    cost, theta, gamma = inputs(cell, device)
    learns = mode != "plan"
    cost.requires_grad_(learns)

    def step(solver: Solver) -> torch.Tensor:
        with torch.set_grad_enabled(learns):
            plan = solver(cost, theta, gamma)
            return torch.autograd.grad(plan, cost, cost.detach())[0] if learns else plan

    exact = partial(reference.sinkhorn, eps=cell.eps, num_iterations=cell.iterations)
    with torch.no_grad():
        expected = exact(cost.double(), theta.double(), gamma.double())
    found = {}
    for name, solver in arms_of(cell, mode).items():
        plan = solver(cost, theta, gamma).detach()
        found[name] = {
            "differs_from_exact": ((plan - expected).norm() / expected.norm()).item(),
            "missing_in_rows": (plan.double().sum(2) - theta).abs().sum(1).mean().item(),
            "missing_in_columns": (plan.double().sum(1) - gamma).abs().sum(1).mean().item(),
            "peak_bytes": allocations(partial(step, solver), device).peak,
        }
    arms = [Arm(name, lambda: None, lambda _, s=s: step(s)) for name, s in arms_of(cell, mode).items()]
    seconds = time_in_turns(arms, clock, blocks=blocks, steps=steps)
    for name, values in seconds.items():
        found[name]["milliseconds"] = asdict(median_interval([1e3 * value for value in values]))
        ratios = [theirs / ours for theirs, ours in zip(values, seconds[OURS])]
        found[name]["times_sinkhorn"] = asdict(median_interval(ratios))
    return found


# --- report


def markdown(results: dict) -> str:
    """One line an arm of each cell."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        f"# Entropic transport, {results['device']}",
        "",
        f"{used}; fp32, {next(iter(results['cells'].values()))['cell']['iterations']} iterations. Times: arms take "
        "turns; medians of blocks with order-statistic intervals. Peak: memory above the beginning, results "
        "included. Differs: relative error of the plan against float64 after as many iterations; those of GeomLoss "
        "are others, and those of POT start elsewhere. Missing: mass of an image in rows, and in columns.",
        "",
        "| plans, and what is made | arm | ms [interval] | times sinkhorn | peak MB | differs | missing in rows "
        "| in columns |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, cell in results["cells"].items():
        for name, arm in cell["arms"].items():
            texts = [_interval(arm["milliseconds"], ".4g"), _interval(arm["times_sinkhorn"], ".3g")]
            texts[1] = "" if name == OURS else texts[1]
            texts += [f"{arm['peak_bytes'] / 1e6:.2f}"]
            texts += [f"{arm[kind]:.1e}" for kind in ("differs_from_exact", "missing_in_rows", "missing_in_columns")]
            lines.append(f"| {' | '.join((key, name, *texts))} |")
    lines += ["", *(f"- Not installed, and not measured: {package}." for package in results["missing"])]
    return "\n".join(lines).rstrip() + "\n"


def _interval(found: dict, digits: str) -> str:
    return f"{found['median']:{digits}} [{found['low']:{digits}}, {found['high']:{digits}}]"
