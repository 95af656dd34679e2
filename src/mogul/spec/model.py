"""The shape of a language model, of any family: what parameters, memory and balance follow from.

The record holds shapes only; `parameters.py` counts, `families.py` reads a `config.json` into it.
Only the text decoder is described: vision parts and multi-token-prediction layers are not in it.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec import parameters
from mogul.spec.base import Spec
from mogul.spec.grouping import Grouping

Score = Literal["softmax", "sigmoid"]
Weighting = Literal["probability", "renormalised", "renormalised_in_group"]


MOST_LAYERS = 10_000
"""More are a slip of the pen, and every layer is written down somewhere."""


class AttentionShape(Spec):
    """One attention layer: grouped-query heads, or a compressed latent (MLA)."""

    kind: Literal["gqa", "mla"] = "gqa"
    num_heads: int = Field(ge=1)
    """Query heads."""

    num_kv_heads: int = Field(ge=1)
    """Key and value heads (equal to the query heads under MLA)."""

    key_dim: int = Field(ge=1)
    """Width of one query or key head."""

    value_dim: int = Field(ge=1)
    """Width of one value head."""

    qkv_bias: bool = False
    """A bias on the query, key and value projections (MLA: on the two down-projections)."""

    output_bias: bool = False
    """A bias on the output projection."""

    qk_norm: Literal["none", "head", "full", "key"] = "none"
    """Norm on queries and keys: one head wide, all heads wide, or on keys alone, one head wide."""

    num_sinks: int = Field(default=0, ge=0)
    """Parameters of learned attention sinks in one layer."""

    q_lora_rank: int | None = None
    """MLA: width of the query latent; None means one plain query projection."""

    kv_lora_rank: int = 0
    """MLA: width of the cached latent."""

    rope_dim: int = 0
    """MLA: width of the cached rotary key, shared by all heads."""

    sliding_window: int | None = None
    """Tokens a windowed layer looks back; None means no layer has a window."""

    num_windowed_layers: int = 0
    """Layers with the sliding window."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"{self.num_heads} query heads cannot share {self.num_kv_heads} key-value heads",
                fix=f"use a number of key-value heads that divides {self.num_heads}",
            )
        return self

    @property
    def kv_elements(self) -> int:
        """Numbers one layer caches for one token."""
        if self.kind == "mla":
            return self.kv_lora_rank + self.rope_dim
        return self.num_kv_heads * (self.key_dim + self.value_dim)


class RouterShape(Spec):
    """How a token picks its experts."""

    score: Score = "softmax"
    weighting: Weighting = "probability"
    scaling_factor: float = 1.0
    """What the weights of the picks are multiplied by."""

    has_selection_bias: bool = False
    """A buffer is added to the scores for selection only (no parameter, not counted)."""

    has_bias: bool = False
    """The router's linear map has a bias."""

    has_expert_scale: bool = False
    """One learned factor an expert on its weight (Pangu Pro's `router_scale`)."""

    limit_num_groups: int = 1
    """Group-limited top-k (DeepSeek): groups the best are chosen from; gives no balance."""

    limit_groups: int | None = None
    """Group-limited top-k: how many of these groups a token may use."""

    num_null_experts: int = Field(default=0, ge=0)
    """Experts without arithmetic that the router may pick."""


class MoeShape(Spec):
    """The mixture-of-experts half of a layer."""

    grouping: Grouping
    router: RouterShape = RouterShape()
    expert_width: int = Field(ge=1)
    """Inner width of one routed expert."""

    expert_bias: bool = False
    """Experts have biases on both projections."""

    shared_width: int = Field(default=0, ge=0)
    """Inner width of all shared experts together."""

    shared_has_gate: bool = False
    """The shared expert's output is multiplied by a learned sigmoid of one number."""


class ModelSpec(Spec):
    """A decoder-only language model."""

    family: str
    """Name in `families.FAMILIES`."""

    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    attention: AttentionShape
    dense_width: int = Field(default=0, ge=0)
    """Inner width of the feed-forward net in layers without experts."""

    dense_bias: bool = False
    moe: MoeShape | None = None
    moe_layers: tuple[int, ...] = ()
    """Indices of the layers that have experts."""

    norms_per_layer: int = Field(default=2, ge=0)
    tie_embeddings: bool = False
    """Input embedding and output head are one tensor."""

    max_positions: int | None = None
    """Longest context the config promises, tokens."""

    dtype: str = "bf16"
    """What the weights are stored in, as far as the config says."""

    num_uncounted_mtp_layers: int = 0
    """Multi-token-prediction layers beside the model, not counted anywhere here."""

    @model_validator(mode="after")
    def _layers_fit(self) -> Self:
        if bool(self.moe_layers) != (self.moe is not None):
            raise ConfigError(
                "a model has experts if and only if some of its layers have them",
                fix="give moe_layers and moe together",
            )
        if self.moe_layers and not 0 <= min(self.moe_layers) <= max(self.moe_layers) < (
            self.num_layers
        ):
            raise ConfigError(
                f"moe_layers={self.moe_layers} is outside the {self.num_layers} layers",
                fix="number layers from 0",
            )
        if len(set(self.moe_layers)) < self.num_layers and not self.dense_width:
            raise ConfigError(
                "some layers have no experts, and no dense width is given for them",
                fix="give the inner width of the dense layers (intermediate_size)",
            )
        return self

    @property
    def grouping(self) -> Grouping | None:
        """The grouping of the routed experts; None in a dense model."""
        return self.moe.grouping if self.moe else None

    @property
    def is_grouped(self) -> bool:
        """Whether some device count above 1 is balanced by construction."""
        return self.moe is not None and self.moe.grouping.num_groups > 1

    def params(self) -> int:
        """All parameters; a tied head is counted once."""
        return sum(self.breakdown().values())

    def active_params(self, *, input_embedding: bool = True) -> int:
        """Parameters one token uses: both embedding tables, and K of E experts in every layer.

        The convention is that of arXiv 2505.21411, table 1: with experts, the layers and the two
        tables are counted and the final norm (D numbers) is not; a dense model is all active.
        `input_embedding=False` leaves out the input table of an untied model (one row is read,
        nothing is multiplied): use that number for FLOP.
        """
        return parameters.active_params(self, input_embedding=input_embedding)

    def breakdown(self) -> dict[str, int]:
        """Parameters by part; the values sum to `params()`."""
        return parameters.breakdown(self)

    def weight_bytes(self, dtype: str = "bf16") -> int:
        """Bytes of all weights in one dtype (scales of quantised formats not counted)."""
        return parameters.num_bytes(self.params(), dtype)

    def expert_bytes_per_layer(self, dtype: str = "bf16") -> int:
        """Bytes of all routed experts of one layer (0 in a dense model)."""
        return parameters.num_bytes(parameters.routed_params(self), dtype)

    def kv_bytes_per_token(self, dtype_bytes: float = 2) -> int:
        """Bytes one more token adds to the cache while no window is full (MLA: its latent)."""
        return round(self.num_layers * self.attention.kv_elements * dtype_bytes)

    def kv_bytes(self, num_tokens: int, dtype_bytes: float = 2) -> int:
        """Bytes of the cache of one sequence; windowed layers keep their window only."""
        windowed = self.attention.num_windowed_layers
        kept = min(num_tokens, self.attention.sliding_window or num_tokens)
        layer_tokens = (self.num_layers - windowed) * num_tokens + windowed * kept
        return round(layer_tokens * self.attention.kv_elements * dtype_bytes)
