"""Families whose attention is more than pages hold are refused, not answered wrongly."""

from __future__ import annotations

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mogul.core.errors import BackendError
from mogul.serve import Engine
from mogul.serve.options import EngineOptions

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
}
KEYS = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 4}


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("bert", SMALL, "attends to what stands behind a token"),
        ("doge", {**KEYS, "num_key_value_heads": 4}, "makes a mask of its own"),
        ("falcon_h1", {**KEYS, **MAMBA}, "layers of hybrid"),
        (
            "llama4_text",
            {
                **KEYS,
                "num_local_experts": 2,
                "intermediate_size_mlp": 32,
                "attention_chunk_size": 8,
            },
            "layers of chunked_attention",
        ),
    ],
)
def test_what_pages_cannot_hold_is_refused(kind: str, config: dict, words: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **config)).eval()
    before = model.config._attn_implementation
    with pytest.raises(BackendError, match=words):
        Engine(model, options=EngineOptions(cache_tokens=64, max_length=32))
    assert model.config._attn_implementation == before
