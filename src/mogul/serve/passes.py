"""Changes of compiled decoder layers that no model needs to know.

A decode step is a chain of short launches. `torch.topk` over experts becomes one launch, with the
softmax before and the renormalising behind it where they are; products with a weight go through
`mogul::linear`, which reads it fast for few rows and gives a router fp32 without casting its input.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph

from mogul.kernels.triton import linear, topk
from mogul.serve import patterns, rewrites, rewrites_fp8, routes
from mogul.serve.patterns import CAST, SHORT
from mogul.serve.patterns import value as _value

aten = torch.ops.aten


class FewRows(CustomGraphPass):
    """Replaces top-k over short rows [T, E] and products with weights by mogul's operators."""

    def __call__(self, graph: Graph) -> None:
        """Change the graph in place."""
        for node in graph.find_nodes(op="call_function", target=aten.topk.default):
            if _is_short(*node.args):  # pyright: ignore[reportArgumentType]
                _replace_topk(graph, node)
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            _replace_product(graph, node)
        graph.eliminate_dead_code()  # what is replaced uses nothing any more
        rewrites.join(graph)
        routes.route_inside(graph)
        graph.eliminate_dead_code()
        rewrites_fp8.join_products(graph)
        rewrites_fp8.join_experts(graph)
        graph.eliminate_dead_code()

    def uuid(self) -> Any:
        """Names this pass in the caches of compiled code."""
        parts = (patterns, rewrites, rewrites_fp8, routes)
        return get_hash_for_files((__file__, *(part.__file__ for part in parts)))


def _is_short(rows: Any, k: Any, dim: int = -1, largest: bool = True, *_: Any) -> bool:
    shape = _value(rows).shape
    columns = shape[-1]
    return (
        len(shape) == 2
        and dim in (-1, 1)
        and largest
        and isinstance(k, int)
        and k <= topk.MOST_PICKS
        and isinstance(columns, int)
        and columns <= topk.MOST_COLUMNS
        and _value(rows).dtype in (torch.float32, *SHORT)
    )


def _replace_topk(graph: Graph, node: Any) -> None:
    rows, k = node.args[:2]
    values = next((user for user in node.users if user.args[1] == 0), None)
    logits = None if values is None else _before_softmax(rows)
    with graph.inserting_before(node):
        if values is None or logits is None:
            short = graph.call_function(torch.ops.mogul.topk.default, (rows, k))
            short.meta = dict(node.meta)
            node.replace_all_uses_with(short)
            return
        last, dtype, renormalise = _behind(values)
        args = (logits, k, renormalise, dtype)
        short = graph.call_function(torch.ops.mogul.softmax_topk.default, args)
        parts = [graph.call_function(operator.getitem, (short, index)) for index in (0, 1)]
    kept = _value(node)
    for part, value in zip(parts, (_like(kept[0], dtype), kept[1]), strict=True):
        part.meta = {"val": value}
    short.meta = {"val": tuple(part.meta["val"] for part in parts)}
    for user in list(node.users):
        if user.args[1] == 1:
            user.replace_all_uses_with(parts[1])
    last.replace_all_uses_with(parts[0])


def _like(value: Any, dtype: torch.dtype) -> Any:
    return value.new_empty(value.shape, dtype=dtype)


def _before_softmax(node: Any) -> Any:
    """The logits whose softmax over the last dimension this is, before a cast to fp32."""
    if node.target is not aten.div.Tensor:
        return None
    power, total = node.args
    if getattr(power, "target", None) is not aten.exp.default or not _sums(total, power):
        return None
    shifted = power.args[0]
    if shifted.target is not aten.sub.Tensor:
        return None
    logits, peak = shifted.args
    if getattr(peak, "target", None) is not aten.amax.default or peak.args[:2] != (logits, [-1]):
        return None
    is_cast = logits.target is CAST and _value(logits.args[0]).dtype in SHORT
    return logits.args[0] if is_cast else logits


def _sums(node: Any, of: Any) -> bool:
    """Whether a node is the sum of another over the last dimension."""
    target = getattr(node, "target", None)
    return target is aten.sum.dim_IntList and node.args[:2] == (of, [-1])


def _behind(values: Any) -> tuple[Any, torch.dtype, bool]:
    """Who takes the values last in a chain: dividing them by their sum, a cast."""
    last, renormalise = values, False
    users = list(values.users)
    if len(users) == 2:
        total = next((user for user in users if _sums(user, values)), None)
        share = next((user for user in users if user.target is aten.div.Tensor), None)
        if total is not None and share is not None and share.args == (values, total):
            last, renormalise = share, True
    users = list(last.users)
    if len(users) == 1 and users[0].target is CAST and users[0].args[1] in SHORT:
        last = users[0]
    return last, _value(last).dtype, renormalise


def _replace_product(graph: Graph, node: Any) -> None:
    """`x @ weight.T` of 16-bit numbers, also where both are cast to fp32 for it."""
    x, turned = node.args
    if getattr(turned, "target", None) is not aten.permute.default or turned.args[1] != [1, 0]:
        return
    dtype = _value(node).dtype
    pair = [x, turned.args[0]]
    if dtype == torch.float32:
        pair = [one.args[0] if getattr(one, "target", None) is CAST else one for one in pair]
        if len(_value(pair[1])) > linear.NARROW:
            return
    rows, weight = (_value(one) for one in pair)
    sizes = (*weight.shape, *weight.stride())
    if rows.dtype != weight.dtype or rows.dtype not in SHORT:
        return
    if dtype not in (rows.dtype, torch.float32) or not all(isinstance(n, int) for n in sizes):
        return
    if weight.stride() != (weight.shape[1], 1) or weight.shape[0] % 8 or weight.shape[1] % 8:
        return
    with graph.inserting_before(node):
        product = graph.call_function(torch.ops.mogul.linear.default, (*pair, dtype))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
