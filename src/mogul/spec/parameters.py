"""Count the parameters of a ModelSpec, part by part.

Letters: D hidden size, V vocabulary, F inner width, E experts. A gated feed-forward net (SwiGLU)
has 3*D*F parameters. Buffers (selection biases, rotary tables) are no parameters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mogul.core.errors import ConfigError, nearest

if TYPE_CHECKING:
    from mogul.spec.model import AttentionShape, ModelSpec, MoeShape

DTYPE_BITS = {"fp64": 64, "fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}

_LONG_NAMES = {
    "float64": "fp64",
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float8_e4m3fn": "fp8",
}


def short_dtype(name: str) -> str:
    """Shorten a dtype's name: torch.bfloat16 and bfloat16 become bf16; others stay."""
    bare = name.removeprefix("torch.")
    return _LONG_NAMES.get(bare, bare)


def num_bytes(count: int, dtype: str) -> int:
    """Bytes of `count` numbers of a dtype, rounded up."""
    short = short_dtype(dtype)
    if short not in DTYPE_BITS:
        raise ConfigError(f"unknown dtype {dtype!r}", fix=nearest(dtype, DTYPE_BITS))
    return -(-count * DTYPE_BITS[short] // 8)


def breakdown(spec: ModelSpec) -> dict[str, int]:
    """Parameters by part of the model; parts it lacks are left out."""
    hidden, moe_layers = spec.hidden_size, len(spec.moe_layers)
    dense_layers = spec.num_layers - moe_layers
    table = spec.vocab_size * hidden
    parts = {
        "input embedding": table,
        "attention": spec.num_layers * attention_params(spec.attention, hidden),
        "dense feed-forward": dense_layers * ffn_params(hidden, spec.dense_width, spec.dense_bias),
    }
    if spec.moe:
        parts["routed experts"] = moe_layers * routed_params(spec)
        parts["shared experts"] = moe_layers * shared_params(spec.moe, hidden)
        parts["routers"] = moe_layers * router_params(spec.moe, hidden)
    parts["norms"] = (spec.num_layers * spec.norms_per_layer + 1) * hidden
    parts["output head"] = 0 if spec.tie_embeddings else table
    return {name: count for name, count in parts.items() if count}


def active_params(spec: ModelSpec, *, input_embedding: bool = True) -> int:
    """Parameters one token uses; see `ModelSpec.active_params`."""
    parts = breakdown(spec)
    active = sum(parts.values())
    if spec.moe:
        grouping = spec.moe.grouping
        idle = grouping.num_experts - grouping.top_k
        active -= len(spec.moe_layers) * idle * expert_params(spec.moe, spec.hidden_size)
        active -= spec.hidden_size  # the final norm
    if not input_embedding and not spec.tie_embeddings:
        active -= parts["input embedding"]
    return active


def ffn_params(hidden: int, width: int, has_bias: bool = False) -> int:
    """Parameters of one gated feed-forward net; biases on all three maps or none."""
    return 3 * hidden * width + (2 * width + hidden if has_bias else 0)


def expert_params(moe: MoeShape, hidden: int) -> int:
    """Parameters of one routed expert."""
    return ffn_params(hidden, moe.expert_width, moe.expert_bias)


def routed_params(spec: ModelSpec) -> int:
    """Parameters of all routed experts of one layer."""
    if spec.moe is None:
        return 0
    return spec.moe.grouping.num_experts * expert_params(spec.moe, spec.hidden_size)


def shared_params(moe: MoeShape, hidden: int) -> int:
    """Parameters of the shared experts of one layer, with their gate."""
    gate = hidden if moe.shared_has_gate and moe.shared_width else 0
    return ffn_params(hidden, moe.shared_width) + gate


def router_params(moe: MoeShape, hidden: int) -> int:
    """Parameters of one router."""
    outputs = moe.grouping.num_experts + moe.router.num_null_experts
    bias = outputs if moe.router.has_bias else 0
    scale = moe.grouping.num_experts if moe.router.has_expert_scale else 0
    return outputs * hidden + bias + scale


def attention_params(attention: AttentionShape, hidden: int) -> int:
    """Parameters of one attention layer, norms and sinks inside it included."""
    count = _latent_params if attention.kind == "mla" else _grouped_query_params
    value_width = attention.num_heads * attention.value_dim
    output = value_width * hidden + (hidden if attention.output_bias else 0)
    return count(attention, hidden) + output + attention.num_sinks


def _grouped_query_params(attention: AttentionShape, hidden: int) -> int:
    q = attention.num_heads * attention.key_dim
    k = attention.num_kv_heads * attention.key_dim
    v = attention.num_kv_heads * attention.value_dim
    norm = {"none": 0, "head": 2 * attention.key_dim, "full": q + k, "key": attention.key_dim}
    return (hidden + int(attention.qkv_bias)) * (q + k + v) + norm[attention.qk_norm]


def _latent_params(attention: AttentionShape, hidden: int) -> int:
    heads, key_dim = attention.num_heads, attention.key_dim
    inputs = hidden + int(attention.qkv_bias)
    latent = attention.kv_lora_rank
    count = inputs * (latent + attention.rope_dim) + latent  # down-projection and its norm
    count += latent * heads * (key_dim - attention.rope_dim + attention.value_dim)
    if attention.q_lora_rank is None:
        return count + hidden * heads * key_dim
    rank = attention.q_lora_rank
    return count + inputs * rank + rank + rank * heads * key_dim
