"""The layer that is timed, and who runs it: mogul and the peers installed here.

Decides what a peer is given: the same weights, ids and router weights in the form it wants, made
before the clock starts. A peer that cannot run is told with its reason, never silently left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mogul.core.errors import MogulError
from mogul.kernels import moe_forward, moe_forward_quantised, quantise_experts

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


def variants(
    layer: Layer, backend: str, quant: str | None = None
) -> tuple[dict[str, Forward], dict[str, str]]:
    """Name -> implementation, mogul first; and why the others did not come."""
    makers: dict[str, Callable[[Layer], Forward]] = {
        "transformers grouped_mm": _transformers("grouped_mm"),
        "transformers eager": _transformers("eager"),
        "vllm": _vllm,
    }

    def mogul(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up, layer.down, ids, weights, backend=backend)

    found, absent = {"mogul": Forward(mogul)}, {}
    if quant is not None:
        found[f"mogul {quant}"] = _quantised(layer, quant)
    for name, make in makers.items():
        try:
            forward = make(layer)
            forward.run(*layer.tokens(2))
            found[name] = forward
        except MogulError as error:
            absent[name] = str(error)
        except Exception as error:  # a foreign library may fail in any way: its reason is shown
            absent[name] = f"{type(error).__name__}: {str(error)[:160]}"
    return found, absent


def _quantised(layer: Layer, name: str) -> Forward:
    """The same layer in a quantised format; fp8 has twice the arithmetic on a GPU."""
    experts = quantise_experts(layer.gate_up, layer.down, name)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward_quantised(x, experts, ids, weights)

    is_fast = experts.format.kind == "fp8" and layer.device.type != "cpu"
    return Forward(run, experts.format.bits / 8, 2.0 if is_fast else 1.0)


def _transformers(implementation: str) -> Callable[[Layer], Forward]:
    """Qwen3-MoE's experts module with the layer's own weights."""

    def make(layer: Layer) -> Forward:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

        shape = layer.shape
        config = Qwen3MoeConfig(
            hidden_size=shape.width,
            moe_intermediate_size=shape.inner,
            num_experts=shape.experts,
            num_experts_per_tok=shape.picks,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            module = Qwen3MoeExperts(config)
        # the layer's own tensors, so that gradients reach them
        module._parameters |= {"gate_up_proj": layer.gate_up, "down_proj": layer.down}  # type: ignore[dict-item]

        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return module(x, ids, weights.to(x.dtype))

        return Forward(run)

    return make


def _vllm(layer: Layer) -> Forward:
    """Call fused_experts of vLLM, where that is installed."""
    if find_spec("vllm") is None:
        raise MogulError("not installed")
    from vllm.model_executor.layers.fused_moe import (  # pyright: ignore[reportMissingImports]
        fused_experts,
    )

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(x, layer.gate_up, layer.down, weights, ids.to(torch.int32))

    return Forward(run)
