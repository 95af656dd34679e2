"""Grouped-query attention with the norms of queries and keys and the sink keys of `MogeConfig`.

Attends through Transformers' attention interface; `eager` is written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mogul.core.errors import BackendError
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.models.moge.norm import MogeRMSNorm
from mogul.models.moge.rotary import rotate


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out, [B, H, L, C] to [B, L, H, C], with its weights [B, H, L, L]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    chances = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    chances = F.dropout(chances, p=dropout, training=module.training)
    return (chances @ value).transpose(1, 2).contiguous(), chances


class MogeAttention(nn.Module):
    """Grouped-query attention through Transformers' attention interface."""

    sink_key: nn.Parameter
    sink_value: nn.Parameter

    def __init__(self, config: MogeConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.head_dim is not None  # these three are filled by the configuration
        assert config.value_head_dim is not None
        assert config.num_key_value_heads is not None
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.value_head_dim = config.value_head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.sliding_window
        hidden, bias = config.hidden_size, config.attention_bias
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_heads * self.value_head_dim, bias=bias)
        output_bias = config.attention_output_bias
        self.o_proj = nn.Linear(heads * self.value_head_dim, hidden, bias=output_bias)
        eps = config.rms_norm_eps
        self.q_norm = MogeRMSNorm(self.head_dim, eps) if config.use_qk_norm else None
        norms_keys = config.use_qk_norm or config.use_k_norm_only
        self.k_norm = MogeRMSNorm(self.head_dim, eps) if norms_keys else None
        if config.num_sink_keys:
            sinks = (config.num_sink_keys, kv_heads)
            self.sink_key = nn.Parameter(torch.empty(*sinks, self.head_dim))
            if config.use_sink_values:
                self.sink_value = nn.Parameter(torch.empty(*sinks, self.value_head_dim))

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[B, L, D] to [B, L, D], and the attention weights where the implementation has them."""
        batch_length = hidden_states.shape[:-1]
        by_head = (*batch_length, -1, self.head_dim)
        query, key = (
            self.q_proj(hidden_states).view(by_head),
            self.k_proj(hidden_states).view(by_head),
        )
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        interleaved = self.config.rope_interleaved
        query, key = (
            rotate(x, *position_embeddings, interleaved=interleaved).transpose(1, 2)
            for x in (query, key)
        )
        value = self.v_proj(hidden_states).view(*batch_length, -1, self.value_head_dim)
        value = value.transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        if self.config.num_sink_keys:
            key, value, attention_mask = self._with_sinks(key, value, attention_mask)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation or "eager", eager_attention_forward
        )
        out, chances = attend(
            self, query, key, value, attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling, sliding_window=self.sliding_window, **kwargs,
        )  # fmt: skip
        return self.o_proj(out.reshape(*batch_length, -1).contiguous()), chances

    def _with_sinks(
        self, key: Tensor, value: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put the sinks before the keys [B, N, L, C] and values, visible to every query."""
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 4:
            raise BackendError(
                f"attention implementation {self.config._attn_implementation!r} cannot show the "
                f"{self.config.num_sink_keys} sink keys to every query",
                fix='use attn_implementation="sdpa" or "eager"',
            )
        sinks = self.sink_key if self.k_norm is None else self.k_norm(self.sink_key)
        values = value.new_zeros(*sinks.shape[:2], self.value_head_dim)
        if self.config.use_sink_values:
            values = self.sink_value
        sinks, values = (
            x.transpose(0, 1).expand(len(key), -1, -1, -1).to(key.dtype) for x in (sinks, values)
        )
        visible = True if attention_mask.dtype == torch.bool else 0.0
        mask = F.pad(attention_mask, (self.config.num_sink_keys, 0), value=visible)
        return torch.cat((sinks, key), dim=2), torch.cat((values, value), dim=2), mask
