"""What mogul knows of each model family, as data: config keys, tensor names, router, layout.

A family says how its `config.json` describes the shape; `read_config.py` turns the description
into a ModelSpec. A fact is a plain value where the architecture fixes it and a `Key` where the
config decides. Aliases of keys that several families share are in `ALIASES`. `router_n_groups`
means grouped routing in every family (the name Intern-S1-Pro and LMDeploy use).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mogul.core.errors import ConfigError, nearest
from mogul.spec.model import ModelSpec


@dataclass(frozen=True)
class Key:
    """A fact the config decides: the key to read and its value when the key is absent."""

    name: str
    default: Any = None


@dataclass(frozen=True)
class TensorNames:
    """Regular expressions over the tensor names of a released checkpoint.

    `expert` has the group `layer`, and `expert` where every expert has tensors of its own.
    """

    expert: str = r"layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<expert>\d+)\."
    router: str = r"layers\.(?P<layer>\d+)\.mlp\.(gate|router_scale)(\.|$)"
    shared: str = r"layers\.(?P<layer>\d+)\.mlp\.shared_experts?(_gate)?\."


@dataclass(frozen=True)
class ExpertsLayout:
    """How the family's module in Transformers stores its experts as 3-D tensors."""

    is_transposed: bool = False
    """Weights are [E, in, out] instead of [E, out, in]."""

    is_concatenated: bool = True
    """Gate and up rows stand in two blocks instead of alternating."""

    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family; every field that may be a `Key` is read from the config."""

    name: str
    model_types: tuple[str, ...]
    """Values of `model_type` that mean this family, text parts of larger models included."""

    is_moe: bool = False
    attention: Literal["gqa", "mla", "split"] = "gqa"
    """`split`: grouped-query heads whose keys and values differ in width (openPangu-R)."""

    head_dim: int | None = None
    """Head width when the config has none; None means hidden size over heads."""

    kv_heads_default_to_heads: bool = True
    qkv_bias: bool | Key = False
    output_bias: bool | Key = False
    dense_bias: bool | Key = False
    qk_norm: str | Key = "none"
    window: Literal["none", "all", "flag", "alternate"] = "none"
    """Which layers have the sliding window when the config has no `layer_types`."""

    tie_embeddings: bool = False
    expert_width_key: str = "moe_intermediate_size"
    score: str | Key = "softmax"
    weighting: str | Key = "probability"
    norm_topk_default: bool | None = None
    """Default of `norm_topk_prob`; None means the family ignores that key."""

    has_selection_bias: bool | Key = False
    router_has_bias: bool = False
    has_expert_scale: bool | Key = False
    limits_groups: bool = False
    """Honours `n_group` and `topk_group`: a top-k inside the best groups, without balance."""

    groups_default_to_picks: bool = False
    shared_has_gate: bool = False
    expert_bias: bool = False
    tensors: TensorNames = TensorNames()
    layout: ExpertsLayout = ExpertsLayout()

    def part_of(self, tensor_name: str) -> str:
        """Name the part of `ModelSpec.breakdown()` a tensor of a released checkpoint is in."""
        for part, pattern in self._patterns():
            if re.search(pattern, tensor_name):
                return part
        return "other"

    def _patterns(self) -> tuple[tuple[str, str], ...]:
        return (
            ("routed experts", self.tensors.expert),
            ("shared experts", self.tensors.shared),
            ("routers", self.tensors.router),
            ("attention", r"\.self_attn\."),
            ("dense feed-forward", r"\.mlp\.(gate_proj|up_proj|down_proj|gate_up_proj)\."),
            ("input embedding", r"embed_tokens\."),
            ("output head", r"lm_head\."),
            ("norms", r"(^|[._])(layer)?norm\."),
        )


ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "num_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "experts_per_token", "moe_topk"),
    "router_n_groups": ("router_n_groups", "num_expert_groups"),
    "n_shared_experts": ("n_shared_experts", "num_shared_experts"),
    "num_nextn_predict_layers": ("num_nextn_predict_layers", "num_mtp_layers"),
    "first_k_dense_replace": ("first_k_dense_replace", "num_dense_layers"),
    "dtype": ("dtype", "torch_dtype"),
}

_ATTENTION_BIAS: dict[str, Any] = {
    "qkv_bias": Key("attention_bias", False),
    "output_bias": Key("attention_bias", False),
}
_QWEN3: dict[str, Any] = {**_ATTENTION_BIAS, "qk_norm": "head", "kv_heads_default_to_heads": False}
_MIXTRAL_TENSORS = TensorNames(
    expert=r"layers\.(?P<layer>\d+)\.block_sparse_moe\.experts\.(?P<expert>\d+)\.",
    router=r"layers\.(?P<layer>\d+)\.block_sparse_moe\.(gate|e_score_correction_bias)(\.|$)",
)
_FUSED_EXPERT = r"layers\.(?P<layer>\d+)\.mlp\.experts\.(gate_up_proj|down_proj)"

_DENSE = (
    Family(name="llama", model_types=("llama",), **_ATTENTION_BIAS, dense_bias=Key("mlp_bias")),
    Family(
        name="mistral",
        model_types=("mistral",),
        kv_heads_default_to_heads=False,
        window="all",
    ),
    Family(name="qwen2", model_types=("qwen2",), qkv_bias=True, window="flag"),
    Family(name="qwen3", model_types=("qwen3",), head_dim=128, window="flag", **_QWEN3),
    Family(name="phi3", model_types=("phi3",), window="all"),
    Family(name="olmo2", model_types=("olmo2",), qk_norm="full", **_ATTENTION_BIAS),
    Family(
        name="smollm3",
        model_types=("smollm3",),
        kv_heads_default_to_heads=False,
        dense_bias=Key("mlp_bias"),
        window="flag",
        tie_embeddings=True,
        **_ATTENTION_BIAS,
    ),
)

_MOE = (
    Family(
        name="qwen2_moe",
        model_types=("qwen2_moe",),
        is_moe=True,
        qkv_bias=Key("qkv_bias", True),
        window="flag",
        norm_topk_default=False,
        shared_has_gate=True,
    ),
    Family(
        name="qwen3_moe",
        model_types=("qwen3_moe",),
        is_moe=True,
        window="flag",
        norm_topk_default=False,
        **_QWEN3,
    ),
    Family(
        name="qwen3_vl_moe",
        model_types=("qwen3_vl_moe", "qwen3_vl_moe_text"),
        is_moe=True,
        weighting="renormalised",
        tensors=TensorNames(expert=_FUSED_EXPERT),
        **_QWEN3,
    ),
    Family(
        name="interns1_pro",
        model_types=("interns1_pro", "interns1_pro_text"),
        is_moe=True,
        norm_topk_default=True,
        **_QWEN3,
    ),
    Family(
        name="olmoe",
        model_types=("olmoe",),
        is_moe=True,
        qk_norm="full",
        expert_width_key="intermediate_size",
        norm_topk_default=False,
        **_ATTENTION_BIAS,
    ),
    Family(
        name="mixtral",
        model_types=("mixtral",),
        is_moe=True,
        kv_heads_default_to_heads=False,
        window="all",
        expert_width_key="intermediate_size",
        weighting="renormalised",
        tensors=_MIXTRAL_TENSORS,
    ),
    Family(
        name="minimax_m2",
        model_types=("minimax_m2",),
        is_moe=True,
        kv_heads_default_to_heads=False,
        head_dim=128,
        qk_norm="full",
        expert_width_key="intermediate_size",
        score="sigmoid",
        weighting="renormalised",
        has_selection_bias=True,
        tensors=_MIXTRAL_TENSORS,
    ),
    Family(
        name="deepseek_v2",
        model_types=("deepseek_v2",),
        is_moe=True,
        attention="mla",
        dense_bias=Key("mlp_bias"),
        limits_groups=True,
        **_ATTENTION_BIAS,
    ),
    Family(
        name="deepseek_v3",
        model_types=("deepseek_v3", "kimi_k2"),
        is_moe=True,
        attention="mla",
        score="sigmoid",
        norm_topk_default=True,
        has_selection_bias=True,
        limits_groups=True,
        **_ATTENTION_BIAS,
    ),
    Family(
        name="glm4_moe",
        model_types=("glm4_moe",),
        is_moe=True,
        kv_heads_default_to_heads=False,
        qkv_bias=Key("attention_bias", False),
        qk_norm=Key("use_qk_norm", False),
        score="sigmoid",
        norm_topk_default=True,
        has_selection_bias=True,
        limits_groups=True,
    ),
    Family(
        name="dots1",
        model_types=("dots1",),
        is_moe=True,
        qk_norm="head",
        window="flag",
        score="sigmoid",
        norm_topk_default=False,
        has_selection_bias=True,
        limits_groups=True,
        **_ATTENTION_BIAS,
    ),
    Family(
        name="gpt_oss",
        model_types=("gpt_oss",),
        is_moe=True,
        kv_heads_default_to_heads=False,
        head_dim=64,
        qkv_bias=Key("attention_bias", True),
        output_bias=Key("attention_bias", True),
        window="alternate",
        expert_width_key="intermediate_size",
        weighting="renormalised",
        router_has_bias=True,
        expert_bias=True,
        tensors=TensorNames(expert=_FUSED_EXPERT, router=r"layers\.(?P<layer>\d+)\.mlp\.router\."),
        layout=ExpertsLayout(is_transposed=True, is_concatenated=False, has_bias=True),
    ),
)

_GROUPED = (
    Family(
        name="PanguProMoE",
        model_types=("PanguProMoE",),
        is_moe=True,
        kv_heads_default_to_heads=False,
        qkv_bias=True,
        output_bias=True,
        has_expert_scale=True,
        groups_default_to_picks=True,
    ),
    Family(
        name="PanguProMoEV2",
        model_types=("PanguProMoEV2",),
        is_moe=True,
        attention="split",
        kv_heads_default_to_heads=False,
        qk_norm="key",
        score="sigmoid",
        norm_topk_default=True,
        has_selection_bias=Key("router_enable_expert_bias", True),
    ),
    Family(
        name="moge",
        model_types=("moge",),
        is_moe=True,
        qkv_bias=Key("attention_bias", False),
        output_bias=Key("attention_output_bias", False),
        qk_norm=Key("use_qk_norm", False),
        window="all",
        score=Key("router_score", "softmax"),
        weighting=Key("router_weighting", "probability"),
        has_selection_bias=Key("router_selection_bias", False),
        has_expert_scale=Key("router_scale", False),
    ),
)

FAMILIES: Mapping[str, Family] = {family.name: family for family in (*_GROUPED, *_MOE, *_DENSE)}

_BY_MODEL_TYPE = {kind: family for family in FAMILIES.values() for kind in family.model_types}


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the text decoder's part of a config: the nested `text_config`, or all of it."""
    nested = config.get("text_config")
    if not isinstance(nested, Mapping):
        return config
    outer = {key: config[key] for key in ("model_type", "tie_word_embeddings") if key in config}
    stored = {key: config[key] for key in ("quantization_config", "dtype") if key in config}
    return {**outer, **stored, **nested}


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family of a `config.json` by its `model_type`.

    openPangu-R-72B's config says "PanguProMoE" like its predecessor's; the architecture's name
    or its sink keys tell it apart.

    Raises:
        ConfigError: no `model_type`, or one mogul does not know (with the nearest names).
    """
    text = text_config(config)
    kind = text.get("model_type")
    if not kind:
        raise ConfigError(
            "the config has no key 'model_type'",
            fix=f"is this a language model's config.json? known: {', '.join(FAMILIES)}",
        )
    if kind == "PanguProMoE" and _is_second_pangu(config):
        return FAMILIES["PanguProMoEV2"]
    if str(kind) not in _BY_MODEL_TYPE:
        raise ConfigError(f"unknown model_type {kind!r}", fix=nearest(str(kind), _BY_MODEL_TYPE))
    return _BY_MODEL_TYPE[kind]


def _is_second_pangu(config: Mapping[str, Any]) -> bool:
    architectures = config.get("architectures") or ()
    return "param_sink_number" in config or "MoEV2" in str(architectures)


def model_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Read the shape of a model from its `config.json`.

    Raises:
        ConfigError: an unknown family, a missing key or values that cannot be.
    """
    from mogul.spec.read_config import build_spec

    return build_spec(text_config(config), family_of(config))
