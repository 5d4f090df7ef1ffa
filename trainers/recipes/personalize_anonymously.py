"""Personalise a cloud model without user identifiers (arXiv 2501.06062): what it gains, and what it betrays.

    python -m trainers.recipes.personalize_anonymously --preset demo
    python -m trainers.recipes.personalize_anonymously --preset evidence
    python -m trainers.recipes.personalize_anonymously --preset paper --dataset_name MINE.csv

Each device keeps a distribution over embeddings and sends a fresh draw with every text. The designs of the paper
(Gaussian, Beta) and ours (a shared mixture) are compared with a model without users, with fine-tuning on each device,
and with a static embedding, which is an identifier; see `anonymous_arms`. Beside every accuracy stands how often an
attacker who knows all distributions names an upload's user; every training text is uploaded once, with one draw. Draws
come from a seed here: this is a simulation. A repeated command goes on after the last run that was finished, and
refuses a folder that other settings or other data have filled.
"""

import dataclasses
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, TrainingArguments

from hf_models.personal_lm import PersonalLmConfig, UserDistribution
from hf_models.personal_lm.user_distribution import DESIGN_FILE

from ..redaction import command_line
from ..report import Model, Results, collect_versions, device_name, write_results
from .anonymous_arms import arm_folder, run_arm
from .anonymous_data import PersonalData, review_data, speech_data, table_data
from .anonymous_results import against_on_device, entropy_record, study_metrics, study_record, tradeoff_figure
from .anonymous_study import ArmFit, DesignArguments, OtherSettingsError, Study, build_model, parse_arm
from .arguments import RecipeTrainingArguments, parse_arguments
from .comparison import print_metrics, wall_seconds_so_far
from .language_model import require_writable


# A user's embedding takes one position more than the text.
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "tiny": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
    "small": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 96},
}


@dataclasses.dataclass
class AnonymousArguments:
    """What is compared on which data. `max_steps` is that of stage 3, `learning_rates` its grid."""

    dataset_name: str = dataclasses.field(
        default="biased-reviews",
        metadata={
            "help": "biased-reviews, shakespeare-characters, or a CSV, JSON or Parquet file: text, label, user."
        },
    )
    dataset_license: str = dataclasses.field(default="unknown", metadata={"help": "SPDX, of a file of yours."})
    dataset_language: str = "en"
    dataset_cache_dir: str | None = None
    tokenizer_name: str = dataclasses.field(default="openai-community/gpt2", metadata={"help": "For a file of yours."})
    users: int = dataclasses.field(default=40, metadata={"help": "Of the first two data sets."})
    shape: str = dataclasses.field(default="tiny", metadata={"help": f"One of {', '.join(SHAPES)}; GPT-2 models."})
    arms: list[str] = dataclasses.field(default_factory=lambda: ["mixture_k5", "central", "static", "gaussian_r2"])
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    learning_rates: list[float] = dataclasses.field(default_factory=lambda: [2e-3])
    stage1_steps: int = 300
    stage1_learning_rate: float = 2e-3
    speech_arms: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Arms of a second study, on Shakespeare's characters; none, no study."}
    )
    speech_seeds: list[int] = dataclasses.field(default_factory=lambda: [0])
    speech_shape: str = "small"
    speech_stage1_steps: int = 600
    speech_steps: int = 300
    note: str = dataclasses.field(
        default="", metadata={"help": "What was changed after results were seen, for the record."}
    )


SMALL_RUN = {
    "per_device_train_batch_size": 64,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.05,
    "weight_decay": 0.05,
    "max_grad_norm": 5.0,
    "logging_steps": 100,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
# Compared like with like: fitted on the stage-1 model, or (`reader`, `mixture_k`) on the volunteers' model.
ALL_ARMS = [
    *("mixture_k5", "central", "on_device", "static", "gaussian_r1", "gaussian_r2", "gaussian_free", "beta_80"),
    *("gaussian_r2_reader", "beta_80_reader", "mixture_k16", "mixture_k5_random"),
]
PRESETS = {
    "demo": SMALL_RUN | {"max_steps": 400, "output_dir": "runs/anonymous_user_embeddings"},
    # Fixed before any of its results was seen. Shakespeare's characters (`speech_arms`) are not in it: hours on two
    # cores.
    "evidence": SMALL_RUN
    | {
        "arms": ALL_ARMS,
        "seeds": [0, 1, 2],
        "learning_rates": [1e-3, 3e-3],
        "stage1_steps": 300,
        "max_steps": 300,
        "device_steps": 100,
        "note": "Results were seen of an earlier comparison in which a text was drawn for in every epoch: 400 steps, "
        "150 of stage 2, rates on the device up to 5e-4. Since then a text is drawn for once, alternating mixtures "
        "upload it once, volunteers are counted apart, designs fitted on the volunteers' model are compared too, the "
        "device may choose 2e-3, and there are fewer steps and arms, to save time.",
        "output_dir": "runs/anonymous_user_embeddings_evidence",
    },
    # Of the authors' code: shapes, batches, rates, decay, clipping, warm-ups, sigma and mean. Not known: the rates of
    # stage 2 in the paper's runs, and how many steps 10 epochs were; here the rate decays behind its warm-up.
    "paper": {
        "shape": "gpt2",
        "arms": ["gaussian_free", "central", "on_device", "static", "beta_250"],
        "learning_rates": [5e-5],
        "stage1_steps": 4000,
        "stage1_learning_rate": 5e-5,
        "initial_mean": 0.1,
        "device_learning_rate": 5e-5,
        "beta_learning_rate": 5e-5,
        "device_steps": 250,
        "device_warmup_steps": 100,
        "alone_steps": 250,
        "alone_learning_rates": [5e-5],
        "max_steps": 4000,
        "per_device_train_batch_size": 100,
        "gradient_accumulation_steps": 10,
        "weight_decay": 0.05,
        "max_grad_norm": 5.0,
        "warmup_steps": 1000,
        "lr_scheduler_type": "linear",
        "bf16": True,
        "logging_steps": 50,
        "report_to": ["tensorboard"],
        "output_dir": "runs/anonymous_user_embeddings-paper",
    },
}


def base_config(shape: str, data: PersonalData | None) -> dict[str, Any]:
    """The GPT-2 of a shape with the tokenizer's vocabulary. `ValueError` for an unknown shape."""
    if shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is not known. Choose from {', '.join(SHAPES)}.")
    fields = {"model_type": "gpt2"} | SHAPES[shape]
    if data is None:
        return fields
    pad = data.tokenizer.pad_token_id
    if shape != "gpt2":
        fields |= {"vocab_size": len(data.tokenizer), "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        fields |= {"bos_token_id": pad, "eos_token_id": pad}
    return fields | {"pad_token_id": pad}


def load_data(args: AnonymousArguments, seed: int) -> PersonalData:
    """The data set of the study; the generated one differs with the seed."""
    if args.dataset_name == "biased-reviews":
        return review_data(args.users, seed)
    if args.dataset_name == "shakespeare-characters":
        return speech_data(args.users, cache_dir=args.dataset_cache_dir)
    described = {"license": args.dataset_license, "language": args.dataset_language}
    return table_data(args.dataset_name, args.tokenizer_name, max_length=512, **described)


def run_study(
    study_of: Any, arms: list[str], seeds: list[int], learning_rates: list[float], alone_rates: list[float]
) -> dict[str, list[ArmFit]]:
    """Every arm on every seed, at the rate that validates best on the first. `study_of(seed)` is the study."""
    fits: dict[str, list[ArmFit]] = {}
    for arm in arms:
        grid = alone_rates if arm == "on_device" else learning_rates
        trials = [run_arm(study_of(seeds[0]), arm, seeds[0], rate) for rate in grid]
        best = max(trials, key=lambda fit: fit.validation)
        fits[arm] = [best, *(run_arm(study_of(seed), arm, seed, best.learning_rate) for seed in seeds[1:])]
        shown = ", ".join(f"{fit.accuracy:.3f} ({fit.privacy['attribution']:.3f})" for fit in fits[arm])
        print(f"{arm}: accuracy (attribution) {shown}", flush=True)
    return fits


def compare(
    preset: str, args: AnonymousArguments, designs: DesignArguments, training_args: TrainingArguments
) -> Results:
    """Run what is missing and write model, `results.json` and figures into the folder of the run."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    require_writable(root)
    for arm in (*args.arms, *args.speech_arms):
        parse_arm(arm)
    data = {seed: load_data(args, seed) for seed in args.seeds}
    main = partial(_study, "main", root, data, args.shape, args.stage1_steps, training_args.max_steps)
    main = partial(main, args=args, designs=designs, training_args=training_args)
    fits = run_study(main, args.arms, args.seeds, args.learning_rates, designs.alone_learning_rates)
    first = data[args.seeds[0]]
    metrics, record = study_metrics(fits), {"main": study_record(fits), "against_on_device": against_on_device(fits)}
    figures = [tradeoff_figure(fits, root, "tradeoff.png", "accuracy")]
    if first.num_labels:
        record["accuracy_by_dependence_on_the_user"] = entropy_record(fits, first.num_labels)
    if args.speech_arms:
        speech = speech_data(args.users, cache_dir=args.dataset_cache_dir)
        lines = dict.fromkeys(args.speech_seeds, speech)
        other = partial(
            _study, "shakespeare", root, lines, args.speech_shape, args.speech_stage1_steps, args.speech_steps
        )
        other = partial(other, args=args, designs=designs, training_args=training_args)
        spoken = run_study(
            other, args.speech_arms, args.speech_seeds, args.learning_rates, designs.alone_learning_rates
        )
        metrics |= study_metrics(spoken, "shakespeare_")
        record["shakespeare"] = study_record(spoken) | {"data": dataclasses.asdict(speech.description)}
        what = "accuracy of the next character"
        figures.append(tradeoff_figure(spoken, root, "tradeoff_shakespeare.png", what))
    model, record["published"] = _publish(root, args, fits, first)
    results = Results(
        method="anonymous_user_embeddings",
        title="Personalisation without user identifiers",
        preset=preset,
        seeds=args.seeds,
        command=command_line(),
        device=device_name(),
        versions=collect_versions(),
        wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
        metrics=metrics,
        evidence=_plan(args, designs, training_args) | record,
        data=first.description,
        model=model,
        figures=figures,
    )
    write_results(root, results)
    print_metrics(results)
    return results


def _study(name, root, data, shape, stage1_steps, steps, seed, *, args, designs, training_args) -> Study:
    return Study(
        name=name,
        root=root,
        data=data[seed],
        base=base_config(shape, data[seed]),
        designs=designs,
        training_args=training_args,
        stage1_steps=stage1_steps,
        stage1_learning_rate=args.stage1_learning_rate,
        steps=steps,
    )


def _publish(
    root: Path, args: AnonymousArguments, fits: dict[str, list[ArmFit]], data: PersonalData
) -> tuple[Model, dict[str, Any]]:
    """Put the model of the first arm that has one, first seed, into the folder, and the public design of its users: a
    Hub repository without anybody's distribution."""
    arm = next((arm for arm in args.arms if arm != "on_device"), None)
    seed, design = args.seeds[0], None
    model = build_model(data, base_config(args.shape, data), seed)
    (root / DESIGN_FILE).unlink(missing_ok=True)
    if arm is not None:
        folder = arm_folder(root, "main", arm, seed, fits[arm][0].learning_rate)
        model = type(model).from_pretrained(folder)
        if (folder / DESIGN_FILE).exists():
            shutil.copyfile(folder / DESIGN_FILE, root / DESIGN_FILE)
            design = UserDistribution.from_design(root / DESIGN_FILE).config.design
    model.save_pretrained(root)
    data.tokenizer.save_pretrained(root)
    AutoTokenizer.from_pretrained(root)
    embeddings = model.get_input_embeddings().weight.numel()
    described = Model(
        parameters_total=model.num_parameters(),
        parameters_active=model.num_parameters() - embeddings,
        parameters_non_embedding=model.num_parameters() - embeddings,
        note=f"the saved weights are those of {arm}, seed {seed}; no user's distribution is among them",
    )
    return described, {"arm": arm, "design": design, "file": DESIGN_FILE if design else None}


def _plan(args: AnonymousArguments, designs: DesignArguments, training_args: TrainingArguments) -> dict[str, Any]:
    config = PersonalLmConfig()
    return {
        "users": args.users,
        "shape": SHAPES[args.shape] | {"user_tokens": config.num_user_tokens},
        "steps": {"stage_1": args.stage1_steps, "stage_2": designs.device_steps, "stage_3": training_args.max_steps},
        "batch_size": training_args.per_device_train_batch_size,
        "sigma": designs.std,
        "designs": dataclasses.asdict(designs),
        "learning_rate_grid": args.learning_rates,
        "learning_rate_chosen_on": "the first seed, accuracy on the validation split, which is not reported",
        "randomness_of_draws": "simulation=True, seeds",
        "uploads_per_training_text": 1,
        "components_of_mixtures": f"k-means centres of static embeddings of {designs.volunteers:.0%} of the users, "
        "who volunteer and are identified by it; `random`: nobody's",
        "learning_rate_grid_on_device": designs.alone_learning_rates,
        "changed_after_results_were_seen": args.note,
    }


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (AnonymousArguments, DesignArguments, RecipeTrainingArguments)
    preset, (args, designs, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    try:
        for arm in (*args.arms, *args.speech_arms):
            parse_arm(arm)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    try:
        compare(preset, args, designs, training_args)
    except OtherSettingsError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
