"""Tokenizers: one trained on the spot in the Sigma family's manner, or any that transformers can load."""

import os
from collections.abc import Iterable, Iterator
from itertools import chain

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging


logger = logging.get_logger(__name__)

END_OF_TEXT = "<|endoftext|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
END_OF_TURN = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, *ROLE_TOKENS, END_OF_TURN)

# Ids 0 to 4 of an encoder's tokenizer: XLM-R's first four in its order, then the mask.
ENCODER_SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")

# The split pattern of o200k_base, the family's vocabulary. It keeps indentation in one piece.
_SPLIT_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

# bos, then <|role|>content<|end|> for each message, then eos or the header of the answer. The last answer's eos is
# part of what the assistant is trained on: generation then stops by itself, also without <|end|> as a stop token.
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception("unknown role '" ~ message['role'] ~ "': use system, user or assistant") -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- message['content'] + '<|end|>' -}}
            {%- if loop.last and not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}
        {%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + '<|end|>' -}}
        {%- if loop.last and not add_generation_prompt -%}{{- eos_token -}}{%- endif -%}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_max_length: int | None = None,
    min_frequency: int = 2,
    show_progress: bool = True,
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer with the Sigma family's special tokens, split pattern and chat template.

    Lossless: `decode(encode(text)) == text` for every string. Deterministic: the same texts give the same vocabulary.
    Special tokens take the ids 0 to 4; `<|endoftext|>` is bos, eos and padding at once; padding goes to the left.

    Args:
        texts: read once.
        vocab_size: upper limit, special tokens included. A small corpus may yield fewer: `len(tokenizer)` says.
        model_max_length: the context that the tokenizer warns about; none if None.
        min_frequency: pairs that occur less often are not merged.

    Raises:
        ValueError: `vocab_size` is below the 256 bytes and 5 special tokens, or there is no text.
    """
    backend = _train_byte_level_bpe(texts, SPECIAL_TOKENS, vocab_size, min_frequency, show_progress)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[*ROLE_TOKENS, END_OF_TURN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        # generate() refuses the token_type_ids that transformers would otherwise add
        model_input_names=["input_ids", "attention_mask"],
        chat_template=CHAT_TEMPLATE,
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )
    _warn_if_smaller(tokenizer, vocab_size)
    return tokenizer


def train_encoder_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    model_max_length: int | None = None,
    min_frequency: int = 2,
    show_progress: bool = True,
) -> PreTrainedTokenizerFast:
    """
    Train a byte-level BPE tokenizer for an encoder: bos, pad, eos and unknown have XLM-R's ids 0 to 3, the mask is 4.

    Lossless and deterministic as `train_tokenizer`. A text becomes `<s> text </s>`, a pair of texts
    `<s> one </s></s> two </s>`; padding goes to the right.

    Args:
        texts, vocab_size, model_max_length, min_frequency: as for `train_tokenizer`.

    Raises:
        ValueError: as `train_tokenizer`.
    """
    backend = _train_byte_level_bpe(texts, ENCODER_SPECIAL_TOKENS, vocab_size, min_frequency, show_progress)
    bos, pad, eos, unknown, mask = ENCODER_SPECIAL_TOKENS
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(bos, ENCODER_SPECIAL_TOKENS.index(bos)), (eos, ENCODER_SPECIAL_TOKENS.index(eos))],
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=bos,
        cls_token=bos,
        pad_token=pad,
        eos_token=eos,
        sep_token=eos,
        unk_token=unknown,
        mask_token=mask,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
    )
    _warn_if_smaller(tokenizer, vocab_size)
    return tokenizer


def load_tokenizer(path_or_id: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """
    `AutoTokenizer.from_pretrained` for training: whatever is unusable there is refused here, with the remedy.

    Args:
        path_or_id: folder or Hub id.
        kwargs: passed on (`revision`, `token`, `trust_remote_code`, ...).

    Raises:
        OSError: no tokenizer can be loaded from there.
        ValueError: the tokenizer has no vocabulary, or no end-of-sequence token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path_or_id, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise OSError(
            f"{path_or_id}: no tokenizer could be loaded ({str(error).strip().splitlines()[0]}). Name another with "
            "--tokenizer_name; recipes train one on the data if it is left out."
        ) from error
    # For a folder that holds a known model but no tokenizer files, transformers makes up an empty tokenizer.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"{path_or_id}: the tokenizer files are missing (the vocabulary is empty). Name another tokenizer with "
            "--tokenizer_name; recipes train one on the data if it is left out."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{path_or_id}: the tokenizer has no end-of-sequence token, which separates documents. "
            "Set `eos_token` in its tokenizer_config.json, or name another with --tokenizer_name."
        )
    return tokenizer


def _require_text(texts: Iterable[str]) -> Iterator[str]:
    texts = iter(texts)
    first = next((text for text in texts if text), None)
    if first is None:
        raise ValueError("texts: there is no text to train a tokenizer on; check the dataset and its text column.")
    return chain([first], texts)


def _train_byte_level_bpe(
    texts: Iterable[str], special_tokens: tuple[str, ...], vocab_size: int, min_frequency: int, show_progress: bool
) -> Tokenizer:
    minimum = 256 + len(special_tokens)
    if vocab_size < minimum:
        raise ValueError(
            f"vocab_size={vocab_size} is below {minimum}, which the 256 bytes and {len(special_tokens)} "
            f"special tokens take: use {minimum} or more."
        )
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special_tokens),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    backend.train_from_iterator(_require_text(texts), trainer=trainer)
    return backend


def _warn_if_smaller(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    if len(tokenizer) < vocab_size:
        logger.warning(f"vocab_size={vocab_size} asked for, but the texts support only {len(tokenizer)} tokens")
