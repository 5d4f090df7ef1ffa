"""Where results stand and how they are written; measured cells of expert layers as a table and as a roofline."""

import json
import re
from pathlib import Path

from .floors import Peak
from .layers import OURS


def results_file(folder: Path, benchmark: str, device: str) -> Path:
    """The file of a benchmark's results on a device, in a folder that exists from now on."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def write(results: dict, text: str, path: Path) -> str:
    """Results as JSON and, beside them, their page; which is returned."""
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def markdown(results: dict) -> str:
    """One line an arm of each cell."""
    used = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    peak = results["peak"]
    lines = [
        f"# Expert layer on {results['device']}",
        "",
        f"{used}. Arms take turns, L2 is cold; medians of blocks with order-statistic intervals. Floors: "
        f"{peak['bandwidth'] / 1e12:g} TB/s and {peak['flops'] / 1e12:g} TFLOP/s. Decoding replays a CUDA "
        "graph. dtype is that of the parameters; `bf16 of fp32`: fp32 parameters under bf16 autocast, one forward per "
        "optimizer step, floors of bf16.",
        "",
        "| model | dtype | routing | tokens | rows mean / max | mode | layer | us [interval] | TFLOP/s | GB/s "
        "| share of floor | ours is faster by | peak MB | kept MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for key, cell in results["cells"].items():
        model, dtype, routing, tokens, mode = key.split("/")
        notes += [f"- {key}, {name}: {why}" for name, why in cell["not_measured"].items()]
        if "arms" not in cell:
            continue
        rows = cell["rows_per_expert"]
        for name, arm in cell["arms"].items():
            micro = arm["microseconds"]
            share = cell["floor_microseconds"] / micro["median"]
            if share > 1:
                notes.append(f"- {key}, {name}: below the floor, so work is missing or the peak is wrong")
            ratio = cell["speedup_over"].get(name)
            cells = [
                *(model, dtype, routing, tokens, f"{rows['mean']:.1f} / {rows['max']}", mode, name),
                f"{micro['median']:.1f} [{micro['low']:.1f}, {micro['high']:.1f}]",
                f"{cell['flops'] / micro['median'] / 1e6:.0f}",
                f"{cell['bytes'] / micro['median'] / 1e3:.0f}",
                f"{share:.0%}",
                f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else "",
                *(f"{arm[kind] / 1e6:.1f}" if arm[kind] is not None else "" for kind in ("peak_bytes", "saved_bytes")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def draw(results: dict, path: Path) -> None:
    """Operations a second over operations a byte, under the roof of the device."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peak = Peak(**results["peak"])
    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for key, cell in results["cells"].items():
        mode = key.split("/")[-1]
        for name, arm in cell.get("arms", {}).items():
            reached = cell["flops"] / (arm["microseconds"]["median"] * 1e-6)
            points.setdefault((name, mode), []).append((cell["flops"] / cell["bytes"], reached / 1e12))
    colors = {name: f"C{i}" for i, name in enumerate(sorted({name for name, _ in points}, key=lambda n: n != OURS))}
    markers = dict(zip(("inference", "forward", "backward", "both", "decode"), "o^vsx"))
    for (name, mode), values in sorted(points.items()):
        axes.scatter(*zip(*values), color=colors[name], marker=markers[mode], s=22, label=f"{name}, {mode}")
    intensities = [0.5, peak.ridge, 4 * peak.ridge]
    axes.plot(intensities, [min(i * peak.bandwidth, peak.flops) / 1e12 for i in intensities], color="black")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte (floor traffic)", ylabel="TFLOP/s")
    axes.set_title(f"Expert layer on {results['device']}")
    if points:
        axes.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
