"""Windows, their bytes, the held-out part and the order of batches."""

from __future__ import annotations

import hashlib
import lzma
from importlib.resources import files

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mogul.core.errors import ConfigError
from mogul.train.data import (
    Windows,
    batches,
    shipped_text,
    split_by_position,
    token_windows,
)

TEXT = "Alice was beginning to get very tired; œuvre — naïve.\n" * 9


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_shipped_text_is_the_one_described():
    folder = files("mogul.train").joinpath("text")
    raw = lzma.decompress(folder.joinpath("english.txt.xz").read_bytes())
    assert hashlib.sha256(raw).hexdigest() in folder.joinpath("README.md").read_text()
    corpus = shipped_text()
    assert len(corpus.train) == len(corpus.held_out) == 4
    assert sum(len(text.encode()) for text in corpus.train + corpus.held_out) == len(raw) - 3
    for word in ("Gutenberg", "Distributed Proofreading", "Illustration:"):
        assert word.encode() not in raw


def test_held_out_is_the_last_tenth_and_disjoint():
    corpus = shipped_text()
    for train, held_out in zip(corpus.train, corpus.held_out, strict=True):
        assert train.endswith("\n")
        assert 0.09 < len(held_out) / len(train + held_out) <= 0.1
        # Real text repeats short lines; whole paragraphs must not cross.
        assert not {p for p in held_out.split("\n") if len(p) > 80} & set(train.split("\n"))


@given(st.text(alphabet="ab\n", max_size=60), st.floats(0.05, 0.95))
def test_split_loses_nothing(document, share):
    first, last = split_by_position(document, share)
    assert first + last == document
    assert not last or first.endswith("\n")
    assert len(last) <= share * len(document) + 1


def test_windows_hold_the_text_and_its_bytes(tokenizer):
    windows = token_windows([TEXT, TEXT], tokenizer, 16)
    ids = tokenizer(TEXT)["input_ids"]
    per_document = len(ids) // 16
    assert len(windows) == 2 * per_document
    assert windows.ids[:per_document].ravel().tolist() == ids[: 16 * per_document]
    # One token is one byte here; tokens of one character share its bytes.
    whole = windows.bytes_per_token[:per_document].sum()
    assert abs(int(whole) - 16 * per_document) <= 2


def test_windows_refuse_nonsense(tokenizer):
    with pytest.raises(ConfigError, match="a window of 1 tokens has nothing to predict"):
        token_windows([TEXT], tokenizer, 1)
    with pytest.raises(ConfigError, match="no document is as long as one window of 9999"):
        token_windows([TEXT], tokenizer, 9999)


def _windows(count: int, length: int = 4) -> Windows:
    ids = np.arange(count * length).reshape(count, length)
    return Windows(ids, np.ones_like(ids))


def test_spread_takes_first_and_last():
    assert _windows(11).spread(3).ids[:, 0].tolist() == [0, 20, 40]
    with pytest.raises(ConfigError, match="12 windows asked of a text that has 11"):
        _windows(11).spread(12)


@given(count=st.integers(1, 20), batch_size=st.integers(1, 20), seed=st.integers(0, 99))
def test_a_pass_shows_every_window_at_most_once(count, batch_size, seed):
    if batch_size > count:
        with pytest.raises(ConfigError, match="batches of"):
            batches(_windows(count), batch_size=batch_size, seed=seed)
        return
    stream = batches(_windows(count), batch_size=batch_size, seed=seed)
    first = [int(row[0]) for _ in range(count // batch_size) for row in next(stream)]
    assert len(set(first)) == len(first) == count // batch_size * batch_size


def test_order_is_fixed_by_the_seed():
    def some(seed):
        stream = batches(_windows(30), batch_size=4, seed=seed)
        return [next(stream).tolist() for _ in range(20)]

    assert some(0) == some(0)
    assert some(0) != some(1)
