"""Fewer launches in a compiled decoder layer: operators that do what stands before or behind them.

Attention norms and rotates its queries and keys; a product norms its rows or adds a residual; a
router norms, multiplies and picks. The numbers are those of the graph before, rounded less often.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch.fx import Graph

from mogul.kernels.triton import normed, ops
from mogul.serve import attention
from mogul.serve.patterns import (
    Norm,
    find_norm,
    find_rotated,
    is_call,
    lies_ready,
    norm_of_rows,
    reshaped,
    value,
)

aten = torch.ops.aten
mogul = torch.ops.mogul
_DEFINED = (attention, normed, ops)
"""Imported for the operators that they define."""


def join(graph: Graph) -> None:
    """Change a graph, whose products are mogul's already, in place."""
    join_attention(graph)
    join_norms(graph)
    join_residuals(graph)
    join_sums(graph)


def join_attention(graph: Graph) -> None:
    """Queries and keys are normed and rotated by attention."""
    for node in graph.find_nodes(op="call_function", target=mogul.attend.default):
        _turn_inside(graph, node)


def join_norms(graph: Graph) -> None:
    """Rows are normed by the product or router that reads them."""
    for node in graph.find_nodes(op="call_function", target=mogul.linear.default):
        _norm_inside(graph, node)


def join_residuals(graph: Graph) -> None:
    """Residuals are added by the product, or the experts, that they are added to."""
    for node in graph.find_nodes(op="call_function", target=mogul.linear.default):
        if lies_ready(node.args[1]):
            _add_inside(graph, node, mogul.added_linear.default, node.args[:2])
    for node in graph.find_nodes(op="call_function", target=mogul.moe.default):
        _add_inside(graph, node, mogul.moe_added.default, node.args)


def join_sums(graph: Graph) -> None:
    """A residual that a router follows is added where it norms: of many rows in one launch."""
    for node in graph.find_nodes(op="call_function", target=mogul.normed_route.default):
        _sum_inside(graph, node)


def norm_args(norm: Norm) -> tuple[Any, Any, float]:
    """The weight and eps of a norm as operators take them."""
    is_number = isinstance(norm.eps, float)
    return norm.weight, None if is_number else norm.eps, norm.eps if is_number else 0.0


def _norm_inside(graph: Graph, node: Any) -> None:
    """Norm the rows of a product inside it, or of a router that picks, with all that it feeds."""
    rows, weight, dtype = node.args
    norm = norm_of_rows(rows)
    if norm is None or dtype != value(rows).dtype or value(rows).dim() != 2:
        return
    if not lies_ready(weight):
        return
    x = norm.x
    if rows is not reshaped(rows):
        with graph.inserting_before(rows):
            x = graph.call_function(aten.reshape.default, (norm.x, rows.args[1]))
        x.meta = {"val": value(rows)}
    if len(rows.users) == 1 and (rows is reshaped(rows) or len(reshaped(rows).users) == 1):
        with graph.inserting_before(node):
            args = (x, *norm_args(norm), weight)
            product = graph.call_function(mogul.normed_linear.default, args)
        product.meta = {"val": value(node)}
        node.replace_all_uses_with(product)
        graph.erase_node(node)
        return
    picks = only_user(node)
    if is_call(picks, mogul.softmax_topk.default):
        _route_inside(graph, picks, x, norm)


def _route_inside(graph: Graph, picks: Any, x: Any, norm: Norm) -> None:
    """One operator for norm, router and picks; the normed rows go to whoever else reads them."""
    linear, k, renormalise, dtype = picks.args
    rows, weight = linear.args[:2]
    if not lies_ready(norm.weight):
        return
    args = (x, *norm_args(norm), weight, k, renormalise, dtype)
    with graph.inserting_before(rows):  # others may read the normed rows before the router does
        parts = _route_by(graph, mogul.normed_route.default, args, rows, picks)
    graph.erase_node(linear)
    rows.replace_all_uses_with(parts[0])


def _sum_inside(graph: Graph, node: Any) -> None:
    """One operator for a product, its residual and the router that reads their sum first."""
    x, *route = node.args
    while is_call(x, aten.reshape.default):
        x = x.args[0]
    if not is_call(x, mogul.added_linear.default) or value(x).shape != value(node.args[0]).shape:
        return
    if not all(lies_ready(one) for one in route if isinstance(one, torch.fx.Node)):
        return  # what comes after the product is not there yet where it stands
    with graph.inserting_before(x):
        parts = _route_by(graph, mogul.added_route.default, (*x.args, *route), x, node)
    x.replace_all_uses_with(parts[0])
    graph.erase_node(x)


def _route_by(graph: Graph, one: Any, args: tuple[Any, ...], rows: Any, picks: Any) -> list[Any]:
    """The results of an operator that makes rows and, behind them, all that a node of picks does.

    Whoever read the picks reads these; the node of picks goes.
    """
    routed = graph.call_function(one, args)
    values = (value(rows), *value(picks))
    parts = [graph.call_function(operator.getitem, (routed, i)) for i in range(len(values))]
    for part, val in zip(parts, values, strict=True):
        part.meta = {"val": val}
    routed.meta = {"val": values}
    for user in list(picks.users):
        user.replace_all_uses_with(parts[1 + user.args[1]])
        graph.erase_node(user)
    graph.erase_node(picks)
    return parts


def only_user(node: Any) -> Any:
    """Who alone reads a node, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


class Added(NamedTuple):
    """A sum with a residual: what is added, as which shape the result goes in, and the sum."""

    residual: Any
    shaped: Any
    total: Any

    def in_shape(self, graph: Graph, out: Any, node: Any) -> Any:
        """What takes the place of the sum: `out`, in the shape that `node`'s result went in."""
        if self.shaped is node:
            return out
        shaped = graph.call_function(aten.reshape.default, (out, self.shaped.args[1]))
        shaped.meta = {"val": value(self.total)}
        return shaped


def residual_behind(node: Any) -> Added | None:
    """The residual that a result alone is added to, perhaps reshaped."""
    last: Any = only_user(node)
    last = last if is_call(last, aten.reshape.default) else node
    total: Any = only_user(last)
    if not is_call(total, aten.add.Tensor) or len(total.args) != 2 or total.kwargs:
        return None
    residual = next((one for one in total.args if one is not last), None)
    if not isinstance(residual, torch.fx.Node) or value(residual).dtype != value(node).dtype:
        return None
    shape = value(total).shape
    alike = value(last).shape == shape and value(residual).shape == shape
    return Added(residual, last, total) if alike else None


def _add_inside(graph: Graph, node: Any, joined: Any, args: tuple[Any, ...]) -> None:
    """Add the residual inside the product, or experts, that it is added to: `joined` does both."""
    kept = value(node)
    added = residual_behind(node)
    if added is None or kept.dtype != value(args[0]).dtype:
        return
    residual, total = added.residual, added.total
    with graph.inserting_before(total):
        rows = graph.call_function(aten.reshape.default, (residual, [-1, kept.shape[1]]))
        rows.meta = {"val": kept}
        product = graph.call_function(joined, (*args, rows))
        product.meta = {"val": kept}
        shaped = added.in_shape(graph, product, node)
    total.replace_all_uses_with(shaped)


def _turn_inside(graph: Graph, node: Any) -> None:
    """Let attention norm and rotate its queries and keys where the graph does it before."""
    query, key, val, *rest = node.args
    turns = [turn for turn in (find_rotated(query), find_rotated(key)) if turn is not None]
    if len(turns) < 2 or turns[0][1:] != turns[1][1:]:
        return
    cos, sin = turns[0][1:]
    norms = [find_norm(turn.x) for turn in turns]
    if (norms[0] is None) != (norms[1] is None):
        return
    raw = [turn.x if norm is None else norm.x for turn, norm in zip(turns, norms, strict=True)]
    weights = [None if norm is None else norm.weight for norm in norms]
    each = [0.0 if norm is None else norm.eps for norm in norms]
    numbers = [eps if isinstance(eps, float) else 0.0 for eps in each]
    nodes = [None if isinstance(eps, float) else eps for eps in each]
    with graph.inserting_before(node):
        rows = []
        for x in raw:
            rows.append(graph.call_function(aten.select.int, (x, 0, 0)))
            rows[-1].meta = {"val": value(x)[0]}
        angles = (cos, sin, *weights, *nodes, numbers)
        args = (*rows, val, *angles, *rest)
        turned = graph.call_function(torch.ops.mogul.attend_turned.default, args)
    turned.meta = {"val": value(node)}
    node.replace_all_uses_with(turned)
    graph.erase_node(node)
