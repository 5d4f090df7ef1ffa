"""What can be said of the kernels without a GPU: what they compile to, their floors, and what they keep."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..compile_report import ARCHS, MODELS
from .floors import PEAKS, Load


MODES = ("inference", "forward", "backward", "both")
NOT_MEASURED = (
    "There is no GPU here: no time, no peak memory and no comparison of speed was measured. Floors are computed; the "
    "numbers kept for the backward were counted at small shapes, with our kernels interpreted."
)


def write(folder: Path, tokens: Iterable[int], *, jobs: int) -> None:
    """Write `compile-sm_*.json`/`.md` and `experts-offline.json`/`.md` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for arch in ARCHS:
        print(f"compiling for sm_{arch}", flush=True)
        path = folder / f"compile-sm_{arch}.json"
        arguments = ["--arch", str(arch), "--jobs", str(jobs), "--json", str(path)]
        text = _python("sigma_kernels.compile_report", *arguments, allowed=(0, 1), interpret=False)
        path.with_suffix(".md").write_text(text, encoding="utf-8")
    saved = json.loads(_python("sigma_kernels.benchmarks", "saved", interpret=True))
    results = {"floors": list(floors(tokens)), "peak": {n: asdict(p) for n, p in PEAKS.items()}, "saved": saved}
    path = folder / "experts-offline.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(_markdown(results), encoding="utf-8")
    print(f"{NOT_MEASURED}\nWrote compile-sm_*.json, {path.name} and their .md.")


def _python(module: str, *arguments: str, interpret: bool, allowed: tuple[int, ...] = (0,)) -> str:
    """Output of `python -m module`; whether Triton interprets is decided when a process starts."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode not in allowed:
        raise RuntimeError(f"python -m {module} {' '.join(arguments)} failed with status {done.returncode}.")
    return done.stdout


def floors(tokens: Iterable[int]) -> Iterable[dict]:
    """Floors in microseconds with uniform routing, by model, tokens and known GPU."""
    for name, model in MODELS.items():
        for count in tokens:
            # How many experts so many uniform draws hit, on average.
            active = model.experts * (1 - (1 - model.slots / model.experts) ** count)
            load = Load(count, model.slots, model.experts, round(active), model.hidden, model.inner)
            for gpu, peak in PEAKS.items():
                yield {
                    "model": name,
                    "tokens": count,
                    "rows_per_expert": load.pairs / load.experts,
                    "gpu": gpu,
                    "bound": {
                        mode: "compute" if load.work(mode).flops > peak.ridge * load.work(mode).bytes else "memory"
                        for mode in MODES
                    },
                    "microseconds": {mode: round(1e6 * load.work(mode).seconds(peak), 1) for mode in MODES},
                }


def _markdown(results: dict) -> str:
    lines = [
        "# Expert layer, without a GPU",
        "",
        NOT_MEASURED,
        "",
        "## Floors",
        "",
        "The least time in microseconds, bf16, uniform routing; c: bound by compute, otherwise by memory. H200: "
        "4.3 TB/s and 790 TFLOP/s, what copies and large products reach.",
        "",
        "| model | tokens | rows per expert | " + " | ".join(MODES) + " |",
        "|---|---|---|" + "---|" * len(MODES),
    ]
    for row in results["floors"]:
        times = [f"{row['microseconds'][mode]}{' c' if row['bound'][mode] == 'compute' else ''}" for mode in MODES]
        lines.append(f"| {row['model']} | {row['tokens']} | {row['rows_per_expert']:.1f} | {' | '.join(times)} |")
    lines += [
        "",
        "## Kept for the backward",
        "",
        "Numbers of bf16 size per (token, slot) pair, beyond inputs and weights, with all index tensors.",
        "",
        "| K | H | I | 2 I | 2 H + 4 I | " + " | ".join(results["saved"][0]["numbers_per_pair"]) + " |",
        "|---|---|---|---|---|" + "---|" * len(results["saved"][0]["numbers_per_pair"]),
    ]
    for row in results["saved"]:
        kept = " | ".join(f"{value:.1f}" for value in row["numbers_per_pair"].values())
        slots, hidden, inner = row["slots"], row["hidden"], row["inner"]
        lines.append(f"| {slots} | {hidden} | {inner} | {2 * inner} | {2 * hidden + 4 * inner} | {kept} |")
    return "\n".join(lines) + "\n"
