"""Tensors in, tensors out: routing and the experts, each with a slow reference and fast backends.

This room knows no model library. `route` chooses experts, `moe_forward` runs them.
"""

from __future__ import annotations

from mogul.kernels.layout import ExpertLayout
from mogul.kernels.moe import MOE_FORWARD, choose_backend, moe_forward
from mogul.kernels.route import ROUTE, Routing, route
from mogul.kernels.router_spec import RouterSpec

__all__ = [
    "MOE_FORWARD",
    "ROUTE",
    "ExpertLayout",
    "RouterSpec",
    "Routing",
    "choose_backend",
    "moe_forward",
    "route",
]
