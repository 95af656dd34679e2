"""Rotary positions of grouped-expert models: angles of any type Transformers knows, and the turn.

A head may be rotated in part, in halves or in neighbouring pairs. Letters: B batch, H heads,
L positions, C head width, R rotated channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from mogul.models.moge.configuration_moge import MogeConfig


class MogeRotaryEmbedding(nn.Module):
    """Cosines and sines of the positions, for any RoPE type that Transformers knows."""

    inv_freq: Tensor

    def __init__(self, config: MogeConfig) -> None:
        super().__init__()
        self.config = config
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        assert config.rope_parameters is not None  # filled by PreTrainedConfig
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init: Callable[..., tuple[Tensor, float]] = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MogeConfig, **_: Any) -> tuple[Tensor, float]:
        """Inverse frequencies theta^(-2i/C) of the C/2 rotated pairs of a head; the scaling 1."""
        assert config.rope_parameters is not None
        assert config.head_dim is not None
        width = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, width, 2, dtype=torch.float) / width
        return 1.0 / config.rope_parameters["rope_theta"] ** exponents, 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [B, L] to the factors [B, L, 1, R] of `rotate`, in the dtype of `x`."""
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device, torch.float)
        cos, sin = factors(angles.unsqueeze(2), interleaved=self.config.rope_interleaved)
        scaling = self.attention_scaling
        return (cos * scaling).to(x.dtype), (sin * scaling).to(x.dtype)


def factors(angles: Tensor, *, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    """Angles [..., R/2] of the pairs to what `rotate` multiplies by: cos, and sin with its sign.

    Made once a forward, so that no layer repeats, splits or negates anything.
    """
    cos, sin = angles.cos(), angles.sin()
    if interleaved:
        return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Rotate the first R channels of heads [B, L, H, C] by factors [B, L, 1, R].

    Pairs are (i, i + R/2), or (2i, 2i + 1) when `interleaved`.
    """
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x.split((cos.shape[-1], x.shape[-1] - cos.shape[-1]), dim=-1)
        return torch.cat((_rotate_all(turned, cos, sin, interleaved), rest), dim=-1)
    return _rotate_all(x, cos, sin, interleaved)


def _rotate_all(turned: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        partner = turned.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    else:
        partner = turned.roll(turned.shape[-1] // 2, -1)
    return (turned * cos).addcmul_(partner, sin)
