"""What an upcycling may be: which dense models, how many experts and groups, and the new config.

Refusals live here and come before any tensor is read. Only the sizes of the dense model and the
`UpcyclePlan` decide the `MogeConfig`; the weights are the matter of `algebra`.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator
from transformers import PreTrainedConfig

from mogul.core.errors import ConfigError
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.spec.base import Spec
from mogul.spec.grouping import Grouping, divisors

DENSE_MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
"""Dense architectures that can be upcycled: model_type -> class."""

_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")

_SAME_KEYS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_act",
    "max_position_embeddings",
    "rope_parameters",
    "rms_norm_eps",
    "initializer_range",
    "tie_word_embeddings",
    "attention_dropout",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


class UpcyclePlan(Spec):
    """E experts in M groups made from one dense model; one pick in every group."""

    num_experts: int = Field(ge=1)
    """Routed experts in every layer (E)."""
    num_groups: int = Field(ge=1)
    """Groups (M): the FFN is cut in M shards, shard g lives in the E/M experts of group g."""
    top_k: int | None = None
    """Picks a token: M, the only number that keeps the dense function at the dense cost."""
    seed: int = Field(default=0, ge=0)
    """Seed of the router rows and of the noise."""
    noise: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of each expert's inner columns drawn anew (drop-upcycling); 0 keeps the function."""

    @model_validator(mode="after")
    def _one_pick_a_group(self) -> Self:
        if self.top_k not in (None, self.num_groups):
            raise ConfigError(
                f"{self.top_k} picks a token in {self.num_groups} groups: upcycling makes exactly "
                "one pick a group, since one group holds copies of one shard",
                fix=f"leave the picks out, or use {self.num_groups}",
            )
        if self.grouping.group_size == 1:
            raise ConfigError(
                f"{self.num_experts} experts in {self.num_groups} groups leave one expert a group: "
                "its router would have nothing to choose",
                fix=f"use {2 * self.num_groups} experts or more, or fewer groups",
            )
        return self

    @property
    def grouping(self) -> Grouping:
        """The grouping of the upcycled model, K = M."""
        return Grouping(
            num_experts=self.num_experts, num_groups=self.num_groups, top_k=self.num_groups
        )

    @property
    def group_size(self) -> int:
        """Copies of each shard (E/M)."""
        return self.num_experts // self.num_groups

    def expert_width(self, ffn_width: int) -> int:
        """Inner columns of one expert, F = I/M; ConfigError when I cannot be cut so."""
        width, rest = divmod(ffn_width, self.num_groups)
        if rest or width % 2:
            cannot = (
                f"an FFN of {ffn_width} columns cannot be cut in {self.num_groups} equal shards"
                if rest
                else f"an FFN of {ffn_width} columns in {self.num_groups} groups gives shards of "
                f"{width} columns, an odd number that kernels cannot align"
            )
            raise ConfigError(cannot, fix=self._legal_groups(ffn_width))
        return width

    def redrawn_width(self, width: int) -> int:
        """Inner columns of one expert that noise draws anew."""
        return round(self.noise * width)

    def _legal_groups(self, ffn_width: int) -> str:
        legal = [
            n
            for n in divisors(ffn_width)
            if not (ffn_width // n) % 2 and not self.num_experts % n and self.num_experts > n
        ]
        if not legal:
            return f"no number of groups fits both: choose an even width, not {ffn_width}"
        return f"with {self.num_experts} experts use {', '.join(map(str, legal))} groups"


def check_dense(config: Any, class_name: str) -> None:
    """Raise ConfigError unless this is a dense model that upcycling keeps exactly."""
    kind = config.model_type
    supported = ", ".join(sorted(DENSE_MODELS.values()))
    if any(getattr(config, key, None) for key in _EXPERT_KEYS):
        raise ConfigError(
            f"{class_name} ({kind}) is a mixture of experts already",
            fix="upcycle a dense model; `mogul regroup` is for models with experts",
        )
    if kind not in DENSE_MODELS or class_name != DENSE_MODELS[kind]:
        raise ConfigError(
            f"{class_name} (model_type {kind!r}) cannot be upcycled", fix=f"use one of {supported}"
        )
    if getattr(config, "mlp_bias", False):
        raise ConfigError(
            "mlp_bias=True: experts have no biases, and a bias cannot be cut in shards",
            fix="use a model without FFN biases",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            "the model is quantised: its matrices cannot be cut as they are",
            fix="load or save it dequantised first",
        )
    _sliding_window(config)


def _sliding_window(config: Any) -> int | None:
    """The window all layers share, or None; ConfigError when only some layers have one."""
    if config.model_type == "mistral":
        return config.sliding_window
    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" not in kinds:
        return None
    if kinds == {"sliding_attention"}:
        return config.sliding_window
    raise ConfigError(
        f"layer_types mixes {' and '.join(sorted(kinds))}: a MoGE has one kind of attention",
        fix="use a model whose layers all have the same attention",
    )


def moge_config(config: PreTrainedConfig, plan: UpcyclePlan) -> MogeConfig:
    """Write down the config of the upcycled model."""
    width = plan.expert_width(config.intermediate_size)
    if plan.noise and not plan.redrawn_width(width):
        raise ConfigError(
            f"noise={plan.noise:g} of {width} columns is less than one column: no effect",
            fix=f"use 0, or at least {1 / width:.2g}",
        )
    heads = config.num_attention_heads
    keys: dict[str, Any] = {key: getattr(config, key) for key in _SAME_KEYS}
    keys |= {
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "attention_bias": config.model_type == "qwen2" or getattr(config, "attention_bias", False),
        "attention_output_bias": getattr(config, "attention_bias", False),
        "use_qk_norm": config.model_type == "qwen3",
        "sliding_window": _sliding_window(config),
    }
    return MogeConfig(
        **keys,
        architectures=["MogeForCausalLM"],
        num_experts=plan.num_experts,
        num_experts_per_tok=plan.num_groups,
        moe_intermediate_size=width,
        router_n_groups=plan.num_groups,
        router_score="softmax",
        router_weighting="renormalised_in_group",
        router_gradient="straight_through",
    )
