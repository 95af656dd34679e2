"""A router inside the operator of its experts and their shared one, in compiled decoder layers.

The shared expert reads the same rows as the router, so both may run at the same time: nothing of
the routing then stands between two readings of weights.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph

from mogul.kernels.triton import quant_shared, routing
from mogul.serve.patterns import is_call

mogul = torch.ops.mogul
assert quant_shared, "its operators stand in the graphs"
assert routing


def route_inside(graph: Graph) -> None:
    """Change a graph, whose products are mogul's already, in place."""
    for node in graph.find_nodes(op="call_function", target=mogul.moe_quantised_shared.default):
        _route_inside(graph, node)


def _route_inside(graph: Graph, node: Any) -> None:
    x, *tensors = node.args
    ids, weights = tensors[4:6]
    route: Any = ids.args[0] if is_call(ids, operator.getitem) else None
    if not is_call(route, mogul.route.default) or not is_call(weights, operator.getitem):
        return
    logits, bias, scale, rule, factor = route.args
    if (ids.args[1], weights.args[:2]) != (0, (route, 1)) or len(logits.users) > 1:
        return
    if not is_call(logits, mogul.linear.default) or logits.args[2] != torch.float32:
        return
    read = [user for part in route.users for user in part.users]
    if any(user is not node for user in read):
        return  # picks or scores are wanted by somebody else
    with graph.inserting_before(node):
        routing = (*logits.args[:2], bias, scale, rule, factor)
        args = (x, *routing, *tensors[:4], *tensors[6:])
        whole = graph.call_function(mogul.moe_routed_shared.default, args)
    whole.meta = {"val": node.meta["val"]}  # the rest describes the operator that goes
    node.replace_all_uses_with(whole)
