"""Graphs as the passes over compiled code see them, and a norm to trace."""

from __future__ import annotations

import torch
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx


def as_inductor_sees_it(function, *args):
    """A graph in the operators that reach the pass."""
    traced = make_fx(torch.func.functionalize(function), select_decomp_table(), "fake")(*args)
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.t.default:
            node.target, node.args = torch.ops.aten.permute.default, (node.args[0], [1, 0])
        if node.target is torch.ops.aten._to_copy.default:
            node.args = (node.args[0], node.kwargs["dtype"])
            node.target, node.kwargs = torch.ops.prims.convert_element_type.default, {}
    traced.recompile()
    return traced


def with_reshapes(traced):
    """Views have become reshapes where the pass runs."""
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    traced.recompile()
    return traced


def norm(x, weight, eps=1e-6):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
