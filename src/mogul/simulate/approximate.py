"""Families mogul cannot run but can price: read as the nearest shape it knows, with a note.

Linear attention (Qwen3.5) is priced as a window whose cache has the bytes of its state; sparse
attention (GLM-5's and DeepSeek-V3.2's indexer) as a window of the tokens it selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogul.spec.families import model_spec, text_config
from mogul.spec.model import ModelSpec

STATE_BYTES = 4
"""The recurrent state of linear attention is kept in fp32."""


def spec_to_price(config: Mapping[str, Any]) -> tuple[ModelSpec, str]:
    """Read a config; a family mogul does not know is approximated.

    Returns:
        The shape and a note on what was approximated (empty: nothing).

    Raises:
        ConfigError: the family is unknown here too.
    """
    text = dict(text_config(config))
    kind = str(text.get("model_type", ""))
    if kind.startswith("qwen3_5_moe"):
        return _linear_attention(text), "linear attention priced as a window of equal bytes"
    if kind in ("glm_moe_dsa", "deepseek_v32"):
        return _sparse_attention(text), "sparse attention priced as a window of its selection"
    return model_spec(config), ""


def _linear_attention(text: dict[str, Any]) -> ModelSpec:
    linear_layers = text["layer_types"].count("linear_attention")
    spec = model_spec({**text, "model_type": "qwen3_moe", "tie_word_embeddings": False})
    heads, width = text["linear_num_value_heads"], text["linear_value_head_dim"]
    state_bytes = 2 * heads * width * text["linear_key_head_dim"] * STATE_BYTES  # read and written
    window = round(state_bytes / (spec.attention.kv_elements * 2))
    attention = spec.attention.replace(sliding_window=window, num_windowed_layers=linear_layers)
    return spec.replace(attention=attention)


def _sparse_attention(text: dict[str, Any]) -> ModelSpec:
    spec = model_spec({**text, "model_type": "deepseek_v3"})
    attention = spec.attention.replace(
        sliding_window=text["index_topk"], num_windowed_layers=spec.num_layers
    )
    return spec.replace(attention=attention)
