"""The experts layer on NVIDIA GPUs, in Triton and Gluon: nothing but torch and triton is needed.

This module is light: it says whether a call can run here, and loads the kernels at the first call.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.checks import TRANSFORMED
from mogul.kernels.layout import ExpertLayout

_MIN_CAPABILITY = (8, 0)


@torch.compiler.assume_constant_result
def _device_reason(index: int | None) -> str | None:
    """Compilers ask once and keep the answer: tracing the question would break their graph."""
    return _reason_of_device(index)


@cache
def _reason_of_device(index: int | None) -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(index)
    if capability < _MIN_CAPABILITY:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    return None


def why_not_triton(
    *,
    device: torch.device,
    dtype: torch.dtype,
    num_experts: int | None = None,
    hidden_size: int | None = None,
    expert_width: int | None = None,
    is_transformed: bool = False,
    **_facts: object,
) -> str | None:
    """The reason why a call cannot run on these kernels, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the tensors are on {device}, not on an NVIDIA GPU"
    if is_transformed:
        return TRANSFORMED
    if reason := _device_reason(device.index):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the weights are {dtype}; bfloat16 and float16 are supported"
    for name, size in (("hidden size", hidden_size), ("expert width", expert_width)):
        if size is not None and size % 8:
            return f"{name} {size} is not a multiple of 8 (16 bytes)"
    if num_experts is not None and num_experts > 4096:
        return f"{num_experts} experts; at most 4096 are supported"
    return None


def moe_forward_triton(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    layout: ExpertLayout,
) -> Tensor:
    """Fast, deterministic and differentiable; see `mogul.kernels.moe_forward` for the shapes.

    Biases and layouts other than Qwen3-MoE's go through plain kernels of their own.
    """
    if gate_up_bias is None and down_bias is None and _is_fast(layout):
        return _fast_run()(x, gate_up, down, ids, weights)
    from mogul.kernels.triton.any_ops import run_any

    return run_any(x, gate_up, down, ids, weights, gate_up_bias, down_bias, layout)


def quick_call(
    x: Tensor, down: Tensor, ids: Tensor, weights: Tensor, layout: ExpertLayout
) -> Any | None:
    """What serves further calls of this kind without gradient and biases, or None.

    It takes x, gate_up, down, ids and weights, and may answer None: then the call is made anew.
    """
    if not _is_fast(layout) or not x.is_cuda or not x.shape[0]:
        return None
    from mogul.kernels.triton.ops import Quick, layer_of_call

    return Quick(layer_of_call(x, down, ids, weights), x.shape[0])


_loaded: list[Any] = []


def _fast_run() -> Any:
    """The fast layer, found once: an import statement costs as much as two launches.

    Compilers trace the statement, as they would guard the list.
    """
    if _loaded and not torch.compiler.is_compiling():
        return _loaded[0]
    from mogul.kernels.triton.ops import run

    if not torch.compiler.is_compiling():
        _loaded.append(run)
    return run


def _is_fast(layout: ExpertLayout) -> bool:
    """What the tuned kernels know: [E, 2F, D] and [E, D, F], gate rows first, a SiLU gate."""
    return (
        layout.has_gate
        and layout.is_concatenated
        and not layout.is_transposed
        and layout.activation == "silu"
    )
