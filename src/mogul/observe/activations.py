"""Level `activations`: what the experts answer, for scores that prune, merge and quantise.

The experts are called with one pick a row and weight 1, by whatever implementation the model uses,
so the output of every (token, expert) pair is seen in every family; the weighted sum is then taken
here. That computes what the model computes, with T*K rows instead of T in flight.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogul.observe.hooks import MoeBlock


class ActivationSums:
    """Sums over the rows of every expert; L layers, E experts, D hidden."""

    def __init__(
        self, num_layers: int, num_experts: int, hidden: int, device: torch.device
    ) -> None:
        self.num_experts = num_experts
        real = torch.float32 if device.type == "mps" else torch.float64

        def zeros(*shape: int, dtype: torch.dtype = real) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers, slots = num_layers, num_experts + 1
        self.norm_sum = zeros(layers, slots)
        self.norm_sqsum = zeros(layers, slots)
        self.weighted_norm_sum = zeros(layers, slots)
        self.weighted_norm_sqsum = zeros(layers, slots)
        self.max_activation = zeros(layers, slots, dtype=torch.float32)
        self.output_sum = zeros(layers, slots, hidden)
        self.input_absmax = zeros(layers, hidden, dtype=torch.float32)
        self.input_sqsum = zeros(layers, hidden)

    def add(self, layer: int, x_TD: Tensor, ids_R: Tensor, weight_R: Tensor, y_RD: Tensor) -> None:
        """Count the rows (token, expert) of one layer; null picks have id E."""
        norm_R = y_RD.float().norm(dim=-1).to(self.norm_sum)
        weighted_R = norm_R * weight_R.to(norm_R)
        for sums, value_R in (
            (self.norm_sum, norm_R),
            (self.norm_sqsum, norm_R.square()),
            (self.weighted_norm_sum, weighted_R),
            (self.weighted_norm_sqsum, weighted_R.square()),
        ):
            sums[layer].index_add_(0, ids_R, value_R)
        largest_R = y_RD.abs().amax(-1).float()
        self.max_activation[layer].scatter_reduce_(0, ids_R, largest_R, "amax")
        self.output_sum[layer].index_add_(0, ids_R, y_RD.to(self.output_sum))
        absmax_D = x_TD.abs().amax(0).float()
        self.input_absmax[layer] = torch.maximum(self.input_absmax[layer], absmax_D)
        self.input_sqsum[layer] += x_TD.to(self.input_sqsum).square().sum(0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays so far, on the host; the column of null picks left out."""
        arrays = {n: t.cpu().numpy() for n, t in vars(self).items() if isinstance(t, Tensor)}
        per_expert = {n: a for n, a in arrays.items() if not n.startswith("input_")}
        cut = {n: a[:, : self.num_experts] for n, a in per_expert.items()}
        cut["output_sum"] = cut["output_sum"].astype(np.float32)
        return {**arrays, **cut}


@contextmanager
def tap_experts(blocks: list[MoeBlock], see: Any) -> Iterator[None]:
    """Call `see(position, x_TD, ids_R, weight_R, y_RD)` for every experts call."""
    try:
        for position, block in enumerate(blocks):
            block.experts.forward = _tapped(block.experts.forward, position, see)
        yield
    finally:
        for block in blocks:
            block.experts.__dict__.pop("forward", None)


def _tapped(forward: Any, position: int, see: Any) -> Any:
    def tapped(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        ids_R, weight_R = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        row_RD = x_TD.repeat_interleave(top_k_index.shape[-1], dim=0)
        y_RD = forward(row_RD, ids_R[:, None], torch.ones_like(weight_R)[:, None])
        see(position, x_TD, ids_R, weight_R, y_RD)
        y_TKD = y_RD.unflatten(0, (len(x_TD), -1)).float() * weight_R.view(len(x_TD), -1, 1)
        return y_TKD.sum(1).to(hidden_states.dtype).view_as(hidden_states)

    return tapped
