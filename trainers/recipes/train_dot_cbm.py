"""Train DOT-CBM (arXiv 2505.07209): classes through concepts, and for each concept the patches that spoke for it.

    accelerate launch -m trainers.recipes.train_dot_cbm --preset demo
    accelerate launch -m trainers.recipes.train_dot_cbm --preset paper --dataset_dir CUB_200_2011

| step | what happens |
|---|---|
| backbone | `--backbone`, or a small ViT that is trained here on images of the same kind; its tokens are checked |
| tokens | computed once and kept: the backbone is frozen |
| `concept` | adapters, scale and biases on the labels of the concepts, through optimal transport |
| `class` | a linear classifier on what was predicted of them |
| measures | classes in distribution and under shift, concepts, localisation, interventions, leakage |

Each stage is a Trainer run in a folder of its own; a repeated command goes on. The folder of the run ends up as a Hub
repository of an image classifier, with `results.json` and figures. `--baselines` are fitted on the same tokens.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForImageClassification, PreTrainedModel, TrainingArguments

from hf_models.dot_cbm import DotCbmForImageClassification, image_processor_for

from ..redaction import command_line
from ..report import Metric, Model, Results, collect_versions, device_name, summarise, write_results
from .arguments import RecipeTrainingArguments, parse_arguments, refuse_options
from .comparison import print_metrics, wall_seconds_so_far
from .dot_cbm_arms import LABELS, fields_of, filled
from .dot_cbm_backbone import BackboneArguments
from .dot_cbm_data import ID, ConceptDataArguments, describe_concept_data
from .dot_cbm_explanations import explanation_figures, intervention_figure
from .dot_cbm_fit import BottleneckArguments, build_bottleneck, fit_bottleneck
from .dot_cbm_measures import measure
from .dot_cbm_preparation import Prepared, prepare, record
from .dot_cbm_runs import Run
from .language_model import require_writable


@dataclasses.dataclass
class ReportArguments:
    """What is compared and shown."""

    baselines: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": f"Fitted on the same tokens: any of {', '.join(LABELS)}."}
    )
    feature_dtype: str = dataclasses.field(
        default="float32", metadata={"help": "Of the kept tokens; float16 halves them."}
    )
    explanations: int = dataclasses.field(default=10, metadata={"help": "Figures of single test images."})
    max_localised: int = dataclasses.field(default=400, metadata={"help": "Images whose heatmaps are measured."})


# Two layers of 64 instead of three of 768, and two dozen epochs instead of 200.
SMALL_BOTTLENECK = {
    "projection_dim": 64,
    "adapter_layers": 2,
    "adapter_dropout": 0.1,
    "sinkhorn_iterations": 10,
    "halve_every": 8,
    "learning_rate": 2e-3,
    "weight_decay": 1e-5,
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 100,
    "logging_steps": 25,
    "eval_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}
PRESETS: dict[str, dict[str, Any]] = {
    "demo": SMALL_BOTTLENECK
    | {
        "concept_epochs": 24,
        "class_epochs": 8,
        "baselines": ["dot", "vanilla", "linear_probe"],
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "output_dir": "runs/dot_cbm",
    },
    # The paper's: backbone, size, depth and dropout of adapters, batch, rate, halving, decay, epochs, lambdas. Ours,
    # because nothing is known: widths, eps and iterations, the read-out, all of the second stage but its being linear.
    "paper": {
        "dataset_name": "cub",
        "concept_encoder": "openai/clip-vit-large-patch14",
        "concept_prompt": "a photo of a bird with {}",
        "backbone": "facebook/dinov2-large",
        "backbone_image_size": 252,
        "feature_dtype": "float16",
        "saliency": "cls_dot",
        "concept_prior": "paper",
        "num_validation": 0,  # nothing is chosen
        "concept_epochs": 200,
        "class_epochs": 30,
        "per_device_train_batch_size": 128,
        "per_device_eval_batch_size": 32,
        "learning_rate": 1e-4,
        "weight_decay": 1e-5,
        "bf16": True,
        "logging_steps": 20,
        "eval_strategy": "no",
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "report_to": ["tensorboard"],
        "output_dir": "runs/dot_cbm-paper",
    },
}


def train(
    preset: str,
    data_args: ConceptDataArguments,
    backbone_args: BackboneArguments,
    args: BottleneckArguments,
    report_args: ReportArguments,
    training_args: TrainingArguments,
) -> Path:
    """Prepare, fit, measure, and write model, `results.json` and figures into the run folder, which is returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    for arm in report_args.baselines:
        fields_of(arm, args, {})  # an unknown one is named before the work
    require_writable(root)
    prepared = prepare(data_args, backbone_args, training_args, root, dtype=report_args.feature_dtype)
    model, runs, measured = fit_arm(prepared, args, filled({}, args, prepared.aucs), report_args, training_args, root)
    others = {
        arm: fit_arm(
            prepared, args, fields_of(arm, args, prepared.aucs), report_args, training_args, root / "baselines" / arm
        )
        for arm in report_args.baselines
    }
    state = PartialState()
    if state.is_main_process:
        difference = save_and_reload(model, prepared, root)
        figures = [intervention_figure(measured["curves"][ID], root)] if "curves" in measured else []
        if model.config.readout != "linear_probe" and report_args.explanations:
            processor = image_processor_for(model.config)
            figures += explanation_figures(
                model, processor, prepared.splits, prepared.features, root, count=report_args.explanations
            )
        results = Results(
            method="dot_cbm",
            title="DOT-CBM, a concept bottleneck that shows where it looks",
            preset=preset,
            seeds=[training_args.seed],
            command=command_line(),
            device=device_name(),
            versions=collect_versions(),
            wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
            metrics=metrics_of(measured, {arm: fitted[2] for arm, fitted in others.items()}),
            evidence=_record(args, prepared, model, runs, difference),
            data=describe_concept_data(data_args, prepared.splits),
            model=describe_classifier(model, backbone_args.backbone),
            figures=figures,
        )
        write_results(root, results)
        print_metrics(results)
    state.wait_for_everyone()
    return root


def fit_arm(
    prepared: Prepared,
    args: BottleneckArguments,
    fields: dict[str, Any],
    report_args: ReportArguments,
    training_args: TrainingArguments,
    folder: Path,
) -> tuple[DotCbmForImageClassification, dict[str, Run], dict[str, Any]]:
    """A bottleneck with these `fields`, trained in `folder` and measured."""
    seed = training_args.seed
    model = build_bottleneck(
        args,
        prepared.backbone,
        prepared.splits.train,
        prepared.embeddings,
        seed,
        image_size=prepared.image_size,
        **fields,
    )
    name = fields.get("readout", args.readout)
    runs = fit_bottleneck(
        name, model, prepared.features["train"], args, training_args, folder / "stages", key=prepared.key
    )
    measured = measure(model, prepared.splits, prepared.features, seed=seed, max_localised=report_args.max_localised)
    return model, runs, measured


@torch.no_grad()
def save_and_reload(model: DotCbmForImageClassification, prepared: Prepared, root: Path) -> float:
    """Save model and image processor as a Hub repository, load them as any user does, and return by how much the
    logits of a few test images differ from those of the cached tokens."""
    model.save_pretrained(root)
    processor = image_processor_for(model.config)
    processor.save_pretrained(root)
    loaded = AutoModelForImageClassification.from_pretrained(root).eval()
    test = prepared.splits.tests[ID].dataset
    rows = range(min(8, len(test)))
    features = prepared.features[ID].inputs(rows, with_mask=model.config.saliency == "mask")
    pixels = processor(images=test[: len(rows)]["image"], return_tensors="pt")["pixel_values"]
    mask = {name: value for name, value in features.items() if name == "foreground_mask"}
    return float((loaded(pixels, **mask).logits - model.eval()(**features).logits).abs().max())


def metrics_of(measured: dict[str, Any], baselines: dict[str, dict[str, Any]]) -> dict[str, Metric]:
    """The numbers of `measured` that a card shows, with those of `baselines` beside them."""
    numbers, others = flat(measured), {arm: flat(values) for arm, values in baselines.items()}
    metrics = {}
    for name, value in numbers.items():
        if not name.startswith(REPORTED) or name in NOT_REPORTED:
            continue
        metrics[name] = summarise(
            [value], higher_is_better=direction(name), note=NOTES.get(name, NOTES.get(name.rpartition("_")[0], ""))
        )
        metrics[name].baseline = {
            LABELS.get(arm, arm): summarise([found[name]], higher_is_better=direction(name))
            for arm, found in others.items()
            if name in found
        }
        if name.rpartition("_")[0] in ("energy_in_mask", "pointing"):
            chance = numbers[f"chance_{name.rpartition('_')[2]}"]
            metrics[name].baseline["a uniform heatmap"] = summarise([chance], higher_is_better=True)
    return metrics


REPORTED = (
    *("accuracy", "concept_auc", "concept_accuracy_id", "concept_f1_id", "pointing", "energy_in_mask", "miou"),
    *("part_ap_id", "intervention_area", "leakage_shuffled", "leakage_hard", "leakage_true", "nec", "impurity"),
)
NOT_REPORTED = ("miou_ood0", "miou_best_threshold_ood0", "concept_auc_ood30")
NOTES = {
    "energy_in_mask": "share of a heatmap's sum inside the part's mask, free of a threshold",
    "pointing": "the heatmap's peak lies in the part's mask",
    "miou": "box around what is above 0.6 of the maximum, as in the paper, against the mask's box",
    "miou_best_threshold": "the same at the threshold that is best on validating images",
    "intervention_area_random": "mean accuracy over the intervention curve",
    "intervention_area_uncertainty": "mean accuracy over the intervention curve",
    "leakage_shuffled": "accuracy with each concept dealt out anew among the images; near chance if concepts matter",
    "leakage_hard": "accuracy with each concept's probability rounded to 0 or 1",
    "leakage_true": "accuracy of the classifier on the true concepts of the classes",
    "nec": "concepts a class with a weight of at least 5 % of the largest",
    "accuracy_at_nec_5": "accuracy with the classifier cut to five concepts a class on average, without training",
}


def direction(name: str) -> bool | None:
    """Whether higher is better; None for what is only described."""
    if name.startswith(("leakage_shuffled", "nec", "chance")):
        return None
    return not name.startswith("impurity")


def flat(measured: dict[str, Any]) -> dict[str, float]:
    """The numbers of [`measure`] by one name each, the set last: `pointing_id`, `leakage_shuffled`."""
    numbers = {}
    for name, value in measured.items():
        if name.startswith("localised_"):
            numbers |= {f"{kind}_{name.removeprefix('localised_')}": number for kind, number in value.items()}
        elif name == "leakage":
            numbers |= {f"leakage_{kind}": number for kind, number in value.items() if number is not None}
        elif name != "curves":
            numbers[name] = value
    return {name: value for name, value in numbers.items() if value == value}  # without NaN


def describe_classifier(model: PreTrainedModel, backbone: str | None) -> Model:
    """Sizes of the model, of which the frozen backbone is most."""
    total, frozen = model.num_parameters(), model.model.backbone.num_parameters()
    base = backbone if backbone and backbone.count("/") == 1 and not Path(backbone).exists() else None
    return Model(
        parameters_total=total,
        parameters_active=total,
        parameters_non_embedding=total - frozen,
        base=base,
        note=f"the last of these is what was trained in both stages: all but the frozen backbone ({frozen:,})",
    )


def _record(
    args: BottleneckArguments,
    prepared: Prepared,
    model: PreTrainedModel,
    runs: dict[str, Run],
    difference: float,
) -> dict[str, Any]:
    return {
        "readout": model.config.readout,
        "saliency": model.config.saliency,
        "lambdas": {"vop": args.lambda_vop, "top": args.lambda_top, "concept": args.lambda_concept},
        "sinkhorn": {"eps": args.sinkhorn_eps, "iterations": args.sinkhorn_iterations},
        **record(prepared),
        "stages": {stage: {name: getattr(run, name) for name in _OF_A_RUN} for stage, run in runs.items()},
        "reloaded_logits_differ_by_at_most": difference,
    }


_OF_A_RUN = ("steps", "examples", "learning_rate", "train_seconds", "parameters")


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (ConceptDataArguments, BackboneArguments, BottleneckArguments, ReportArguments, RecipeTrainingArguments)
    preset, arguments = parse_arguments(types, PRESETS, argv, default_preset="demo")
    refuse_options(arguments[-1], "optimizer", because="a stage is trained by AdamW whose rate halves. Leave it out.")
    train(preset, *arguments)


if __name__ == "__main__":
    main()
