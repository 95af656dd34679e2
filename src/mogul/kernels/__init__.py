"""Tensors in, tensors out: routing, experts, paged attention; a slow reference, fast backends.

This room knows no model library. `route` chooses experts, `moe_forward` runs them,
`paged_attention` keeps keys and values in pages.
"""

from __future__ import annotations

from mogul.kernels.layout import ExpertLayout
from mogul.kernels.moe import MOE_FORWARD, choose_backend, moe_forward
from mogul.kernels.paged_attention import PAGED_ATTENTION, paged_attention
from mogul.kernels.quant import (
    QuantisedExperts,
    dequantise_experts,
    moe_forward_quantised,
    quantise_experts,
)
from mogul.kernels.quant_backends import MOE_QUANTISED, moe_with_shared, takes_shared
from mogul.kernels.quant_format import FORMATS, ExpertFormat, expert_format
from mogul.kernels.route import ROUTE, Routing, route
from mogul.kernels.router_spec import RouterSpec
from mogul.kernels.side_by_side import side_by_side

__all__ = [
    "FORMATS",
    "MOE_FORWARD",
    "MOE_QUANTISED",
    "PAGED_ATTENTION",
    "ROUTE",
    "ExpertFormat",
    "ExpertLayout",
    "QuantisedExperts",
    "RouterSpec",
    "Routing",
    "choose_backend",
    "dequantise_experts",
    "expert_format",
    "moe_forward",
    "moe_forward_quantised",
    "moe_with_shared",
    "paged_attention",
    "quantise_experts",
    "route",
    "side_by_side",
    "takes_shared",
]
