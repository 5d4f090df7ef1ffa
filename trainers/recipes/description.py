"""What `results.json` says of the data and of the model of a run."""

from pathlib import Path

from ..report import Data, Model
from .language_model import LanguageData


def describe_data(data_args, fingerprint: str, note: str) -> Data:
    """The corpus as the card names it."""
    name = data_args.dataset_name
    return Data(
        name=Path(name).name if Path(name).is_absolute() else name,  # a card names no path of this machine
        fingerprint=fingerprint,
        license=data_args.dataset_license,
        language=data_args.dataset_language.split(","),
        hub_id=name if name.count("/") == 1 and not Path(name).exists() else None,
        note=note,
    )


def packing_note(data_args, data: LanguageData) -> str:
    """How the documents became blocks."""
    return (
        f"split by document, {data_args.held_out_fraction:.0%} held out, exact duplicates removed; "
        f"{len(data.tokenizer)} tokens in the vocabulary, blocks of {data_args.sequence_length}"
    )


def describe_model(model) -> Model:
    """Sizes of a Sigma-MoE model with the experts per token in force."""
    embeddings = model.get_input_embeddings().weight.numel()
    head = 0 if model.config.tie_word_embeddings else model.get_output_embeddings().weight.numel()
    return Model(
        parameters_total=model.num_parameters(),
        parameters_active=model.num_active_parameters(),
        parameters_non_embedding=model.num_parameters() - embeddings - head,
        note="active: without embeddings and output head, experts per token as in the saved configuration",
    )
