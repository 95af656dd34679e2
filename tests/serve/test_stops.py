"""Stop strings are found wherever tokens happen to cut the text; no half character is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mogul.serve.params import SamplingParams
from mogul.serve.requests import Live
from mogul.serve.results import _advance
from mogul.serve.stops import StopFinder, TextStream


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token; token 256 is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def whole(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, bool]:
    """The plain answer: cut at the stop string that ends first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    if not ends:
        return text, False
    end, start = min(ends)
    return text[: end if include else start], True


letters = st.text("ab\n", min_size=1, max_size=4)


@given(
    pieces=st.lists(st.text("ab\n", max_size=5), max_size=12),
    stops=st.lists(letters, max_size=3).map(tuple),
    include=st.booleans(),
)
def test_pieces_make_no_difference(
    pieces: list[str], stops: tuple[str, ...], include: bool
) -> None:
    finder = StopFinder(stops, include=include)
    shown = ""
    want, is_found = whole("".join(pieces), stops, include)
    for piece in pieces:
        shown += finder.push(piece)
        assert want.startswith(shown)
    if not is_found:
        shown += finder.close()
    assert (shown, finder.found is not None) == (want, is_found)


@given(text=st.text(max_size=30), stop=st.text(min_size=1, max_size=3))
def test_text_of_bytes_is_whole(tokenizer: PreTrainedTokenizerFast, text: str, stop: str) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=(stop,)))
    shown = ""
    for token in tokenizer(text)["input_ids"]:
        new = stream.push(token)
        assert "\ufffd" not in new or "\ufffd" in text
        shown += new
    shown += stream.close()
    assert (shown, stream.is_stopped) == whole(text, (stop,), False)


def test_special_tokens_are_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, SamplingParams())
    ids = tokenizer("ab")["input_ids"]
    end = tokenizer.eos_token_id
    assert "".join(stream.push(token) for token in (ids[0], end, ids[1])) == "ab"


def test_stops_count_after_the_least_length(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, SamplingParams(stop=("x",), min_tokens=3))
    given_text = [stream.push(token) for token in tokenizer("axbcxd")["input_ids"]]
    assert given_text == ["a", "x", "b", "c", "", ""]
    assert stream.is_stopped
    assert stream.close() == ""


def test_bytes_that_never_become_a_character_are_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    stream = TextStream(tokenizer, SamplingParams())
    lone = tokenizer("é")["input_ids"][0]
    shown = "".join(stream.push(lone) for _ in range(20)) + stream.close()
    assert shown == "\ufffd" * 20


def test_a_stop_in_the_last_half_character_is_a_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams(max_tokens=1, stop=("\ufffd",))
    live = Live(0, 1, 1, params=params, prompt_ids=(1,), seed=0, root=b"")
    live.stream = TextStream(tokenizer, params)
    lone = tokenizer("é")["input_ids"][0]
    live.output_ids.append(lone)
    assert _advance(live, lone) == ""
    assert live.finish == "stop"
