"""Which tokenizer turns text into ids: one that is given, or a byte-level BPE trained on the text.

Training is deterministic: the same documents give the same merges. The bytes that each token
stands for are known for byte-level tokenizers, which makes bits per byte exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mogul.core.errors import ArtifactError, ConfigError

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # every byte and the end of text


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE with `vocab_size` tokens, the first of them the end of text.

    Numbers are cut into single digits; words, as in GPT-2, carry the space before them.
    """
    if vocab_size < SMALLEST:
        raise ConfigError(
            f"a byte-level vocabulary of {vocab_size} cannot hold every byte",
            fix=f"use at least {SMALLEST}",
        )
    tokenizer = Tokenizer(models.BPE())
    cut: Any = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.pre_tokenizer = cut  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def as_transformers(tokenizer: Tokenizer) -> Any:
    """The tokenizer in the form that checkpoints carry."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def open_tokenizer(path: str) -> Any:
    """A fast tokenizer from a checkpoint folder or a `tokenizer.json`."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    file = Path(path)
    try:
        if not file.exists() and path.count("/") != 1:
            raise ArtifactError(
                f"{path} does not exist, so there is no tokenizer in it",
                fix="name a checkpoint folder or a tokenizer.json",
            )
        if file.is_file():
            found = PreTrainedTokenizerFast(tokenizer_file=str(file))
        else:
            found = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ArtifactError(
            f"{path} holds no tokenizer that can be used: {error}",
            fix="name a checkpoint folder or a tokenizer.json",
        ) from error
    if not found.is_fast:
        raise ArtifactError(f"the tokenizer of {path} has no fast form", fix="use another one")
    return found


def bytes_of_tokens(tokenizer: Any, vocab_size: int) -> np.ndarray | None:
    """Bytes of text every id stands for [V], 0 for special ones; None if it is not byte-level."""
    core: Tokenizer = tokenizer.backend_tokenizer
    if "ByteLevel" not in repr(core.pre_tokenizer) or core.normalizer is not None:
        return None
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = core.get_added_tokens_decoder()
    sizes = np.zeros(vocab_size, dtype="<u4")
    for token, number in core.get_vocab(with_added_tokens=True).items():
        if number in added:
            sizes[number] = 0 if added[number].special else len(token.encode())
        elif alphabet.issuperset(token):
            sizes[number] = len(token)
        else:
            return None
    return sizes
