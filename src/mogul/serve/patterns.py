"""What compiled decoder layers are recognised to do: root-mean-square norms, rotated positions.

Each function takes a node of a graph in Inductor's operators and says what it is made of, or None
where anything differs: a graph that is not recognised stays as it was.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

aten, prims = torch.ops.aten, torch.ops.prims
SHORT = (torch.bfloat16, torch.float16)
CAST = prims.convert_element_type.default
_AT_LEAST = (aten.clamp_min.default, aten.clamp.default)
_ADDS = (aten.add.Tensor, aten.add.Scalar)


class Norm(NamedTuple):
    """`x / sqrt(mean(x * x) + eps) * weight`, of 16-bit numbers in fp32."""

    x: Any
    weight: Any
    eps: Any
    """A number, or a node: one number on the host."""


class Rotated(NamedTuple):
    """One of queries and keys, rotated: x is [1, T, H, C], cos and sin are [1, T, C]."""

    x: Any
    cos: Any
    sin: Any


def value(node: Any) -> Any:
    """The fake tensor of a node."""
    return node.meta["val"]


def is_call(node: Any, target: Any) -> bool:
    """Whether a node calls an operator."""
    return _target(node) is target


def _target(node: Any) -> Any:
    return getattr(node, "target", None)


def lies_ready(weight: Any) -> bool:
    """Whether a weight comes from outside as it is: kernels of one row read it ahead of others."""
    return weight.op in ("placeholder", "get_attr")


def norm_of_rows(rows: Any) -> Norm | None:
    """The norm that rows [T, C] come from, perhaps reshaped, where it is over all of C."""
    norm = find_norm(reshaped(rows))
    return norm if norm is not None and value(norm.x).shape[-1] == value(rows).shape[-1] else None


def reshaped(node: Any) -> Any:
    """What a reshape reshapes; the node itself where it is none."""
    return node.args[0] if is_call(node, aten.reshape.default) else node


def find_norm(node: Any) -> Norm | None:
    """The norm whose result a node is."""
    for weight, scaled in _both_orders(node, aten.mul.Tensor):
        if not is_call(scaled, CAST) or value(scaled).dtype not in SHORT:
            continue
        for wide, root in _both_orders(scaled.args[0], aten.mul.Tensor):
            eps = _eps_of(root, wide)
            if eps is None or not is_call(wide, CAST) or value(wide).dtype != torch.float32:
                continue
            x = wide.args[0]
            if value(x).dtype == value(node).dtype and value(weight).shape == value(x).shape[-1:]:
                return Norm(x, weight, eps)
    return None


def _both_orders(node: Any, target: Any) -> list[tuple[Any, Any]]:
    """The two operands of a commutative operator, either way round."""
    if not is_call(node, target) or len(node.args) != 2:
        return []
    left, right = node.args
    pairs = [(left, right), (right, left)]
    return [pair for pair in pairs if all(isinstance(one, torch.fx.Node) for one in pair)]


def _eps_of(root: Any, wide: Any) -> Any:
    """The eps where `root` is `rsqrt(mean(wide ** 2) + eps)` over the last dimension, else None."""
    if not is_call(root, aten.rsqrt.default) or _target(root.args[0]) not in _ADDS:
        return None
    mean, eps = root.args[0].args
    last = value(wide).dim() - 1
    if not is_call(mean, aten.mean.dim) or mean.args[1:] not in (([-1], True), ([last], True)):
        return None
    if not is_call(mean.args[0], aten.pow.Tensor_Scalar) or mean.args[0].args != (wide, 2):
        return None
    eps = eps.args[0] if is_call(eps, CAST) else eps
    if isinstance(eps, (int, float)):
        return float(eps)
    is_number = isinstance(eps, torch.fx.Node) and getattr(value(eps), "shape", None) == ()
    return eps if is_number and value(eps).device.type == "cpu" else None


def find_rounded(rows: Any, scale: Any) -> Any:
    """The 16-bit rows [T, C] whose rounding two nodes are, else None."""
    if not is_call(rows, CAST) or value(rows).dtype != torch.float8_e4m3fn:
        return None
    quotient = _clamped(rows.args[0])
    if not is_call(quotient, aten.div.Tensor):
        return None
    wide, column = quotient.args
    if not is_call(column, aten.unsqueeze.default) or column.args[0] is not scale:
        return None
    if not is_call(wide, CAST) or value(wide).dtype != torch.float32 or value(wide).dim() != 2:
        return None
    return wide.args[0] if value(wide.args[0]).dtype in SHORT and _is_top(scale, wide) else None


def _clamped(node: Any) -> Any:
    """What is clamped to e4m3's range, in one operator or two; None where nothing is."""
    if is_call(node, aten.clamp.default):
        return node.args[0] if node.args[1:] == (-448.0, 448.0) else None
    if not is_call(node, aten.clamp_max.default) or node.args[1] != 448.0:
        return None
    low = node.args[0]
    return low.args[0] if is_call(low, aten.clamp_min.default) and low.args[1] == -448.0 else None


def _is_top(scale: Any, wide: Any) -> bool:
    """Whether a node is the largest magnitude of every row, over a number."""
    if not is_call(scale, aten.div.Tensor) or _target(scale.args[0]) not in _AT_LEAST:
        return False
    most = scale.args[0].args[0]
    if not is_call(most, aten.amax.default) or most.args[1:] not in (([-1],), ([1],)):
        return False
    return is_call(most.args[0], aten.abs.default) and most.args[0].args[0] is wide


def find_rotated(node: Any) -> Rotated | None:
    """Queries or keys [T, H, C] of the attention operator, traced back to before the rotation."""
    if not is_call(node, aten.permute.default) or node.args[1] != [1, 0, 2]:
        return None
    row = node.args[0]
    if not is_call(row, aten.select.int) or row.args[1:] != (0, 0):
        return None
    for straight, crossed in _both_orders(row.args[0], aten.add.Tensor):
        for x, cos in _both_orders(straight, aten.mul.Tensor):
            for other, sin in _both_orders(crossed, aten.mul.Tensor):
                is_turned = is_call(x, aten.permute.default) and x.args[1] == [0, 2, 1, 3]
                is_turned &= _is_angle(cos, x) and _is_angle(sin, x)
                is_turned &= value(x).dtype == value(row).dtype
                if is_turned and _is_crossed(other, x):
                    return Rotated(x.args[0], cos.args[0], sin.args[0])
    return None


def _is_angle(node: Any, x: Any) -> bool:
    """[1, T, C] with a dimension for heads put in."""
    if not is_call(node, aten.unsqueeze.default) or node.args[1] != 1:
        return False
    shape = value(node.args[0]).shape
    return len(shape) == 3 and shape[0] == 1 and shape[-1] == value(x).shape[-1]


def _is_crossed(node: Any, x: Any) -> bool:
    """Whether a node is x with its halves changed over, the left one negative."""
    half = value(x).shape[-1] // 2
    if not is_call(node, aten.cat.default) or node.args[1] not in (-1, 3):
        return False
    first, *rest = node.args[0]
    if len(rest) != 1 or not is_call(first, aten.neg.default):
        return False
    return _is_slice(first.args[0], x, half, None) and _is_slice(rest[0], x, 0, half)


def _is_slice(node: Any, x: Any, start: int, stop: int | None) -> bool:
    if not is_call(node, aten.slice.Tensor) or len(node.args) < 4:
        return False
    of, dim, low, high = node.args[:4]
    ends = high >= value(x).shape[-1] if stop is None else high == stop
    return of is x and dim in (-1, 3) and low == start and ends and node.args[4:] in ((), (1,))
