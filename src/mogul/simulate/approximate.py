"""Families mogul cannot run but can price: read as the nearest shape it knows, with a note.

Linear attention (Qwen3.5) is priced as a window whose cache has the bytes of its state; sparse
attention (GLM-5's and DeepSeek-V3.2's indexer) as a window of the tokens it selects.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogul.core.errors import ConfigError
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
    layers, kinds = _whole(text, "num_hidden_layers"), text.get("layer_types")
    if not isinstance(kinds, list):
        raise ConfigError(f"the config's layer_types is {kinds!r}", fix="give one kind a layer")
    if len(kinds) != layers:
        raise ConfigError(
            f"the config's layer_types names {len(kinds)} of {layers} layers",
            fix="give one kind a layer",
        )
    heads, width = _whole(text, "linear_num_value_heads"), _whole(text, "linear_value_head_dim")
    keys = _whole(text, "linear_key_head_dim")
    spec = model_spec({**text, "model_type": "qwen3_moe", "tie_word_embeddings": False})
    state_bytes = 2 * heads * width * keys * STATE_BYTES  # read and written
    window = round(state_bytes / (spec.attention.kv_elements * 2))
    attention = spec.attention.replace(
        sliding_window=window, num_windowed_layers=kinds.count("linear_attention")
    )
    return spec.replace(attention=attention)


def _sparse_attention(text: dict[str, Any]) -> ModelSpec:
    selected = _whole(text, "index_topk")
    spec = model_spec({**text, "model_type": "deepseek_v3"})
    attention = spec.attention.replace(sliding_window=selected, num_windowed_layers=spec.num_layers)
    return spec.replace(attention=attention)


def _whole(text: Mapping[str, Any], key: str) -> int:
    value = text.get(key)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"the config's {key} is {value!r}", fix=f"give {key} as a whole number above 0"
        )
    return value
