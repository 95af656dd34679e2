"""The configurations of grouped-expert models, and what their values may be.

`MogeConfig` is the general decoder: grouped or plain routing, shared experts, biases, qk-norm.
`PanguProMoEConfig` is the same model with the keys, defaults and fixed choices of the released
Pangu Pro MoE (arXiv 2505.21411, Table 1, and its configuration class). Values are checked here,
so that a model is never built from a configuration that cannot work.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, Literal

from transformers import GenerationConfig, PreTrainedConfig

from mogul.core.errors import ConfigError, nearest
from mogul.core.log import say
from mogul.spec.grouping import Grouping

CHOICES = {
    "router_score": ("softmax", "sigmoid"),
    "router_weighting": ("probability", "renormalised", "renormalised_in_group"),
    "router_gradient": ("exact", "straight_through"),
}

# Keys that are no fields but that Transformers writes, reads or pops itself.
TRANSFORMERS_KEYS = {
    "_name_or_path", "_commit_hash", "_attn_implementation_internal",
    "_experts_implementation_internal", "attn_implementation", "auto_map",
    "experts_implementation", "model_type", "name_or_path", "num_labels", "num_local_experts",
    "output_attentions", "output_router_ids", "output_router_weights", "partial_rotary_factor",
    "per_layer_config", "quantization_config", "rope_scaling", "rope_theta", "torch_dtype",
    "transformers_version", "use_return_dict",
}  # fmt: skip


def expert_parallel_plan() -> dict[str, str]:
    """Expert parallelism in the words of the installed Transformers."""
    experts = "layers.*.mlp.experts"
    plan = {f"{experts}.gate_up_proj": "grouped_gemm", f"{experts}.down_proj": "grouped_gemm"}
    if find_spec("transformers.distributed.expert_parallel"):  # tokens are dispatched
        return {**plan, experts: "ep_dispatch_experts"}
    return {"layers.*.mlp.gate": "ep_router", **plan, experts: "moe_tp_experts"}


class MogeConfig(PreTrainedConfig):
    """A decoder whose layers hold E experts in M groups; every token picks K/M in each group."""

    model_type = "moge"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012
    attribute_map = {"num_local_experts": "num_experts"}  # noqa: RUF012
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_ep_plan = expert_parallel_plan()  # pyright: ignore[reportAssignmentType]

    vocab_size: int = 32000
    hidden_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int | None = None
    """Heads of keys and values; None: as many as query heads."""
    head_dim: int | None = None
    """Width of one head; None: hidden_size / num_attention_heads."""
    hidden_act: str = "silu"
    max_position_embeddings: int = 32768
    rope_parameters: dict | None = None
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Biases on the q, k and v projections."""
    attention_output_bias: bool = False
    """A bias on the output projection of attention."""
    attention_dropout: float | int = 0.0
    use_qk_norm: bool = False
    """RMSNorm over each head of q and k, before the rotation."""
    use_k_norm_only: bool = False
    """The same norm on k alone."""
    sliding_window: int | None = None
    """Positions a token attends to in every layer; None: all."""
    value_head_dim: int | None = None
    """Width of one head of values; None: head_dim."""
    rope_interleaved: bool = False
    """Rotate channel pairs (2i, 2i+1) instead of (i, i + C/2). The rotated share of a head is
    `partial_rotary_factor` in `rope_parameters`; its first channels are rotated."""
    num_sink_keys: int = 0
    """Learned keys in every layer and key-value head that every token sees first."""
    use_sink_values: bool = False
    """Learned values beside the sink keys; otherwise their values are zero."""
    sandwich_norm: bool = False
    """Norm the output of attention and of the feed-forward too (four norms a layer)."""

    intermediate_size: int | None = None
    """Width of the dense feed-forward of the layers in `mlp_only_layers`."""
    mlp_only_layers: list[int] | None = None
    """Layers with a dense feed-forward instead of experts."""
    num_experts: int = 64
    """Routed experts a layer (E)."""
    num_experts_per_tok: int = 8
    """Picks a token over all groups (K)."""
    moe_intermediate_size: int = 256
    """Inner width of one routed expert."""
    router_n_groups: int = 1
    """Groups the experts stand in (M); 1 is plain top-k routing."""
    shared_expert_intermediate_size: int = 0
    """Inner width of the expert every token passes; 0: none."""

    router_score: Literal["softmax", "sigmoid"] = "softmax"
    router_weighting: Literal["probability", "renormalised", "renormalised_in_group"] = (
        "probability"
    )
    router_gradient: Literal["exact", "straight_through"] = "exact"
    """`straight_through`: in training a renormalised weight passes its gradient as if the
    denominator ran over all candidates, so that a weight of constant 1 still teaches the router."""
    router_selection_bias: bool = False
    """A buffer `e_score_correction_bias` that is added to the scores for the selection only."""
    router_scale: bool = False
    """A learned factor for each expert, multiplied to its weight after any renormalisation."""
    routed_scaling_factor: float = 1.0
    num_null_experts: int = 0
    """Experts that cost and do nothing, in addition to `num_experts`."""
    output_router_logits: bool = False
    """Also return the router logits, and add the balance loss to the loss."""
    router_aux_loss_coef: float = 0.001
    """Times a balance loss that is 1 at balance (in Transformers' own models it is K there)."""
    router_z_loss_coef: float = 0.0
    num_nextn_predict_layers: int = 0
    """1: a layer after the last that predicts the token after next (multi-token prediction)."""
    mtp_loss_coef: float = 0.3
    """Times the loss of that layer, added to the loss in training mode."""

    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill derived values, check the rest, and hand over to Transformers."""
        self._fill()
        self._check_unknown_keys(kwargs)
        self._check_values()
        self.base_model_tp_plan = self._tensor_parallel_plan()  # pyright: ignore[reportAttributeAccessIssue]
        super().__post_init__(**kwargs)

    def _fill(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.value_head_dim = self.value_head_dim or self.head_dim
        self.mlp_only_layers = list(self.mlp_only_layers or [])

    def _check_unknown_keys(self, unknown: dict[str, Any]) -> None:
        ours = set(self.__dataclass_fields__)
        accepted = TRANSFORMERS_KEYS | set(GenerationConfig._get_default_generation_params())
        for key in sorted(set(unknown) - accepted):
            if get_close_matches(key, ours, n=1, cutoff=0.85):
                raise ConfigError(f"{self.model_type}: unknown key {key!r}", fix=nearest(key, ours))
            say(f"{self.model_type}: key {key!r} is unknown here; kept, without effect")

    def _check_values(self) -> None:
        for key, legal in CHOICES.items():
            if (value := getattr(self, key)) not in legal:
                raise ConfigError(f"{key}={value!r} is unknown", fix=nearest(str(value), legal))
        _ = self.grouping
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ConfigError(
                f"{self.num_attention_heads} query heads cannot share "
                f"{self.num_key_value_heads} key-value heads equally",
                fix="make num_attention_heads a multiple of num_key_value_heads",
            )
        if self.mlp_only_layers and not self.intermediate_size:
            raise ConfigError(
                f"layers {self.mlp_only_layers} are dense, but intermediate_size is missing",
                fix="set intermediate_size, or empty mlp_only_layers",
            )
        if self.num_nextn_predict_layers not in (0, 1):
            raise ConfigError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers} is not supported",
                fix="use one multi-token-prediction layer, or none",
            )
        if self.use_qk_norm and self.use_k_norm_only:
            raise ConfigError("use_qk_norm and use_k_norm_only exclude each other", fix="keep one")
        if self.num_sink_keys and self.sliding_window:
            raise ConfigError(
                "sink keys and a sliding window together are not supported",
                fix="set num_sink_keys=0 or sliding_window=None",
            )
        if self.router_gradient == "straight_through" and self.router_weighting == "probability":
            raise ConfigError(
                "router_gradient='straight_through' has no effect on "
                "router_weighting='probability', which divides by nothing",
                fix="use router_gradient='exact'",
            )

    @property
    def grouping(self) -> Grouping:
        """How the experts stand in groups; ConfigError when they cannot."""
        return Grouping(
            num_experts=self.num_experts,
            num_groups=self.router_n_groups,
            top_k=self.num_experts_per_tok,
        )

    def _tensor_parallel_plan(self) -> dict[str, str]:
        """Every entry matches a module that this configuration builds."""
        attention, mlp = "layers.*.self_attn", "layers.*.mlp"
        plan = {}
        if not self.num_sink_keys:  # sinks are not sharded, so their attention is whole everywhere
            plan = {f"{attention}.{name}_proj": "colwise" for name in "qkv"}
            plan[f"{attention}.o_proj"] = "rowwise"
            normed = "qk" * self.use_qk_norm + "k" * self.use_k_norm_only
            plan |= {f"{attention}.{n}_norm": "replicated_with_grad_allreduce" for n in normed}
        plan |= {
            f"{mlp}.experts.gate_up_proj": "packed_colwise",
            f"{mlp}.experts.down_proj": "rowwise",
            f"{mlp}.experts": "moe_tp_experts",
        }
        dense = [mlp] * bool(self.mlp_only_layers)
        shared = [f"{mlp}.shared_expert"] * bool(self.shared_expert_intermediate_size)
        for module in dense + shared:
            plan |= {f"{module}.gate_proj": "colwise", f"{module}.up_proj": "colwise"}
            plan[f"{module}.down_proj"] = "rowwise"
        return plan


class PanguProMoEConfig(MogeConfig):
    """The released Pangu Pro MoE: 72 B parameters, 64 experts in 8 groups, one pick a group."""

    model_type = "PanguProMoE"
    default_theta = 16_000_000.0

    vocab_size: int = 153376
    hidden_size: int = 5120
    num_hidden_layers: int = 48
    num_attention_heads: int = 40
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    attention_bias: bool = True
    attention_output_bias: bool = True
    moe_intermediate_size: int = 1344
    router_n_groups: int = 0
    """Absent in released files; 0: as many groups as picks a token."""
    shared_expert_intermediate_size: int = 5376
    router_scale: bool = True
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 45892
    """`[unused10]`, which ends every turn."""

    def _check_unknown_keys(self, unknown: dict[str, Any]) -> None:
        if "param_sink_number" in unknown or "V2" in "".join(self.architectures or ()):
            raise ConfigError(
                'this config of type "PanguProMoE" is that of openPangu-R-72B, another model',
                fix="read it with mogul.models.convert_config.moge_config",
            )
        super()._check_unknown_keys(unknown)

    def _fill(self) -> None:
        super()._fill()
        self.router_n_groups = self.router_n_groups or self.num_experts_per_tok
