"""Is this machine fit to train? `python -m trainers.reliability.preflight [--full]`, before the launch.

Quick: devices, free memory and disk, a bf16 GEMM against float64, memory bandwidth, an all-reduce between the
processes of a launcher (`accelerate launch -m trainers.reliability.preflight`), or, without one, between processes
started here. `--full` adds ten training steps of a small MoE on the device against the same steps in float64 with the
plainest code. Two gates each: cosine similarity of at least 0.99 (the alarm of the SIGMA stack, arXiv 2512.13488), and
a bound on the relative error of the norm, since a cosine ignores scale (our proposal).

Exit code 0, or 17 if a check failed (Megatron's "failed validation"); `--json` prints the checks for programs.
"""

import argparse
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ..report import device_name
from .signs import EXIT_FAILED_VALIDATION


MIN_COSINE = 0.99
GIB = 2**30


@dataclass(kw_only=True)
class Check:
    """One line of the table. `value` and `limit` in `unit`; a limit of `None`: reported, never failed."""

    name: str
    value: float
    unit: str = ""
    limit: float | None = None
    passed: bool = True
    note: str = ""
    rank: int = 0


def at_least(name: str, value: float, limit: float | None, *, unit: str = "", note: str = "") -> Check:
    """A check that fails below `limit`, and on NaN."""
    passed = limit is None or value >= limit
    return Check(name=name, value=float(value), unit=unit, limit=limit, passed=bool(passed), note=note)


def similarity(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Cosine in float64, and |norm(actual) / norm(expected) - 1|. Two tensors of zeros are the same."""
    a, b = actual.detach().double().flatten().cpu(), expected.detach().double().flatten().cpu()
    norms = a.norm().item(), b.norm().item()
    if norms == (0.0, 0.0):
        return 1.0, 0.0
    if 0.0 in norms:
        return 0.0, float("inf")
    return (a @ b).item() / (norms[0] * norms[1]), abs(norms[0] / norms[1] - 1)


def check_devices(expected: int | None) -> list[Check]:
    """Number of CUDA devices (of CPUs as 1 device, where there are none)."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 1
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: the CPU"
    return [at_least("devices", count, expected, note=kind)]


def check_space(folder: Path, device: torch.device, *, min_memory: float, min_disk: float) -> list[Check]:
    """Free memory of the host and of the device, free disk of `folder`, as fractions of the whole."""
    host, disk = psutil.virtual_memory(), shutil.disk_usage(folder)
    checks = [
        at_least(
            "free host memory", host.available / host.total, min_memory, note=f"{host.available / GIB:.1f} GiB free"
        ),
        at_least("free disk", disk.free / disk.total, min_disk, note=f"{disk.free / GIB:.1f} GiB free"),
    ]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        # Somebody else's process, or one of an earlier run, holds the rest.
        checks.append(at_least("free device memory", free / total, 0.9, note=f"{free / GIB:.1f} GiB free"))
    return checks


def check_gemm(device: torch.device, size: int | None = None) -> list[Check]:
    """bf16 matrix product of `size` x `size` against float64 on the host: every row of the device's result is summed
    into the check through a random vector, and 64 rows are compared in full."""
    size = size or (4096 if device.type == "cuda" else 512)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator).bfloat16() for _ in range(2))
    product = a.to(device) @ b.to(device)
    rows = torch.randperm(size, generator=generator)[:64]
    cosine, error = similarity(product[rows.to(device)], a[rows].double() @ b.double())
    vector = torch.randn(size, generator=generator, dtype=torch.float64)
    all_rows = product.double().cpu() @ vector, a.double() @ (b.double() @ vector)
    whole, _ = similarity(*all_rows)
    value = min(cosine, whole) if error < 0.01 else 0.0
    return [at_least("bf16 GEMM cosine", value, MIN_COSINE, note=f"{size} x {size}, norm off by {error:.1e}")]


def check_bandwidth(device: torch.device, min_bandwidth: float | None) -> list[Check]:
    """GB/s of copying a tensor inside the device's memory (read and write), best of five."""
    size = 2**30 if device.type == "cuda" else 2**26
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    seconds = min(_timed(lambda: target.copy_(source), device) for _ in range(5))
    intact = torch.equal(source, target)
    value = 2 * size / seconds / 1e9 if intact else float("nan")
    note = f"copy of {size / GIB:g} GiB" if intact else "the copy differs from its source"
    return [at_least("memory bandwidth", value, min_bandwidth if intact else 0.0, unit="GB/s", note=note)]


def check_all_reduce(device: torch.device, min_bandwidth: float | None) -> list[Check]:
    """A sum over all ranks against arithmetic, exactly; and the bus bandwidth, 2 (n - 1) / n * bytes / seconds."""
    world, rank = dist.get_world_size(), dist.get_rank()
    pattern = torch.arange(2**22 if device.type == "cuda" else 2**20, device=device).remainder(97)
    total = pattern * (rank + 1)
    dist.all_reduce(total)
    right = torch.equal(total, pattern * (world * (world + 1) // 2))
    payload = torch.ones(2**26 if device.type == "cuda" else 2**20, device=device)
    dist.barrier()
    seconds = min(_timed(lambda: dist.all_reduce(payload), device) for _ in range(5))
    bandwidth = 2 * (world - 1) / world * payload.numel() * 4 / seconds / 1e9
    return [
        at_least("all-reduce correct", float(right), 1.0, note=f"{world} ranks, {dist.get_backend()}"),
        at_least("all-reduce bandwidth", bandwidth, min_bandwidth, unit="GB/s"),
    ]


def check_training(device: torch.device, steps: int = 10) -> list[Check]:
    """`steps` Adam steps (lr 1e-3, no clipping) of a small Sigma-MoE in float32 with the backends that training uses,
    against float64, eager attention and eager experts on the host: logits and gradients of the first step and what the
    weights changed by over all steps. Inputs and weights are the same in both."""
    reference = _train_small(torch.device("cpu"), torch.float64, steps, "eager")
    actual = _train_small(device, torch.float32, steps, None)
    checks = []
    for name in reference:
        worst, where, error = 2.0, "", 0.0
        for key, expected in reference[name].items():
            cosine, off = similarity(actual[name][key], expected)
            error = max(error, off)
            if not cosine >= worst:  # NaN is the worst
                worst, where = cosine, key
        note = f"lowest of {len(reference[name])}: {where}; norms off by {error:.1e} at most"
        value = worst if error < 0.02 else 0.0
        checks.append(at_least(f"MoE, {steps} steps: {name}", value, MIN_COSINE, note=note))
    return checks


def _train_small(device: torch.device, dtype: torch.dtype, steps: int, backend: str | None) -> dict[str, dict]:
    from hf_models.moe import SigmaMoeConfig, SigmaMoeForCausalLM

    config = SigmaMoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(42)
        model = SigmaMoeForCausalLM(config)
    if backend is not None:
        model.set_attn_implementation(backend)
        model.set_experts_implementation(backend)
    model.to(device=device, dtype=dtype).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(42)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen: dict[str, dict] = {}
    for step in range(steps):
        ids = torch.randint(0, config.vocab_size, (2, 32), generator=generator).to(device)
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        if step == 0:
            seen["logits"] = {"logits": output.logits.detach().clone()}
            seen["gradients"] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return seen | {"weight changes": {n: p.detach() - before[n] for n, p in model.named_parameters()}}


def _timed(action: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def run_checks(args: argparse.Namespace, device: torch.device) -> list[Check]:
    """Everything that a process can find out alone. A check that raises is a failed one."""
    checks = [
        ("devices", lambda: check_devices(args.devices)),
        (
            "space",
            lambda: check_space(args.folder, device, min_memory=args.min_free_memory, min_disk=args.min_free_disk),
        ),
        ("bf16 GEMM cosine", lambda: check_gemm(device)),
        ("memory bandwidth", lambda: check_bandwidth(device, args.min_bandwidth)),
    ]
    if args.full:
        checks.append(("MoE training", lambda: check_training(device)))
    return [check for name, action in checks for check in _guarded(name, action)]


def _guarded(name: str, action: Callable[[], list[Check]]) -> list[Check]:
    try:
        return action()
    except Exception as error:  # a broken device fails in its own ways: the others are still to be told
        note = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return [Check(name=name, value=float("nan"), passed=False, note=note)]


def _rank_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _connected(args: argparse.Namespace, rank: int, world: int, local_rank: int, address: str) -> list[Check]:
    """All checks of one rank of a group; every rank returns those of all."""
    device = _rank_device(local_rank)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend, init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=args.timeout)
    )
    try:
        checks = run_checks(args, device)
        checks += _guarded("all-reduce", lambda: check_all_reduce(device, args.min_all_reduce))
        for check in checks:
            check.rank = rank
        everyone: list[list[Check]] = [[] for _ in range(world)]
        dist.all_gather_object(everyone, checks)
    finally:
        dist.destroy_process_group()
    return [check for each in everyone for check in each]


def _spawned(rank: int, args: argparse.Namespace, world: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    checks = _connected(args, rank, world, rank, rendezvous)
    if rank == 0:
        Path(out).write_text(json.dumps([asdict(check) for check in checks]), encoding="utf-8")


def _spawn(args: argparse.Namespace, world: int) -> list[Check]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "checks.json"
        try:
            mp.spawn(_spawned, (args, world, f"file://{folder}/rendezvous", str(out)), nprocs=world)
        except Exception as error:
            note = f"{type(error).__name__}: {str(error).strip().splitlines()[-1]}"
            return [Check(name="all-reduce", value=float("nan"), passed=False, note=note)]
        return [Check(**values) for values in json.loads(out.read_text(encoding="utf-8"))]


def summarise(checks: list[Check]) -> list[Check]:
    """One check a name: the worst over ranks, failed ones first."""
    worst: dict[str, Check] = {}
    for check in checks:
        known = worst.get(check.name)
        if known is None or (check.passed, check.value) < (known.passed, known.value):
            worst[check.name] = check
    return list(worst.values())


def render(checks: list[Check], *, several_ranks: bool) -> str:
    """The table for people."""
    rows = [("check", "value", "limit", "", "note")]
    for check in checks:
        note = f"rank {check.rank}: {check.note}" if several_ranks else check.note
        limit = "" if check.limit is None else f">= {check.limit:g}"
        rows.append(
            (check.name, f"{check.value:.4g} {check.unit}".strip(), limit, ("FAILED", "ok")[check.passed], note)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join([*(cell.ljust(w) for cell, w in zip(row, widths)), row[4]]).rstrip() for row in rows]
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m trainers.reliability.preflight", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--full", action="store_true", help="also train a small MoE for ten steps")
    parser.add_argument("--json", action="store_true", help="print the checks of every rank as JSON")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the run will write")
    parser.add_argument("--devices", type=int, help="how many devices this machine must have")
    parser.add_argument(
        "--processes",
        type=int,
        help="processes of the all-reduce without a launcher; default: one a device, 2 on CPUs",
    )
    parser.add_argument("--min_free_memory", type=float, default=0.05, help="of the host, as a fraction")
    parser.add_argument("--min_free_disk", type=float, default=0.05, help="fraction; the paper's alarm is at 0.2")
    parser.add_argument("--min_bandwidth", type=float, help="of memory, GB/s; default: only reported")
    parser.add_argument("--min_all_reduce", type=float, help="bus bandwidth, GB/s; default: only reported")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a collective may take")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command-line entry; the exit code: 0, or 17 for a machine that is not fit."""
    args = _parse(argv)
    rank = 0
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:  # under a launcher
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        checks = _connected(args, rank, world, int(os.environ.get("LOCAL_RANK", "0")), "env://")
    else:
        world = args.processes or (torch.cuda.device_count() if torch.cuda.is_available() else 2)
        checks = _spawn(args, world) if world > 1 else run_checks(args, _rank_device(0))
    failed = [check for check in checks if not check.passed]
    if rank == 0:
        if args.json:
            shown = {"host": socket.gethostname(), "device": device_name(), "passed": not failed}
            rows = [{**asdict(c), "value": c.value if c.value == c.value else "nan"} for c in checks]
            print(json.dumps({**shown, "checks": rows}, indent=1))
        else:
            print(f"{socket.gethostname()}: {device_name()}, {world} processes")
            print(render(summarise(checks), several_ranks=world > 1))
            print("FAILED: do not train here." if failed else "All checks passed.")
    return EXIT_FAILED_VALIDATION if failed else 0


if __name__ == "__main__":
    sys.exit(main())
