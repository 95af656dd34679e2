"""How long a request may be: what the model was made for, and what leaves its neighbours alone."""

from __future__ import annotations

import logging

import pytest
from transformers import LlamaConfig, Phi3Config

from mogul.core.errors import BackendError
from mogul.serve.sizes import longest

LONG = {"rope_type": "longrope", "factor": 4.0, "short_factor": [1.0], "long_factor": [4.0]}


def longrope() -> Phi3Config:
    sizes = {"hidden_size": 8, "num_attention_heads": 4, "num_key_value_heads": 4}
    return Phi3Config(
        **sizes,
        max_position_embeddings=80,
        original_max_position_embeddings=20,
        rope_parameters={**LONG, "rope_theta": 1e4},
        pad_token_id=None,
    )


def dynamic() -> LlamaConfig:
    return LlamaConfig(
        max_position_embeddings=40,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )


def test_texts_that_would_turn_their_neighbours_are_not_taken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert longest(longrope(), None) == 20
    assert "requests of up to 20 tokens" in capsys.readouterr().err
    assert longest(longrope(), 15) == 15
    assert longest(dynamic(), None) == 40
    for config, most in ((longrope(), 20), (dynamic(), 40)):
        with pytest.raises(BackendError, match=f"more than {most} tokens would rotate"):
            longest(config, most + 1)


def test_a_length_beyond_the_models_is_told(caplog: pytest.LogCaptureFixture) -> None:
    plain = LlamaConfig(max_position_embeddings=64)
    with caplog.at_level(logging.WARNING, logger="mogul"):
        assert longest(plain, 64) == longest(plain, None) == 64
        assert not caplog.records
        assert longest(plain, 100) == 100
    assert "100 is more than the 64 the model was made for" in caplog.text
