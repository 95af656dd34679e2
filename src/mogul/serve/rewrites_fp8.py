"""Fewer launches in a compiled decoder layer with fp8 weights.

Norms, rounding, biases and residuals go inside the products that they surround; norm, routing and
both sums inside the experts' operator. The numbers are those of the graph before, rounded less
often: one token is not rounded to e4m3 at all.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph

from mogul.kernels.triton import fp8_token
from mogul.serve.patterns import (
    Norm,
    find_rounded,
    is_call,
    lies_ready,
    norm_of_rows,
    reshaped,
    value,
)
from mogul.serve.rewrites import norm_args, only_user, residual_behind

aten = torch.ops.aten
mogul = torch.ops.mogul
assert fp8_token, "its operators stand in the graphs"


def join_products(graph: Graph) -> None:
    """Products take their rows in 16 bits, with the norm before and the sums behind."""
    for node in graph.find_nodes(op="call_function", target=mogul.linear_fp8.default):
        _take_rows(graph, node)


def join_experts(graph: Graph) -> None:
    """Experts that route themselves norm their rows and add what they give to the residual."""
    for node in graph.find_nodes(op="call_function", target=mogul.moe_routed_shared.default):
        _norm_and_add(graph, node)


def _take_rows(graph: Graph, node: Any) -> None:
    rows, scale, weight, weight_scale, dtype = node.args
    x = find_rounded(rows, scale)
    if x is None or dtype != value(x).dtype:
        return
    norm = _norm_of(x)
    if norm is None and not _is_there(x):
        return
    last, bias = _bias_behind(node)
    added = residual_behind(last)
    end = last if added is None else added.total
    with graph.inserting_before(end):
        before = (x, None, None, 0.0)
        if norm is not None:
            before = (_flat(graph, norm.x, x), *norm_args(norm))
        plus = None if added is None else _flat(graph, added.residual, node)
        args = (*before, weight, weight_scale, bias, plus)
        out = graph.call_function(mogul.rows_linear_fp8.default, args)
        out.meta = {"val": value(node)}
        out = out if added is None else added.in_shape(graph, out, last)
    end.replace_all_uses_with(out)


_VIEWS = (aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int)


def _is_there(x: Any) -> bool:
    """Whether rows lie in memory anyway: what a compiled launch makes is rounded best by itself."""
    while x.target in _VIEWS:
        x = x.args[0]
    return x.op == "placeholder" or str(x.target).startswith("mogul.")


def _norm_of(x: Any) -> Norm | None:
    """The norm that rows come from, where nobody else reads them."""
    norm = norm_of_rows(x)
    alone = len(x.users) == 1 and (x is reshaped(x) or len(reshaped(x).users) == 1)
    return norm if alone else None


def _flat(graph: Graph, node: Any, like: Any) -> Any:
    """A node as rows [T, C], of the shape of another."""
    if value(node).dim() == 2:
        return node
    rows = graph.call_function(aten.reshape.default, (node, [-1, value(like).shape[1]]))
    rows.meta = {"val": value(like)}
    return rows


def _bias_behind(node: Any) -> tuple[Any, Any]:
    """The sum of a product and its bias, and the bias; the product and None where there is none."""
    total: Any = only_user(node)
    if not is_call(total, aten.add.Tensor) or len(total.args) != 2 or total.kwargs:
        return node, None
    bias = next((one for one in total.args if one is not node), None)
    if not isinstance(bias, torch.fx.Node) or value(bias).dtype != value(node).dtype:
        return node, None
    fits = value(bias).shape == value(node).shape[1:] and value(total).shape == value(node).shape
    return (total, bias) if fits else (node, None)


def _norm_and_add(graph: Graph, node: Any) -> None:
    x, rows, router, *more = node.args
    norm = norm_of_rows(x)
    if norm is None or reshaped(rows) is not reshaped(x):
        return
    if not lies_ready(router) or not lies_ready(norm.weight):
        return
    if any(user is not node for one in {x, rows} for user in one.users if user is not x):
        return
    if reshaped(x) is not x and any(user not in (x, rows) for user in reshaped(x).users):
        return
    parts = {user.args[1]: user for user in node.users if is_call(user, operator.getitem)}
    both: Any = only_user(parts[0]) if len(parts) == len(node.users) == 2 else None
    if not is_call(both, aten.add.Tensor) or set(both.args) != set(parts.values()) or both.kwargs:
        return
    added = residual_behind(both)
    if added is None or added.residual is not norm.x:
        return
    with graph.inserting_before(added.total):
        args = (_flat(graph, norm.x, x), *norm_args(norm), router, *more)
        out = graph.call_function(mogul.moe_normed_shared.default, args)
        out.meta = {"val": value(both)}
        out = added.in_shape(graph, out, both)
    added.total.replace_all_uses_with(out)
