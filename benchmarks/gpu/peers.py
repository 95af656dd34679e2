"""Other people's expert layers behind one call: (x, ids, weights) -> out. None of their code.

A peer that is missing raises at construction; the benchmark prints why and goes on. vLLM, SonicMoE
and DeepGEMM have files of their own; `triton_kernels` needs the package of that name.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Case
from peer_parts import Forward, silu_mul, sorted_slots
from torch import Tensor


def mogul(case: Case) -> Forward:
    """This project's layer, through its public door."""
    from mogul.kernels import moe_forward

    return lambda x, ids, weights: moe_forward(
        x, case.gate_up, case.down, ids, weights, backend="triton"
    )


def mogul_fp8(case: Case) -> Forward:
    """This project's layer with weights in fp8."""
    from mogul.kernels import moe_forward_quantised, quantise_experts

    experts = quantise_experts(case.gate_up, case.down, "fp8")
    return lambda x, ids, weights: moe_forward_quantised(x, experts, ids, weights)


def torch_grouped(case: Case) -> Forward:
    """Torch's grouped_mm with plain torch around it; differentiable."""
    experts, _, _ = case.dims
    grouped = getattr(F, "grouped_mm", None) or torch._grouped_mm

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        order, ends = sorted_slots(ids, experts)
        h = grouped(x[order // ids.shape[1]], case.gate_up.transpose(1, 2), offs=ends)
        if torch.is_grad_enabled():
            gate, up = h.chunk(2, -1)
            act = F.silu(gate) * up
        else:
            act = silu_mul(h)
        y = grouped(act, case.down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        y = y[back].unflatten(0, ids.shape)
        return (y * weights.unsqueeze(-1).to(y.dtype)).sum(1)

    return forward


def hf_grouped(case: Case) -> Forward:
    """Transformers' Qwen3-MoE experts under grouped_mm."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    experts, width, inner = case.dims
    config = Qwen3MoeConfig(
        hidden_size=width,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=case.picks,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        module._parameters["gate_up_proj"] = case.gate_up
        module._parameters["down_proj"] = case.down
        return module(x, ids, weights.to(x.dtype))

    return forward


def triton_kernels(case: Case) -> Forward:
    """matmul_ogs with gather, SwiGLU and scatter fused; its top-k bit matrix is made outside."""
    from mogul.bench.kernels_triton_peer import forward_of

    return forward_of(case.gate_up, case.down)
