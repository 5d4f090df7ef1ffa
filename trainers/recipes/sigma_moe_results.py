"""From finished Sigma-MoE runs to `results.json`, figures and the last screen."""

import statistics
from pathlib import Path

from transformers.utils import logging

from ..data import python_functions
from ..evaluation import Completion, NGramModel, complete_functions, parsing_share
from ..figures import balance_figure, expert_load_figure, loss_figure
from ..redaction import command_line
from ..report import (
    FigureFile,
    Metric,
    Results,
    Sample,
    collect_versions,
    device_name,
    summarise,
    write_results,
)
from .comparison import BITS
from .description import describe_data, describe_model, packing_note
from .language_model import Fit, LanguageData
from .sigma_moe_probes import read_balance, read_switch


logger = logging.get_logger(__name__)
TAIL = 0.1  # balance is read off the last tenth of a run: a single batch is noise


def describe_run(
    preset, args, data_args, training_args, data: LanguageData, fits: dict[str, Fit], model, seconds
) -> Results:
    """Measure what is left to measure, draw the figures, write `results.json` into the run folder."""
    folder = Path(training_args.output_dir)
    main = next(iter(fits.values()))
    metrics = {"held_out_bits_per_character": _quality(fits, args, data)}
    metrics |= balance_metrics(
        {name: folder if f is main else folder / "baselines" / name for name, f in fits.items()}
    )
    switch = read_switch(folder)
    if switch is not None:
        metrics |= switch_metrics([switch], [main.nats_per_token])
    metrics["train_seconds"] = Metric(
        value=main.train_seconds,
        unit="s",
        higher_is_better=False,
        note="optimizer steps in steady state; without evaluation and saving",
        baseline={name: Metric(value=f.train_seconds, unit="s") for name, f in fits.items() if f is not main},
    )
    completions = _completions(args.num_completions, model, data)
    if completions:
        metrics["completions_that_parse"] = Metric(
            value=parsing_share(completions),
            n=len(completions),
            unit="share",
            higher_is_better=True,
            note="greedy completions of held-out functions that ast.parse accepts, prompt included",
        )
    results = Results(
        method="sigma_moe",
        title="Sigma-MoE",
        preset=preset,
        seeds=[training_args.seed],
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=seconds,
        metrics=metrics,
        evidence={
            "steps": main.steps,
            "tokens": main.tokens,
            "tokens_per_step": main.tokens // main.steps,
            "learning_rate": main.learning_rate,
            "initial_top_k": args.initial_top_k,
            "switch_at": args.switch_at,
            "experts_implementation": args.experts_implementation or "transformers' default",
            "expert_parallel_size": args.expert_parallel_size,
        },
        data=describe_data(data_args, data.fingerprint, packing_note(data_args, data)),
        model=describe_model(model),
        figures=_figures(folder, fits),
        samples=[_sample(c) for c in completions[:4]],
    )
    write_results(folder, results)
    return results


def balance_metrics(folders: dict[str, Path | list[Path]]) -> dict[str, Metric]:
    """Load of layer 0 over the last tenth of each run; the first name is ours, the others are its baselines.

    Each value of `folders` is one run or the runs of several seeds. Runs without a balance log are left out. Counts
    are summed over the logged steps first: the extremes of single batches would measure noise.
    """
    readings = {
        "layer0_max_deviation": ("busiest expert of layer 0 relative to a uniform share, minus 1", False),
        "layer0_min_deviation": ("idlest expert of layer 0 relative to a uniform share, minus 1", True),
        "layer0_dead_experts": ("experts of layer 0 without a token", False),
        "layer0_load_balancing_loss": ("conventional loss of layer 0; 1 also where it is fooled", None),
    }
    runs = {name: [_tail_load(f) for f in (v if isinstance(v, list) else [v])] for name, v in folders.items()}
    runs = {name: loads for name, loads in runs.items() if None not in loads}
    metrics = {}
    for metric, (note, higher_is_better) in readings.items() if runs else ():
        values = {
            name: summarise([load[metric] for load in loads], higher_is_better=higher_is_better)
            for name, loads in runs.items()
        }
        ours, *baselines = values
        metrics[metric] = values[ours]
        metrics[metric].note = f"{note}; logged steps of the last tenth of the run, summed"
        metrics[metric].baseline = {name: values[name] for name in baselines}
    return metrics


def balance_before_switch(folders: list[Path]) -> dict[str, Metric]:
    """The same for the tenth of the run before the switch, where layer 0 still activates more experts."""
    loads = []
    for folder in folders:
        switch = read_switch(folder)
        if switch is None:
            return {}
        loads.append(_load([r for r in _layer0(folder) if 0.89 * switch["step"] < r["step"] <= switch["step"]]))
    note = "initial stage, logged steps of the last tenth before the switch, summed"
    return {
        "layer0_max_deviation_before_switch": summarise([load["layer0_max_deviation"] for load in loads], note=note),
        "layer0_min_deviation_before_switch": summarise([load["layer0_min_deviation"] for load in loads], note=note),
    }


def switch_metrics(switches: list[dict], final: list[float]) -> dict[str, Metric]:
    """Held-out loss (nats/token) of the same weights before and after the switch, and at the end of the run, over
    seeds."""
    note = "same weights, held-out blocks of the run; step " + str(switches[0]["step"])
    return {
        "loss_before_switch": summarise([s["before"] for s in switches], unit="nats/token", note=note),
        "loss_after_switch": summarise([s["after"] for s in switches], unit="nats/token", note=note),
        "loss_at_end": summarise(final, unit="nats/token", note="after the rest of the run at the target sparsity"),
    }


def _quality(fits: dict[str, Fit], args, data: LanguageData) -> Metric:
    main, *baselines = fits.values()
    baseline = {
        f.name: Metric(
            value=f.bits_per_character,
            unit=BITS,
            note=f"{f.parameters / 1e6:.1f}M parameters, {f.tokens:,} tokens, {f.train_seconds:.0f} s",
        )
        for f in baselines
    }
    if args.ngram_order:
        model = NGramModel(order=args.ngram_order).fit(row["text"] for row in data.documents["train"])
        held_out = (data.tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in data.validation)
        baseline[f"{args.ngram_order}gram"] = Metric(
            value=model.bits_per_character(held_out),
            unit=BITS,
            note="characters, all training documents, same held-out text",
        )
    return Metric(
        value=main.bits_per_character,
        unit=BITS,
        higher_is_better=False,
        note=f"{main.tokens:,} tokens, {main.train_seconds:.0f} s of optimizer steps",
        baseline=baseline,
    )


def _completions(number: int, model, data: LanguageData) -> list[Completion]:
    if not number:
        return []
    try:
        functions = python_functions(data.documents["validation"])
    except ValueError as error:  # at the end of a long run on prose, no reason to lose its results
        logger.warning(f"No completions: {error}")
        return []
    # Not the tokenizer's limit: one that was not trained here may have none.
    budget = model.config.max_position_embeddings - 96
    prompts = list(functions["prompt"])
    lengths = map(len, data.tokenizer(prompts, verbose=False).input_ids)
    prompts = [prompt for prompt, length in zip(prompts, lengths) if length <= budget]
    chosen = prompts[:: max(1, len(prompts) // number)][:number]
    return complete_functions(model, data.tokenizer, chosen)


def _sample(completion: Completion) -> Sample:
    return Sample(
        prompt=completion.prompt,
        completion=completion.completion,
        note="parses" if completion.parses else "does not parse",
    )


def _figures(folder: Path, fits: dict[str, Fit]) -> list[FigureFile]:
    main, *others = fits.values()
    figures = []
    history = read_balance(folder)
    if history:
        baseline = read_balance(folder / "baselines" / "lbl_top1") or None
        balance_figure(history, folder / "figures" / "balance.png", baseline=baseline, label=main.name)
        caption = "Load of the busiest and the idlest expert of each layer while training."
        figures.append(FigureFile(path="figures/balance.png", caption=caption))
        last = max(row["step"] for row in history)
        fractions = [row["f"] for row in sorted(history, key=lambda r: r["layer"]) if row["step"] == last]
        expert_load_figure(fractions, folder / "figures" / "expert_load.png")
        figures.append(
            FigureFile(path="figures/expert_load.png", caption="Share of tokens of each expert at the end.")
        )
    # The evaluation loss that transformers' Qwen3-MoE reports includes its balance loss: not comparable.
    curves = {f.name: f.curve() for f in fits.values() if f.curve()[0] and f.name != "qwen3_moe"}
    if curves:
        loss_figure(curves, folder / "figures" / "loss.png")
        figures.append(FigureFile(path="figures/loss.png", caption="Held-out loss against training tokens."))
    return figures


def _layer0(folder: Path) -> list[dict]:
    return [row for row in read_balance(folder) if row["layer"] == 0]


def _tail_load(folder: Path) -> dict[str, float] | None:
    rows = _layer0(folder)
    return _load(rows[-max(1, round(TAIL * len(rows))) :]) if rows else None


def _load(rows: list[dict]) -> dict[str, float]:
    """Readings of the experts' shares averaged over rows; every logged step has the same number of tokens."""
    shares = [statistics.fmean(column) for column in zip(*(row["f"] for row in rows))]
    return {
        "layer0_max_deviation": max(shares) * len(shares) - 1,
        "layer0_min_deviation": min(shares) * len(shares) - 1,
        "layer0_dead_experts": sum(share == 0 for share in shares),
        "layer0_load_balancing_loss": statistics.fmean(row["load_balancing_loss"] for row in rows),
    }


def final_screen(folder: Path, results: Results) -> str:
    """What was made, where it is, how good it is, and what to type next."""
    quality = results.metrics["held_out_bits_per_character"]
    lines = ["", f"Sigma-MoE is trained: {folder}/", ""]
    lines += [
        f"  {results.model.parameters_total / 1e6:.1f}M parameters, {results.model.parameters_active / 1e6:.2f}M "
        "active"
    ]
    lines += ["", f"  held-out {BITS} (lower is better)"]
    rows = {"sigma_moe": quality} | quality.baseline
    width = max(map(len, rows))
    lines += [f"    {name:<{width}}  {row.value:.3f}   {row.note}" for name, row in rows.items()]
    deviation = results.metrics.get("layer0_max_deviation")
    if deviation is not None:
        lines += ["", "  busiest expert of layer 0, above a uniform share"]
        lines += [
            f"    {n:<{width}}  {v.value:+.0%}" for n, v in ({"sigma_moe": deviation} | deviation.baseline).items()
        ]
    if "completions_that_parse" in results.metrics:
        parsed = results.metrics["completions_that_parse"]
        lines += ["", f"  {parsed.value:.0%} of {parsed.n} completed held-out functions parse"]
    complete = (
        'python -c "import hf_models, transformers as t; '
        f"print(t.pipeline('text-generation', '{folder}')('def read(path):')[0]['generated_text'])\""
    )
    lines += [
        "",
        f"  model, tokenizer, code   {folder}/",
        f"  measurements             {folder}/results.json",
        f"  figures                  {folder}/figures/",
        "",
        "Next:",
        f"  python -m model_cards.build {folder}      # its model card",
        f"  {complete}",
        f"  python -m model_cards.publish {folder} --repo-id YOUR_NAME/sigma-moe-demo      # after `hf auth login`",
        "",
    ]
    return "\n".join(lines)
