"""What the m3BERT recipes read: text of one and of several languages as blocks to mask, and query-document pairs."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerBase, TrainingArguments

from ..data import (
    RetrievalSet,
    load_retrieval_pairs,
    load_text_dataset,
    load_tokenizer,
    pack_documents,
    sample_languages,
    train_encoder_tokenizer,
)
from ..data.retrieval_pairs import PAIR_KINDS
from .arguments import DataArguments
from .language_model import fingerprint_of


# Characters of a document that are kept for each token that is read of it.
CHARACTERS_PER_TOKEN = 10


@dataclasses.dataclass
class EncoderDataArguments(DataArguments):
    """Text to mask and pairs to match. `dataset_name` is the corpus of the monolingual stage; of all corpora and of
    the pairs the pages in `held_out_fraction` are not trained on: `test_fraction` is tested, the rest validates."""

    held_out_fraction: float = 0.25
    multilingual_datasets: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "LANGUAGE=NAME each, of the multilingual stage."}
    )
    language_sizes: list[float] = dataclasses.field(
        default_factory=list, metadata={"help": "Amount of text in each of them; streams do not know theirs."}
    )
    sampling_exponent: float = dataclasses.field(
        default=0.3, metadata={"help": "Of the smoothed sampling. The paper's is not known; XLM-R's is 0.3."}
    )
    mlm_probability: float = dataclasses.field(
        default=0.15, metadata={"help": "Share of the tokens to predict. The paper's is not known; BERT's is 0.15."}
    )
    pairs_name: str = dataclasses.field(
        default="python-stdlib",
        metadata={"help": "python-stdlib, libreoffice-help[:lang,...], or a file or Hub dataset of query, document."},
    )
    pair_kinds: list[str] = dataclasses.field(
        default_factory=lambda: list(PAIR_KINDS), metadata={"help": "Of LibreOffice Help, to train on."}
    )
    test_fraction: float = 0.2
    query_length: int = dataclasses.field(default=16, metadata={"help": "Tokens of a query; the paper's."})
    document_length: int = dataclasses.field(default=64, metadata={"help": "Tokens of a document; the paper's."})
    max_eval_queries: int | None = dataclasses.field(
        default=None, metadata={"help": "Measure on at most this many queries, taken evenly; the pool stays whole."}
    )


@dataclasses.dataclass
class EncoderData:
    """Blocks by stage (`train` may be streamed), pairs as token ids, and the queries that measure. Stages without data
    are absent."""

    tokenizer: PreTrainedTokenizerBase
    train: dict[str, Dataset | IterableDataset]
    validation: dict[str, Dataset]
    queries: dict[str, RetrievalSet]
    fingerprint: str

    def save(self, folder: Path) -> None:
        """Keep it where workers find it."""
        self.tokenizer.save_pretrained(folder / "tokenizer")
        for split in ("train", "validation"):
            for stage, rows in getattr(self, split).items():
                rows.save_to_disk(folder / split / stage)
        sets = {split: dataclasses.asdict(queries) for split, queries in self.queries.items()}
        stages = {split: list(getattr(self, split)) for split in ("train", "validation")}
        content = {"fingerprint": self.fingerprint, "stages": stages, "queries": sets}
        (folder / "encoder_data.json").write_text(json.dumps(content), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "EncoderData":
        """What [`save`] has kept."""
        content = json.loads((folder / "encoder_data.json").read_text(encoding="utf-8"))
        rows = {
            split: {stage: Dataset.load_from_disk(folder / split / stage) for stage in stages}
            for split, stages in content["stages"].items()
        }
        sets = {split: RetrievalSet(**queries) for split, queries in content["queries"].items()}
        tokenizer = load_tokenizer(folder / "tokenizer")
        return cls(tokenizer, rows["train"], rows["validation"], sets, content["fingerprint"])


class ResumableMasking(DataCollatorForLanguageModeling):
    """transformers' masking with draws that depend on nothing but the batch: a resumed run masks as the uninterrupted
    one, every rank its own, and held-out text is masked alike for every model. Batches are drawn anew each epoch, so a
    block is masked otherwise in each."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        digest = hashlib.sha256(str([list(example["input_ids"]) for example in examples]).encode()).digest()
        self.generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return super().torch_call(examples)


def prepare_encoder_data(
    args: EncoderDataArguments, training_args: TrainingArguments, *, stages: Iterable[str]
) -> EncoderData:
    """Load what `stages` need ("monolingual", "multilingual", "contrastive"), train or load the tokenizer, and cut
    blocks. One process prepares, the others wait. `ValueError` for a stage without its corpora."""
    stages = tuple(stages)
    if "multilingual" in stages and not args.multilingual_datasets:
        raise ValueError("The multilingual stage needs --multilingual_datasets LANGUAGE=NAME ... or leave it out.")
    with training_args.main_process_first(desc="preparing the data"):
        names = {args.dataset_name: args.dataset_name} if "monolingual" in stages else {}
        languages = _names_by_language(args) if "multilingual" in stages else {}
        # A corpus that serves both stages is read and cut once.
        corpora = {name: _load_text(args, name) for name in dict.fromkeys([*names, *languages.values()])}
        tokenizer = _tokenizer(args, list(corpora.values()))
        blocks = {
            name: {split: _blocks(corpus[split], tokenizer, args) for split in ("train", "validation")}
            for name, corpus in corpora.items()
        }
        train, validation = {}, {}
        if names:
            train["monolingual"] = blocks[args.dataset_name]["train"]
            validation["monolingual"] = _validation(blocks[args.dataset_name]["validation"], args)
        if languages:
            train["multilingual"] = _mixed(args, blocks, languages, "train")
            validation["multilingual"] = _validation(_mixed(args, blocks, languages, "validation"), args)
        queries, pairs = {}, None
        if "contrastive" in stages:
            pairs, queries = _load_pairs(args, tokenizer)
            train["contrastive"] = pairs
    parts = [fingerprint_of(corpus, args) for corpus in corpora.values()]
    if pairs is not None:
        parts.append(_fingerprint_of_rows(pairs))
    fingerprint = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return EncoderData(tokenizer, train, validation, queries, fingerprint)


def _load_text(args: EncoderDataArguments, name: str):
    return load_text_dataset(
        name,
        held_out_fraction=args.held_out_fraction,
        text_column=args.text_column,
        cache_dir=args.dataset_cache_dir,
        streaming=args.streaming,
        max_documents=args.max_documents,
        config_name=args.dataset_config_name,
        revision=args.dataset_revision,
    )


def _names_by_language(args: EncoderDataArguments) -> dict[str, str]:
    corpora = {}
    for given in args.multilingual_datasets:
        language, separator, name = given.partition("=")
        if not (language and separator and name):
            raise ValueError(f"--multilingual_datasets {given!r} is no LANGUAGE=NAME, such as de=libreoffice-help:de.")
        corpora[language] = name
    if args.language_sizes and len(args.language_sizes) != len(corpora):
        raise ValueError(f"--language_sizes has {len(args.language_sizes)} values for {len(corpora)} languages.")
    return corpora


def _mixed(args: EncoderDataArguments, blocks: dict[str, dict[str, Any]], languages: dict[str, str], split: str):
    sizes = dict(zip(languages, args.language_sizes, strict=True)) if args.language_sizes else None
    own = {language: blocks[name][split] for language, name in languages.items()}
    return sample_languages(own, exponent=args.sampling_exponent, seed=0, sizes=sizes)


def _tokenizer(args: EncoderDataArguments, corpora: list) -> PreTrainedTokenizerBase:
    if args.tokenizer_name is not None:
        tokenizer = load_tokenizer(args.tokenizer_name)
        if tokenizer.mask_token is None:
            raise ValueError(f"--tokenizer_name {args.tokenizer_name}: no mask token, which masking needs.")
        return tokenizer
    if not corpora:
        raise ValueError("Without a text stage there is nothing to train a tokenizer on: give --tokenizer_name.")
    share = -(-args.tokenizer_max_documents // len(corpora))
    texts = (row["text"] for corpus in corpora for row in corpus["train"].take(share))
    return train_encoder_tokenizer(
        texts, vocab_size=args.tokenizer_vocab_size, model_max_length=args.sequence_length, show_progress=False
    )


def _blocks(documents: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, args: EncoderDataArguments):
    """Blocks of `sequence_length` tokens that begin with bos; documents end in eos."""
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    packed = pack_documents(documents, tokenizer, sequence_length=args.sequence_length - 1)
    return packed.map(lambda row: {"input_ids": [bos, *row["input_ids"]]}, remove_columns=["labels"])


def _validation(blocks: Dataset | IterableDataset, args: EncoderDataArguments) -> Dataset:
    limit = args.max_eval_blocks
    if isinstance(blocks, IterableDataset):
        taken = blocks if limit is None else blocks.take(limit)
        return Dataset.from_generator(lambda: iter(taken))
    return blocks if limit is None else blocks.select(_evenly(len(blocks), limit))


def _load_pairs(
    args: EncoderDataArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Dataset, dict[str, RetrievalSet]]:
    pairs = load_retrieval_pairs(
        args.pairs_name,
        test_fraction=args.test_fraction,
        validation_fraction=args.held_out_fraction - args.test_fraction,
        kinds=args.pair_kinds,
        max_document_characters=CHARACTERS_PER_TOKEN * args.document_length,
        cache_dir=args.dataset_cache_dir,
    )
    tokenized = {
        column: tokenizer(
            list(pairs.train[column]), truncation=True, max_length=length, return_attention_mask=False
        ).input_ids
        for column, length in (("query", args.query_length), ("document", args.document_length))
    }
    train = Dataset.from_dict({"input_ids": tokenized["query"], "document_ids": tokenized["document"]})
    limit = args.max_eval_queries
    return train, {split: _thinned(getattr(pairs, split), limit) for split in ("validation", "test")}


def _thinned(queries: RetrievalSet, limit: int | None) -> RetrievalSet:
    """At most `limit` queries against the whole pool."""
    if limit is None:
        return queries
    kept = _evenly(len(queries.queries), limit)
    return RetrievalSet(
        queries=[queries.queries[i] for i in kept],
        documents=queries.documents,
        relevant=[queries.relevant[i] for i in kept],
        languages=[queries.languages[i] for i in kept],
    )


def _evenly(length: int, limit: int) -> list[int]:
    return [int(i * length / limit) for i in range(limit)] if limit < length else list(range(length))


def _fingerprint_of_rows(rows: Dataset) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode())
    return digest.hexdigest()
