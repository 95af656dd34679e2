"""Express other families' configs as a `MogeConfig`, or refuse naming what it cannot hold.

The shape is read by `mogul.spec.families` (which knows every family's keys); this file adds what
a running model needs beside it: rotary positions, norms, token ids. Intern-S1-Pro's text decoder
is Qwen3-MoE with grouped routing; openPangu-R-72B has sigmoid scores, key norms, sink keys and
sandwich norms. A config of another family with `router_n_groups` above 1 means grouped routing,
which Transformers' own class would ignore without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mogul.core.errors import ConfigError
from mogul.core.log import say
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.spec.families import family_of, model_spec, text_config
from mogul.spec.model import ModelSpec, MoeShape

# Families whose checkpoints have the tensor names of MogeForCausalLM.
SAME_TENSORS = ("qwen3_moe", "interns1_pro")
COPIED = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "initializer_range", "bos_token_id",
    "eos_token_id", "pad_token_id", "output_router_logits", "router_aux_loss_coef", "dtype",
    "torch_dtype", "attention_dropout",
)  # fmt: skip


def moge_config(config: Mapping[str, Any], *, exact: bool = True) -> MogeConfig:
    """Convert the content of a `config.json`; `exact=False` tells of a difference and goes on.

    Raises:
        ConfigError: the family has something that MogeConfig cannot express.
    """
    spec, text = model_spec(config), text_config(config)
    if spec.moe is None:
        raise ConfigError(
            f"family {spec.family!r} has no experts", fix="upcycle it: mogul.models.upcycle"
        )
    _check(spec, spec.moe)
    values = {key: text[key] for key in COPIED if text.get(key) is not None}
    values |= _shape(spec) | _routing(spec.moe) | _positions(text, spec.family, exact=exact)
    if spec.family == "PanguProMoEV2":
        values["rope_interleaved"] = bool(text.get("rope_interleave", True))
        values["num_sink_keys"] = text.get("param_sink_number", 0)
        values["use_sink_values"] = bool(text.get("param_sink_with_value", False))
    return MogeConfig(**values)


def is_grouped_elsewhere(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for grouped routing of a family that is not one of ours."""
    try:
        family = family_of(config).name
    except ConfigError:
        return False
    groups = text_config(config).get("router_n_groups") or 1
    return family == "PanguProMoEV2" or (family not in ("moge", "PanguProMoE") and groups > 1)


def _check(spec: ModelSpec, moe: MoeShape) -> None:
    attention, windowed = spec.attention, spec.attention.num_windowed_layers
    faults = {
        "latent attention (MLA)": attention.kind != "gqa",
        "a norm over all heads of q and k": attention.qk_norm == "full",
        "a window in some layers only": windowed not in (0, spec.num_layers),
        "a router with a bias": moe.router.has_bias,
        "experts with biases": moe.expert_bias,
        "a shared expert behind a gate": moe.shared_has_gate and moe.shared_width > 0,
        "group-limited top-k routing": moe.router.limit_groups is not None,
        "dense layers with biases": spec.dense_bias,
        "attention sinks of another kind": attention.num_sinks and spec.family != "PanguProMoEV2",
    }
    if told := [fault for fault, is_there in faults.items() if is_there]:
        raise ConfigError(
            f"family {spec.family!r} cannot be expressed as a MogeConfig: it has {', '.join(told)}",
            fix="load it with Transformers' own class",
        )


def _shape(spec: ModelSpec) -> dict[str, Any]:
    attention = spec.attention
    return {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.key_dim,
        "value_head_dim": attention.value_dim,
        "attention_bias": attention.qkv_bias,
        "attention_output_bias": attention.output_bias,
        "use_qk_norm": attention.qk_norm == "head",
        "use_k_norm_only": attention.qk_norm == "key",
        "sliding_window": attention.sliding_window if attention.num_windowed_layers else None,
        "sandwich_norm": spec.norms_per_layer == 4,
        "tie_word_embeddings": spec.tie_embeddings,
        "intermediate_size": spec.dense_width or None,
        "mlp_only_layers": sorted(set(range(spec.num_layers)) - set(spec.moe_layers)),
    }


def _routing(moe: MoeShape) -> dict[str, Any]:
    router, grouping = moe.router, moe.grouping
    return {
        "num_experts": grouping.num_experts,
        "num_experts_per_tok": grouping.top_k,
        "router_n_groups": grouping.num_groups,
        "moe_intermediate_size": moe.expert_width,
        "shared_expert_intermediate_size": moe.shared_width,
        "router_score": router.score,
        "router_weighting": router.weighting,
        "router_selection_bias": router.has_selection_bias,
        "router_scale": router.has_expert_scale,
        "routed_scaling_factor": router.scaling_factor,
        "num_null_experts": router.num_null_experts,
    }


def _positions(text: Mapping[str, Any], family: str, *, exact: bool) -> dict[str, Any]:
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    if fourier := sorted(key for key in rope if key.startswith("fope")):
        told = f"{family}: Fourier positions ({', '.join(fourier)}) are not implemented"
        if exact:
            raise ConfigError(told, fix="pass exact=False to use plain rotary positions")
        say(f"{told}; plain rotary positions are used")
        rope = {k: v for k, v in rope.items() if not k.startswith("fope") and k != "num_inv_freq"}
    if "rope_theta" in text:
        rope.setdefault("rope_theta", text["rope_theta"])
    if "qk_rope_dim" in text:
        rope["partial_rotary_factor"] = text["qk_rope_dim"] / (
            text["qk_rope_dim"] + text["qk_nope_dim"]
        )
    return {"rope_parameters": rope or None}
