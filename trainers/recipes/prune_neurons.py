"""What the neurons of a trained mixture are worth: held-out loss as they are left out, without any training.

    python -m trainers.recipes.prune_neurons --model runs/demo --output_dir runs/pruned
    python -m trainers.recipes.prune_neurons --model allenai/OLMoE-1B-7B-0924 --dataset_name FOLDER_OR_HUB_ID

The sparsification study of MoNE (arXiv 2510.05781), on any model that `MoneForCausalLM.from_moe` takes: Sigma-MoE,
Qwen2/3-MoE, OLMoE, Mixtral, DeepSeek-V2/V3, and dense SwiGLU models. Writes `curve.json` and `curve.png`.
"""

import dataclasses
import json
from pathlib import Path

from transformers import TrainingArguments

from hf_models.moe import MoneForCausalLM

from ..evaluation import NeuronPoint, evaluate_neuron_ratios
from ..figures import loss_figure
from ..redaction import command_line
from ..report import collect_versions, write_text_atomically
from .arguments import DataArguments, parse_arguments
from .language_model import prepare_language_data, require_writable


@dataclasses.dataclass
class PruneArguments:
    """The model, and how much of it is left out."""

    model: str = dataclasses.field(metadata={"help": "Folder or Hub id of a causal language model."})
    output_dir: str = "runs/pruned"
    batch_size: int = 16
    pruned_shares: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
    neuron_select_on: str = dataclasses.field(default="abs_act", metadata={"help": "See MoneConfig."})


PRESETS = {"default": {"max_eval_blocks": 128}}


def prune(args: PruneArguments, data_args: DataArguments) -> list[NeuronPoint]:
    """Measure the curve and write it into `args.output_dir`."""
    folder = Path(args.output_dir)
    require_writable(folder)
    if data_args.tokenizer_name is None:
        data_args = dataclasses.replace(data_args, tokenizer_name=args.model)
    data = prepare_language_data(data_args, TrainingArguments(output_dir=str(folder), report_to="none"))
    model = MoneForCausalLM.from_moe(
        args.model, neuron_ratio=1.0, config_overrides={"neuron_select_on": args.neuron_select_on}
    )
    ratios = [1 - share for share in args.pruned_shares]
    points = evaluate_neuron_ratios(model, data.validation, data.tokenizer, ratios, batch_size=args.batch_size)
    content = {
        "model": Path(args.model).name if Path(args.model).is_absolute() else args.model,  # no path of this machine
        "command": command_line(),
        "versions": collect_versions(),
        "data": data.fingerprint,
        "neuron_select_on": args.neuron_select_on,
        "points": [dataclasses.asdict(point) for point in points],
    }
    write_text_atomically(folder / "curve.json", json.dumps(content, indent=1) + "\n")
    losses = [point.loss.bits_per_character for point in points]
    x_label = "share of each expert's neurons left out"
    loss_figure(
        {args.neuron_select_on: (args.pruned_shares, losses)},
        folder / "curve.png",
        x_label=x_label,
        y_label="held-out bits/character",
    )
    return points


def table(points: list[NeuronPoint]) -> str:
    """The curve in Markdown."""
    lines = ["| neurons used | of an expert's parameters | nats/token | bits/character |", "|---:|---:|---:|---:|"]
    for point in points:
        lines.append(
            f"| {point.ratio:.0%} | {point.active_expert_share:.0%} | {point.loss.nats_per_token:.4f} "
            f"| {point.loss.bits_per_character:.4f} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    _, (args, data_args) = parse_arguments((PruneArguments, DataArguments), PRESETS, argv, default_preset="default")
    print(table(prune(args, data_args)))


if __name__ == "__main__":
    main()
