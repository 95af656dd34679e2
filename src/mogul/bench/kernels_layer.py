"""The layer that is timed: random weights, inputs, and how far a variant is from fp32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mogul.bench.kernels import LayerShape

CHECKED_TOKENS = 32


@dataclass(frozen=True)
class Forward:
    """One implementation: how to call it, and what its number formats save."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    weight_bytes: float = 0.0
    """Bytes a stored weight takes; 0: as the layer's dtype."""
    flop_gain: float = 1.0
    """Arithmetic of its format against the layer's dtype."""
    trains: bool = True
    """Whether it has a backward."""


@dataclass
class Layer:
    """Random weights of one shape."""

    shape: LayerShape
    gate_up: Tensor
    down: Tensor
    generator: torch.Generator

    @classmethod
    def random(cls, shape: LayerShape, dtype: torch.dtype, device: torch.device) -> Layer:
        """Normal weights of deviation 0.02."""
        generator = torch.Generator(device).manual_seed(1)
        sizes = [(shape.experts, 2 * shape.inner, shape.width),
                 (shape.experts, shape.width, shape.inner)]  # fmt: skip
        gate_up, down = (torch.empty(size, dtype=dtype, device=device) for size in sizes)
        for weight in (gate_up, down):
            weight.normal_(0, 0.02, generator=generator)
        return cls(shape, gate_up, down, generator)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.down.device

    def tokens(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """x, ids and weights of one random batch, K / M picks in each group."""
        shape, dtype = self.shape, self.down.dtype
        options: dict[str, Any] = {"device": self.device, "generator": self.generator}
        x = torch.randn(count, shape.width, dtype=dtype, **options)
        scores = torch.rand(count, shape.groups, shape.experts // shape.groups, **options)
        place = scores.topk(shape.picks // shape.groups, dim=-1).indices
        first = torch.arange(0, shape.experts, scores.shape[-1], device=self.device)[:, None]
        weights = torch.rand(count, shape.picks, **options).softmax(-1)
        return x, (place + first).flatten(1), weights

    @contextmanager
    def training(self) -> Iterator[list[Tensor]]:
        """Weights that want gradients."""
        parameters = [self.gate_up.requires_grad_(), self.down.requires_grad_()]
        try:
            yield parameters
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)

    def error(self, forward: Forward, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
        """||out - fp32|| / ||fp32|| on the first tokens, expert by expert to save memory."""
        x, ids, weights = (tensor[:CHECKED_TOKENS] for tensor in inputs)
        want = torch.zeros_like(x, dtype=torch.float32)
        for expert in ids.unique().tolist():
            token, pick = (ids == expert).nonzero(as_tuple=True)
            hidden = x[token].float() @ self.gate_up[expert].float().T
            gate, up = hidden.chunk(2, -1)
            out = (torch.nn.functional.silu(gate) * up) @ self.down[expert].float().T
            want.index_add_(0, token, out * weights[token, pick, None])
        with torch.no_grad():
            got = forward.run(*inputs)[:CHECKED_TOKENS].float()
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        return error if error == error else float("inf")
