"""Requests that mean nothing are refused by name, with what would be legal."""

from __future__ import annotations

import pytest

from mogul.core.errors import ConfigError
from mogul.serve.params import SamplingParams, Structure


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_tokens": 0}, "max_tokens 0 asks for nothing"),
        ({"max_tokens": 4, "min_tokens": 5}, "min_tokens 5 is not in 0..4"),
        ({"temperature": -1.0}, "temperature -1.0 is out of range"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"top_k": -1}, "top_k -1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"min_p": 1.5}, "min_p 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty 0.0"),
        ({"presence_penalty": 3.0}, "presence_penalty 3.0"),
        ({"frequency_penalty": -3.0}, "frequency_penalty -3.0"),
        ({"logit_bias": {-1: 1.0}}, "token -1"),
        ({"logit_bias": dict.fromkeys(range(2000), 1.0)}, "names 2000 tokens"),
        ({"seed": -1}, "seed -1"),
        ({"logprobs": 101}, "logprobs 101 is not in 0..100"),
        ({"prompt_logprobs": -1}, "prompt_logprobs -1"),
        ({"stop": "END"}, "a text, not a list"),
        ({"stop": ("",)}, "stop string of 0 characters"),
        ({"stop": ("x",) * 17}, "17 stop strings"),
        ({"stop_token_ids": (-3,)}, "negative id"),
    ],
)
def test_nonsense_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"kind": "regex", "text": " "}, "regex"), ({"kind": "choice"}, "at least one answer")],
)
def test_empty_structures_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Structure(**values)


def test_what_a_request_needs_is_told() -> None:
    assert SamplingParams(temperature=0, top_k=5).has_filters is False
    assert SamplingParams(min_p=0.1).has_filters
    assert SamplingParams(frequency_penalty=0.1).has_penalties
    assert not SamplingParams().has_penalties
