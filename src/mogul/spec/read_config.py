"""Turn a `config.json` and its family's description into a ModelSpec.

All missing keys are named at once; two aliases of one key that disagree are an error. A null is
an absent key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from mogul.core.errors import ConfigError
from mogul.spec.families import ALIASES, Family, Key
from mogul.spec.grouping import Grouping
from mogul.spec.model import MOST_LAYERS, AttentionShape, ModelSpec, MoeShape, RouterShape
from mogul.spec.parameters import short_dtype

_ALWAYS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
_ATTENTION_KEYS = {
    "gqa": (),
    "mla": ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    "split": ("qk_nope_dim", "qk_rope_dim", "v_channels"),
}
_FROM_ONE = frozenset({*_ALWAYS, *_ATTENTION_KEYS["split"], "decoder_sparse_step", "head_dim"})
_COUNTS = (
    *_ATTENTION_KEYS["mla"], "q_lora_rank", "num_key_value_heads", "value_head_dim",
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "intermediate_size",
    "shared_expert_intermediate_size", "n_shared_experts", "router_n_groups", "n_group",
    "topk_group", "first_k_dense_replace", "max_window_layers", "num_sink_keys",
    "param_sink_number", "num_nextn_predict_layers",
)  # fmt: skip
_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    **dict.fromkeys(_COUNTS, (int, "a whole number")),
    **dict.fromkeys(_FROM_ONE, (int, "a whole number above 0")),
    "mlp_only_layers": ((list, tuple), "a list of layers"),
    "layer_types": ((list, tuple), "a list, one kind a layer"),
    "quantization_config": (dict, "an object"),
}
"""Keys that are computed with: what they must be."""


class ConfigReader:
    """A config with its aliases resolved and its family's defaults at hand."""

    def __init__(self, config: Mapping[str, Any], family: Family) -> None:
        self.config = config
        self.family = family

    def get(self, name: str, default: Any = None) -> Any:
        """Return the value of a key or one of its aliases; null counts as absent."""
        aliases = ALIASES.get(name, (name,))
        found = {key: self.config[key] for key in aliases if self.config.get(key) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values[1:]):
            told = " and ".join(f"{key}={value!r}" for key, value in found.items())
            raise ConfigError(
                f"the config contradicts itself: {told} mean the same", fix="keep one of them"
            )
        if not values:
            return default
        kind, words = _KINDS.get(name, (object, ""))
        is_right = isinstance(values[0], kind) and not (kind is int and values[0] is True)
        if not is_right or (name in _FROM_ONE and values[0] < 1):
            key = next(iter(found))
            raise ConfigError(f"the config's {key} is {values[0]!r}", fix=f"give {words}")
        if name == "num_hidden_layers" and values[0] > MOST_LAYERS:
            raise ConfigError(
                f"the config has {values[0]:,} layers", fix=f"give at most {MOST_LAYERS:,}"
            )
        return values[0]

    def fact(self, value: Any) -> Any:
        """Return a family's fact: itself, or what the config says where it is a Key."""
        return self.get(value.name, value.default) if isinstance(value, Key) else value

    def require(self, *names: str) -> None:
        """Raise ConfigError naming every absent key of `names`."""
        missing = [name for name in names if self.get(name) is None]
        if missing:
            told = ", ".join(" or ".join(map(repr, ALIASES.get(key, (key,)))) for key in missing)
            raise ConfigError(
                f"the config of family {self.family.name!r} lacks {told}",
                fix="add it; is the config.json complete?",
            )


def build_spec(config: Mapping[str, Any], family: Family) -> ModelSpec:
    """Read a text decoder's config; see `families.model_spec`."""
    reader = ConfigReader(config, family)
    num_experts = _check_keys(reader)
    num_layers = reader.get("num_hidden_layers")
    moe_layers = _moe_layers(reader, num_layers) if num_experts else ()
    return ModelSpec.parse(
        {
            "family": family.name,
            "vocab_size": reader.get("vocab_size"),
            "hidden_size": reader.get("hidden_size"),
            "num_layers": num_layers,
            "attention": _attention(reader, num_layers),
            "dense_width": _dense_width(reader, len(moe_layers) < num_layers),
            "dense_bias": bool(reader.fact(family.dense_bias)),
            "moe": _moe(reader) if moe_layers else None,
            "moe_layers": moe_layers,
            "norms_per_layer": 4 if reader.get("sandwich_norm", False) else 2,
            "tie_embeddings": bool(reader.get("tie_word_embeddings", family.tie_embeddings)),
            "max_positions": reader.get("max_position_embeddings"),
            "dtype": _stored_dtype(reader),
            "num_uncounted_mtp_layers": reader.get("num_nextn_predict_layers", 0),
        },
        where="config.json",
    )


def _check_keys(reader: ConfigReader) -> int:
    family = reader.family
    names = [*_ALWAYS, *_ATTENTION_KEYS[family.attention]]
    if not family.kv_heads_default_to_heads:
        names.append("num_key_value_heads")
    num_experts = reader.get("num_experts") if family.is_moe else 0
    if family.is_moe and num_experts != 0:
        names += ["num_experts", "num_experts_per_tok", family.expert_width_key]
    reader.require(*names)
    return num_experts


def _moe_layers(reader: ConfigReader, num_layers: int) -> tuple[int, ...]:
    first = reader.get("first_k_dense_replace", 0)
    step = reader.get("decoder_sparse_step", 1)
    dense = set(reader.get("mlp_only_layers", ()))
    return tuple(
        layer
        for layer in range(first, num_layers)
        if layer not in dense and (layer + 1) % step == 0
    )


def _dense_width(reader: ConfigReader, has_dense_layers: bool) -> int:
    if not has_dense_layers:
        return 0
    reader.require("intermediate_size")
    return reader.get("intermediate_size")


def _stored_dtype(reader: ConfigReader) -> str:
    quantised = (reader.get("quantization_config") or {}).get("quant_method")
    return quantised or short_dtype(str(reader.get("dtype", "bf16")))


def _attention(reader: ConfigReader, num_layers: int) -> AttentionShape:
    family, heads = reader.family, reader.get("num_attention_heads")
    shape: dict[str, Any] = {
        "kind": "mla" if family.attention == "mla" else "gqa",
        "num_heads": heads,
        "num_kv_heads": reader.get("num_key_value_heads", heads),
        "qkv_bias": bool(reader.fact(family.qkv_bias)),
        "output_bias": bool(reader.fact(family.output_bias)),
        "qk_norm": _qk_norm(reader),
        **_head_widths(reader, heads),
    }
    if window := _window(reader):
        shape["sliding_window"] = window
        shape["num_windowed_layers"] = _num_windowed(reader, num_layers)
    return AttentionShape.parse(shape, where="config.json: attention")


def _qk_norm(reader: ConfigReader) -> str:
    if reader.get("use_k_norm_only", False):
        return "key"
    norm = reader.fact(reader.family.qk_norm)
    return norm if isinstance(norm, str) else ("head" if norm else "none")


def _head_widths(reader: ConfigReader, heads: int) -> dict[str, Any]:
    family = reader.family
    if family.attention == "mla":
        rope = reader.get("qk_rope_head_dim")
        return {
            "num_kv_heads": heads,
            "key_dim": reader.get("qk_nope_head_dim") + rope,
            "value_dim": reader.get("v_head_dim"),
            "q_lora_rank": reader.get("q_lora_rank"),
            "kv_lora_rank": reader.get("kv_lora_rank"),
            "rope_dim": rope,
        }
    if family.attention == "split":
        key_dim = reader.get("qk_nope_dim") + reader.get("qk_rope_dim")
        value_dim = reader.get("v_channels")
        sink_dim = key_dim + (value_dim if reader.get("param_sink_with_value", False) else 0)
        rows = reader.get("param_sink_number", 0) * reader.get("num_key_value_heads")
        return {"key_dim": key_dim, "value_dim": value_dim, "num_sinks": rows * sink_dim}
    width = reader.get("head_dim", family.head_dim) or reader.get("hidden_size") // heads
    value_width = reader.get("value_head_dim", width)
    if family.name == "gpt_oss":  # one learned number a head
        sinks = heads
    else:  # learned keys, and with `use_sink_values` values, before the first position
        sink_dim = width + (value_width if reader.get("use_sink_values", False) else 0)
        sinks = reader.get("num_sink_keys", 0) * reader.get("num_key_value_heads", heads) * sink_dim
    return {"key_dim": width, "value_dim": value_width, "num_sinks": sinks}


def _window(reader: ConfigReader) -> int | None:
    rule = reader.family.window
    is_off = rule == "flag" and not reader.get("use_sliding_window", False)
    return None if rule == "none" or is_off else reader.get("sliding_window")


def _num_windowed(reader: ConfigReader, num_layers: int) -> int:
    if layer_types := reader.get("layer_types"):
        return sum(kind == "sliding_attention" for kind in layer_types)
    if reader.family.window == "alternate":
        return (num_layers + 1) // 2
    first = reader.get("max_window_layers", 0) if reader.family.window == "flag" else 0
    return max(0, num_layers - first)


def _moe(reader: ConfigReader) -> MoeShape:
    family = reader.family
    picks = reader.get("num_experts_per_tok")
    width = reader.get(family.expert_width_key)
    groups = reader.get("router_n_groups", picks if family.groups_default_to_picks else 1)
    shared = reader.get("shared_expert_intermediate_size")
    if shared is None:
        shared = reader.get("n_shared_experts", 0) * width
    grouping = {
        "num_experts": reader.get("num_experts"),
        "num_groups": max(1, groups),
        "top_k": picks,
    }
    return MoeShape(
        grouping=Grouping.parse(grouping, where="config.json: routing"),
        router=_router(reader),
        expert_width=width,
        expert_bias=family.expert_bias,
        shared_width=shared,
        shared_has_gate=family.shared_has_gate,
    )


def _router(reader: ConfigReader) -> RouterShape:
    family = reader.family
    router: dict[str, Any] = {
        "score": reader.fact(family.score),
        "weighting": _weighting(reader),
        "scaling_factor": reader.get("routed_scaling_factor", 1.0),
        "has_selection_bias": bool(reader.fact(family.has_selection_bias)),
        "has_bias": family.router_has_bias,
        "has_expert_scale": bool(reader.fact(family.has_expert_scale)),
        "num_null_experts": reader.get("num_null_experts", 0),
    }
    # a plain greedy top-k ignores n_group, and so does grouped routing, which replaces it
    ignored = reader.get("topk_method") == "greedy" or reader.get("router_n_groups", 1) > 1
    if family.limits_groups and not ignored and reader.get("n_group", 1) > 1:
        router["limit_num_groups"] = reader.get("n_group")
        router["limit_groups"] = reader.get("topk_group")
    return RouterShape.parse(router, where="config.json: router")


def _weighting(reader: ConfigReader) -> Literal["probability", "renormalised"] | str:
    if reader.family.norm_topk_default is None:
        return reader.fact(reader.family.weighting)
    renormalises = reader.get("norm_topk_prob", reader.family.norm_topk_default)
    return "renormalised" if renormalises else "probability"
