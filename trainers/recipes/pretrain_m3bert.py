"""Pre-train m3BERT (arXiv 2605.19568): one encoder, trained at once to be cut at several depths and widths.

    accelerate launch -m trainers.recipes.pretrain_m3bert --preset demo
    accelerate launch --config_file YOURS.yaml -m trainers.recipes.pretrain_m3bert --preset paper \\
        --dataset_name ORG/ENGLISH --multilingual_datasets en=ORG/ENGLISH de=ORG/GERMAN --language_sizes 9e11 1e11 \\
        --pairs_name ORG/CLICKS

| stage | text | loss, summed over layers x dims |
|---|---|---|
| `monolingual` | one language | cross-entropy of masked tokens, one sliced head |
| `multilingual` | several, the small ones sampled more often than their share | the same |
| `contrastive` | queries and the pages that answer them | in-batch negatives |

`--objective plain` trains the last layer at full width only: the encoder that others cut by hand. Each stage is a
Trainer run in a folder of its own and starts from the weights of the one before; a repeated command goes on. The
folder of the run ends up as a Hub repository: an encoder of sentences, or, without the contrastive stage, a masked
language model.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from hf_models.m3bert import M3BertConfig, M3BertForMaskedLM, M3BertForSentenceEmbedding

from ..evaluation.retrieval import grid_metrics
from ..evaluation.retrieval_figure import plot_pareto
from ..redaction import command_line
from ..report import FigureFile, Metric, Model, Results, collect_versions, device_name, summarise, write_results
from .arguments import RecipeTrainingArguments, parse_arguments, training_arguments_of
from .comparison import print_metrics, wall_seconds_so_far
from .description import describe_data
from .language_model import require_writable
from .m3bert_data import EncoderData, EncoderDataArguments, prepare_encoder_data
from .m3bert_fit import StageFit, fit_stage, masking_data, measure_masked
from .m3bert_pairs import cells_of, fit_pairs


STAGES = ("monolingual", "multilingual", "contrastive")

# The released shape is the config's default. The small ones see less than an epoch or little more: no dropout.
SHAPES: dict[str, dict[str, Any]] = {
    "released": {},
    "small": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "mrl_layers": [1, 2, 3, 4, 5, 6],
        "mrl_dims": [16, 32, 64, 128],
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
}


@dataclasses.dataclass
class M3BertArguments:
    """The model, its stages, and how long each is. `learning_rate` and `max_steps` of the training arguments give way
    to those of the stages."""

    shape: str = dataclasses.field(default="small", metadata={"help": f"One of {', '.join(SHAPES)}."})
    objective: Literal["grid", "plain"] = dataclasses.field(
        default="grid", metadata={"help": "grid: every exit at every width; plain: the last layer at full width."}
    )
    exit_norm: str = dataclasses.field(
        default="shared", metadata={"help": "Norm of the exits; `none` is that of the released code."}
    )
    stages: list[str] = dataclasses.field(
        default_factory=lambda: list(STAGES), metadata={"help": f"Of {', '.join(STAGES)}, in this order."}
    )
    stage_steps: list[int] = dataclasses.field(
        default_factory=lambda: [200, 200, 100], metadata={"help": "Optimizer steps of each of them."}
    )
    stage_learning_rates: list[float] = dataclasses.field(default_factory=lambda: [2e-3, 2e-3, 1e-3])
    stage_batch_sizes: list[int] = dataclasses.field(
        default_factory=lambda: [16, 16, 64], metadata={"help": "Blocks, or pairs, per device."}
    )
    temperature: float = dataclasses.field(default=0.05, metadata={"help": "Of the similarities; the paper's."})


HELP_LANGUAGES = ("en-us", "de", "fr", "ja")
SMALL_RUN = {
    "dataset_name": "libreoffice-help:en-us",
    "dataset_license": "MPL-2.0",
    "tokenizer_vocab_size": 4096,
    "sequence_length": 64,
    "max_eval_blocks": 256,
    "max_eval_queries": 4000,
    "query_length": 12,
    "document_length": 48,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "lr_scheduler_type": "linear",
    "logging_steps": 20,
    "eval_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}
PRESETS = {
    "demo": SMALL_RUN
    | {
        "multilingual_datasets": [f"{name.split('-')[0]}=libreoffice-help:{name}" for name in HELP_LANGUAGES],
        "dataset_language": ",".join(name.split("-")[0] for name in HELP_LANGUAGES),
        "pairs_name": f"libreoffice-help:{','.join(HELP_LANGUAGES)}",
        "stage_steps": [200, 400, 200],
        "save_strategy": "steps",
        "save_steps": 100,
        "save_total_limit": 1,
        "output_dir": "runs/m3bert",
    },
    # What one arm of `trainers.recipes.m3bert_evidence` is pre-trained with, by itself.
    "evidence": SMALL_RUN
    | {
        "multilingual_datasets": [f"{name.split('-')[0]}=libreoffice-help:{name}" for name in HELP_LANGUAGES[:3]],
        "dataset_language": "en,de,fr",
        "pairs_name": f"libreoffice-help:{','.join(HELP_LANGUAGES[:3])}",
        "mlm_probability": 0.2,
        "stages": ["multilingual"],
        "stage_steps": [800],
        "stage_learning_rates": [3e-3],
        "stage_batch_sizes": [16],
        "save_strategy": "no",
        "output_dir": "runs/m3bert_evidence_arm",
    },
    # Released: shapes, vocabulary, temperature, lengths of queries and documents, and, of fine-tuning, batch 1024,
    # 5e-4, warm-up 0.1, clipping 0.5. Ours, because nothing is known: corpora, their sizes, steps, batches and rates
    # of the text stages, masking and sampling.
    "paper": {
        "shape": "released",
        "exit_norm": "none",
        "tokenizer_name": "FacebookAI/xlm-roberta-base",
        "streaming": True,
        "sequence_length": 512,
        "max_eval_blocks": 512,
        "query_length": 16,
        "document_length": 64,
        "stage_steps": [100_000, 100_000, 50_000],
        "stage_learning_rates": [5e-4, 2e-4, 5e-4],
        "stage_batch_sizes": [32, 32, 1024],
        "gradient_accumulation_steps": 1,
        "adam_beta2": 0.98,
        "weight_decay": 0.01,
        "warmup_steps": 0.1,
        "max_grad_norm": 0.5,
        "bf16": True,
        "logging_steps": 50,
        "eval_strategy": "no",
        "save_steps": 1000,
        "save_total_limit": 3,
        "report_to": ["tensorboard"],
        "output_dir": "runs/m3bert-paper",
    },
}


def build_config(
    args: M3BertArguments, tokenizer: PreTrainedTokenizerBase | None, *, positions: int | None = None
) -> M3BertConfig:
    """Configuration of a shape with the tokenizer's vocabulary, with the grid or, of a plain model, its last cell."""
    if args.shape not in SHAPES:
        raise ValueError(f"shape {args.shape!r} is not known. Choose from {', '.join(SHAPES)}.")
    fields = dict(SHAPES[args.shape]) | {"exit_norm": args.exit_norm}
    if tokenizer is not None:
        fields["vocab_size"] = len(tokenizer)
        fields |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if positions is not None:
        fields["max_position_embeddings"] = positions
    config = M3BertConfig(**fields)
    if args.objective == "grid":
        return config
    last = {"mrl_layers": [config.num_hidden_layers], "mrl_dims": [config.hidden_size]}
    return M3BertConfig(**fields | last)


def build_masked_model(
    args: M3BertArguments, data: EncoderData, data_args: EncoderDataArguments, seed: int
) -> M3BertForMaskedLM:
    """A model freshly initialised from `seed`."""
    longest = max(data_args.sequence_length, data_args.query_length, data_args.document_length)
    positions = None if args.shape == "released" else longest
    set_seed(seed)
    return M3BertForMaskedLM(build_config(args, data.tokenizer, positions=positions))


def sentence_encoder(
    model: M3BertForMaskedLM | M3BertForSentenceEmbedding, **overrides: Any
) -> M3BertForSentenceEmbedding:
    """An encoder of sentences with a copy of the body's weights; `overrides` are fields of its config, such as a grid
    that the body was not trained at."""
    encoder = M3BertForSentenceEmbedding(_config_like(model.config, **overrides))
    encoder.model.load_state_dict(model.model.state_dict())
    return encoder


def _config_like(config: M3BertConfig, **overrides: Any) -> M3BertConfig:
    """The same shape, without what saving has noted in it: a repeated command meets the configuration of the first."""
    noted = ("architectures", "dtype", "transformers_version", "auto_map")
    return M3BertConfig(**{k: v for k, v in config.to_dict().items() if k not in noted} | overrides)


def fit_masked(
    name: str,
    stage: str,
    model: M3BertForMaskedLM,
    data: EncoderData,
    args: TrainingArguments,
    data_args: EncoderDataArguments,
) -> StageFit:
    """Masked language modelling on the blocks of `stage`, see [`fit_stage`]. The held-out score is the mean over the
    model's cells in nats per masked token."""

    def measure(trained: PreTrainedModel) -> tuple[float, dict[str, Any]]:
        options = {"mlm_probability": data_args.mlm_probability, "batch_size": args.per_device_eval_batch_size}
        return measure_masked(trained, data.validation[stage], data.tokenizer, **options)

    blocks = masking_data(data.train[stage], data.tokenizer, data.fingerprint, data_args.mlm_probability)
    return fit_stage(name, model, blocks, args, measure)


def pretrain(
    preset: str, args: M3BertArguments, data_args: EncoderDataArguments, training_args: TrainingArguments
) -> Path:
    """Run the stages, measure, and write model, `results.json` and figure into the run folder, which is returned."""
    start, root = time.perf_counter(), Path(training_args.output_dir)
    _require_stages(args)
    require_writable(root)
    data = prepare_encoder_data(data_args, training_args, stages=args.stages)
    model: PreTrainedModel = build_masked_model(args, data, data_args, training_args.seed)
    state, fits = PartialState(), {}
    for stage, steps, rate, batch_size in zip(
        args.stages, args.stage_steps, args.stage_learning_rates, args.stage_batch_sizes, strict=True
    ):
        stage_args = training_arguments_of(
            training_args,
            output_dir=str(root / "stages" / stage),
            max_steps=steps,
            learning_rate=rate,
            per_device_train_batch_size=batch_size,
            resume_from_checkpoint=None,  # each stage goes on from its own checkpoints
        )
        if stage == "contrastive":
            model = sentence_encoder(model)
            layers, dims = model.config.mrl_layers, model.config.mrl_dims
            fits[stage] = fit_pairs(
                stage, model, data, stage_args, data_args, layers=layers, dims=dims, temperature=args.temperature
            )
        else:
            fits[stage] = fit_masked(stage, stage, model, data, stage_args, data_args)
            fresh = M3BertForMaskedLM(_config_like(model.config))  # what a Trainer has prepared is not for another one
            fresh.load_state_dict(model.state_dict())
            model = fresh
        state.wait_for_everyone()
    if state.is_main_process:
        model.save_pretrained(root)
        data.tokenizer.save_pretrained(root)
        results = Results(
            method="m3bert",
            title="m3BERT, a Matryoshka encoder over layers and dimensions",
            preset=preset,
            seeds=[training_args.seed],
            command=command_line(),
            device=device_name(),
            versions=collect_versions(),
            wall_seconds=wall_seconds_so_far(root, time.perf_counter() - start),
            metrics=stage_metrics(fits),
            evidence=_plan(args, data_args, fits),
            data=describe_data(data_args, data.fingerprint, splitting_note(data_args, data)),
            model=describe_encoder(model),
            figures=_figures(root, fits),
        )
        write_results(root, results)
        print_metrics(results)
    state.wait_for_everyone()
    return root


def _require_stages(args: M3BertArguments) -> None:
    if not args.stages or args.stages != [stage for stage in STAGES if stage in args.stages]:
        raise ValueError(f"stages {args.stages}: give one or more of {', '.join(STAGES)}, in this order.")
    for name in ("stage_steps", "stage_learning_rates", "stage_batch_sizes"):
        if len(getattr(args, name)) != len(args.stages):
            raise ValueError(f"--{name} has {len(getattr(args, name))} values for {len(args.stages)} stages.")


def stage_metrics(fits: Mapping[str, StageFit]) -> dict[str, Metric]:
    """Held-out loss of the text stages, recall of every cell after the contrastive one."""
    metrics = {}
    for stage, fit in fits.items():
        if stage == "contrastive":
            metrics |= grid_metrics([cells_of(fit.measured["test"])])
            continue
        metric = summarise([fit.held_out], unit="nats/masked token", higher_is_better=False)
        metric.note = f"mean over the cells; {fit.examples:,} blocks, learning rate {fit.learning_rate:g}"
        metrics[f"held_out_{stage}"] = metric
    return metrics


def _plan(args: M3BertArguments, data_args: EncoderDataArguments, fits: Mapping[str, StageFit]) -> dict[str, Any]:
    return {
        "objective": args.objective,
        "exit_norm": args.exit_norm,
        "temperature": args.temperature,
        "mlm_probability": data_args.mlm_probability,
        "sampling_exponent": data_args.sampling_exponent,
        "stages": {
            stage: {
                "steps": fit.steps,
                "examples": fit.examples,
                "learning_rate": fit.learning_rate,
                "train_seconds": fit.train_seconds,
                "measured": fit.measured,
            }
            for stage, fit in fits.items()
        },
    }


def splitting_note(args: EncoderDataArguments, data: EncoderData) -> str:
    """How pages became rows."""
    sizes = ", ".join(f"{stage} {len(rows)}" for stage, rows in data.train.items() if hasattr(rows, "__len__"))
    validated = args.held_out_fraction - args.test_fraction
    return (
        f"split by page in all languages: {args.test_fraction:.0%} of them are tested, {validated:.0%} validate; "
        f"{len(data.tokenizer)} tokens in the vocabulary, blocks of {args.sequence_length}; rows: "
        f"{sizes or 'streamed'}"
    )


def describe_encoder(model: PreTrainedModel) -> Model:
    """Sizes of an encoder; of a masked language model the head counts in the total only."""
    embeddings = model.get_input_embeddings().weight.numel()
    body = model.base_model.num_parameters() - embeddings
    return Model(
        parameters_total=model.num_parameters(),
        parameters_active=body,
        parameters_non_embedding=body,
        note="active: all layers, without the token embeddings and the head",
    )


def _figures(root: Path, fits: Mapping[str, StageFit]) -> list[FigureFile]:
    if "contrastive" not in fits:
        return []
    plot_pareto(cells_of(fits["contrastive"].measured["test"]), root / "figures" / "pareto.png")
    return [FigureFile(path="figures/pareto.png", caption="Recall@10 of every exit and width over the index' size.")]


def main(argv: list[str] | None = None) -> None:
    """Command-line entry; see the module's docstring."""
    types = (M3BertArguments, EncoderDataArguments, RecipeTrainingArguments)
    preset, (args, data_args, training_args) = parse_arguments(types, PRESETS, argv, default_preset="demo")
    try:
        _require_stages(args)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    pretrain(preset, args, data_args, training_args)


if __name__ == "__main__":
    main()
