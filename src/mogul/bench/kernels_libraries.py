"""Other libraries' experts layers, where installed: vLLM's, triton_kernels' and SonicMoE's.

Decides how each is called through its public function, on the layer's own weights. What is not
installed raises MogulError; what fails on the first call is told by whoever asked.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mogul.bench.kernels_layer import Forward
from mogul.core.errors import MogulError

if TYPE_CHECKING:
    from mogul.bench.kernels_layer import Layer


def _need(package: str) -> None:
    if find_spec(package) is None:
        raise MogulError("not installed")


def vllm(layer: Layer) -> Forward:
    """Call fused_experts of vLLM; it has no backward."""
    _need("vllm")
    from vllm.model_executor.layers.fused_moe import (  # pyright: ignore[reportMissingImports]
        fused_experts,
    )

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(x, layer.gate_up, layer.down, weights, ids.to(torch.int32))

    return Forward(run, trains=False)


def triton_kernels(layer: Layer) -> Forward:
    """Two grouped products of triton_kernels; they have no backward."""
    _need("triton_kernels")
    from mogul.bench.kernels_triton_peer import forward_of

    return Forward(forward_of(layer.gate_up, layer.down), trains=False)


def sonicmoe(layer: Layer) -> Forward:
    """SonicMoE with gate and up one after the other; it compiles for minutes at first use."""
    _need("sonicmoe")
    from sonicmoe import moe_general_routing_inputs  # pyright: ignore[reportMissingImports]
    from sonicmoe.enums import ActivationType  # pyright: ignore[reportMissingImports]

    experts = layer.shape.experts

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        tokens, picks = ids.shape
        token = torch.arange(tokens, dtype=torch.int32, device=x.device)
        slots = (weights.reshape(-1), token.repeat_interleave(picks), ids.reshape(-1).int())
        gate_up, down = (weight.permute(1, 2, 0) for weight in (layer.gate_up, layer.down))
        out, _ = moe_general_routing_inputs(
            x, *slots, gate_up, None, down, None,
            E=experts, stream_id=0, activation_type=ActivationType.SWIGLU,
            is_inference_mode_enabled=not torch.is_grad_enabled(), concat_layout=True,
        )  # fmt: skip
        return out

    return Forward(run)
