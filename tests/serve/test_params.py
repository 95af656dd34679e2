"""Requests that mean nothing are refused by name, with what would be legal."""

from __future__ import annotations

import numpy as np
import pytest

from mogul.core.errors import ConfigError
from mogul.serve.options import EngineOptions
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
        ({"max_tokens": 2.5}, "max_tokens 2.5 is no whole number"),
        ({"max_tokens": None}, "max_tokens None is no whole number"),
        ({"min_tokens": "1"}, "min_tokens '1' is no whole number"),
        ({"top_k": 2.5}, "top_k 2.5 is no whole number"),
        ({"seed": 1.5}, "seed 1.5 is no whole number"),
        ({"logprobs": 0.5}, "logprobs 0.5 is no whole number"),
        ({"temperature": "0.5"}, "temperature '0.5' is no number"),
        ({"top_p": None}, "top_p None is no number"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias names token '5'"),
        ({"logit_bias": {5: 1e39}}, "logit_bias 1e\\+39 of token 5"),
        ({"logit_bias": {5: "1"}}, "logit_bias '1' of token 5"),
        ({"logit_bias": [5]}, "logit_bias .* is no mapping"),
        ({"repetition_penalty": 1e39}, "repetition_penalty 1e\\+39"),
        ({"repetition_penalty": 1e-46}, "repetition_penalty 1e-46"),
        ({"stop": None}, "stop None is no list"),
        ({"stop": (5,)}, "stop string 5 is no text"),
        ({"stop_token_ids": 5}, "stop_token_ids 5 is no list"),
        ({"stop_token_ids": (5.5,)}, "stop_token_ids names token 5.5"),
        ({"structure": "json"}, "structure 'json' is no Structure"),
    ],
)
def test_nonsense_is_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SamplingParams(**values)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"kind": "regex", "text": " "}, "regex"),
        ({"kind": "choice"}, "at least one answer"),
        ({"kind": "choice", "choices": "yes"}, "choices 'yes' are no list"),
        ({"kind": "choice", "choices": ("yes", 1)}, "answer 1 is no text"),
        ({"kind": "json_schema", "text": {"type": "object"}}, "is a dict, not a text"),
        ({"kind": "jsonschema", "text": "{}"}, "kind 'jsonschema' is unknown"),
    ],
)
def test_structures_that_mean_nothing_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Structure(**values)


def test_lists_and_numbers_of_other_libraries_are_as_good() -> None:
    two = np.int64(2)
    params = SamplingParams(two, top_k=two, temperature=np.float32(0.5), stop=["a"], seed=two)
    assert params.max_tokens == 2
    assert hash(Structure("choice", choices=["a", "b"])) == hash(
        Structure("choice", choices=("a", "b"))
    )


def test_what_a_request_needs_is_told() -> None:
    assert SamplingParams(temperature=0, top_k=5).has_filters is False
    assert SamplingParams(min_p=0.1).has_filters
    assert SamplingParams(frequency_penalty=0.1).has_penalties
    assert not SamplingParams().has_penalties


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"memory_share": "0.5"}, "memory_share '0.5' is no share"),
        ({"memory_share": None}, "memory_share None is no share"),
        ({"max_sequences": None}, "max_sequences None is no number"),
        ({"max_length": 10.5}, "max_length 10.5 is no number"),
        ({"seed": 1.5}, "seed 1.5 is no number"),
    ],
)
def test_options_of_another_kind_are_refused(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        EngineOptions(**values)
