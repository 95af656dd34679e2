"""SonicMoE's layer (sonic-moe on quack-kernels and nvidia-cutlass-dsl), given ids and weights.

Its own sort and its own autograd functions for the two projections; gate and up rows interleaved,
as it likes them best. Its tuner chooses among all tiles in 2x1 clusters (its gathered products
allow no others); each of the 67 kernels takes seconds to compile at first use.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from common import Case
from torch import Tensor

TUNED = ("gemm_tuned", "gemm_gated_tuned", "gemm_dgated_tuned")


class Sonic:
    """Callable layer; `weights` are the tensors that its gradients belong to."""

    def __init__(self, case: Case):
        inner = case.dims[2]
        pairs = (case.gate_up[:, :inner], case.gate_up[:, inner:])
        self.weights = (torch.stack(pairs, 2).flatten(1, 2).contiguous(), case.down)
        _library()

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The layer."""
        return run(x, ids, weights, *self.weights)


@cache
def _library() -> tuple[Any, Any]:
    """Its functions, with the tuner's tiles cut once."""
    import quack.gemm_interface as products
    import sonicmoe.functional as functional
    from sonicmoe.enums import ActivationType

    for name in TUNED:
        tuner = getattr(products, name)
        tuner.configs = [c for c in tuner.configs if is_wanted(c.kwargs["config"])]
    return functional, ActivationType.SWIGLU


def run(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Sort, up with SwiGLU, down, sum; gate and up rows interleaved."""
    functional, activation = _library()
    tokens, picks = ids.shape
    experts, slots = down.shape[0], ids.numel()
    short = {"dtype": torch.int32, "device": x.device}
    place, back, source = (torch.empty(slots, **short) for _ in range(3))
    count, ends = torch.empty(experts, **short), torch.empty(experts + 1, **short)
    sort = functional.TC_topk_router_metadata_triton
    sort(ids.int(), experts, count, ends, source, place, back)
    maps: tuple[Any, ...] = (source, place, back, None, False, activation)
    is_inference = not torch.is_grad_enabled()
    act, pre = functional._UpProjection.apply(
        x, gate_up.permute(1, 2, 0), None, ends, slots, picks, *maps, is_inference, False
    )
    return functional._DownProjection.apply(
        act, pre, down.permute(1, 2, 0), None, weights, ends, tokens, picks, *maps
    )


@torch.compiler.disable
def experts_forward(self: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation for Transformers' modules: random weights count as interleaved."""
    return run(hidden_states, ids, weights.float(), self.gate_up_proj, self.down_proj)


def is_wanted(config: Any) -> bool:
    """Whether the tuner keeps a tile."""
    if config.device_capacity != 9 or config.is_dynamic_persistent or config.swap_ab:
        return False
    return (config.cluster_m, config.cluster_n) == (2, 1)
