"""Quantised experts on NVIDIA GPUs: says whether a call can run, loads the kernels when it does."""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.layout import CLAMPED_SWIGLU, ExpertLayout
from mogul.kernels.quant import QuantisedExperts
from mogul.kernels.quant_format import ExpertFormat
from mogul.kernels.triton import _device_reason

FP8_CAPABILITY = (8, 9)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    """Compilers ask once and keep the answer: tracing the question would break their graph."""
    return torch.cuda.get_device_capability(index)


def why_not_triton_quantised(
    *,
    device: torch.device,
    dtype: torch.dtype,
    format: ExpertFormat,
    num_experts: int,
    hidden_size: int,
    expert_width: int,
    layout: ExpertLayout,
) -> str | None:
    """The reason why a call cannot run on these kernels, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device}, not on an NVIDIA GPU"
    if reason := _device_reason(device.index):
        return reason
    capability = _capability(device.index)
    if format.kind == "fp8" and capability < FP8_CAPABILITY:
        return (
            f"the GPU has compute capability {capability[0]}.{capability[1]}, and fp8 products "
            "need 8.9"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return f"x is {dtype}; bfloat16 and float16 are supported"
    if not layout.has_gate or layout.activation not in ("silu", CLAMPED_SWIGLU):
        return f"activation {layout.activation!r} is not a SiLU gate or gpt-oss's clamped SwiGLU"
    for name, size in (("hidden size", hidden_size), ("expert width", expert_width)):
        if size % 16:
            return f"{name} {size} is not a multiple of 16"
    if num_experts > 4096:
        return f"{num_experts} experts; at most 4096 are supported"
    return None


def moe_quantised_triton(
    x: Tensor, experts: QuantisedExperts, ids: Tensor, weights: Tensor
) -> Tensor:
    """Fast and deterministic; see `mogul.kernels.moe_forward_quantised`."""
    from mogul.kernels.triton import quant_layer

    layout, gate_up, down = experts.layout, experts.gate_up, experts.down
    act = quant_layer.CLAMPED if layout.activation == CLAMPED_SWIGLU else quant_layer.SILU
    return torch.ops.mogul.moe_quantised(
        x,
        gate_up.value,
        gate_up.scale,
        down.value,
        down.scale,
        experts.gate_up_bias,
        experts.down_bias,
        ids,
        weights,
        experts.format.group,
        act,
        layout.alpha,
        layout.limit,
        experts.format.weight_only,
    )
