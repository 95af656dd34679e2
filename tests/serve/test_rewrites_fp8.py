"""fp8 layers in fewer operators: norms, rounding, biases and sums inside, numbers as before."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from traced import as_inductor_sees_it, norm, with_reshapes

from mogul.kernels.quant_format import quantise_rows
from mogul.kernels.triton import fp8_token, quant_shared, routing
from mogul.kernels.triton.linear import linear_fp8
from mogul.serve.passes import FewRows

assert quant_shared, "its operators stand in the graphs"
assert routing

WIDTH, COLUMNS = 32, 48
RULE = [8, 2, 2, 0, 0, 0, 0]


def traced_reshaped(function, *args):
    return with_reshapes(as_inductor_sees_it(function, *args))


def packed(*shape):
    return quantise_rows(torch.randn(shape) / shape[-1] ** 0.5)


def multiplied(x, weight, scale):
    flat = x.reshape(-1, x.shape[-1])
    out = linear_fp8(*quantise_rows(flat), weight, scale, x.dtype)
    return out, (*x.shape[:-1], len(weight))


def normed(x, gain, weight, scale, bias, _plus):
    out, shape = multiplied(norm(x, gain), weight, scale)
    return (out + bias).view(shape)


def added(x, _gain, weight, scale, bias, plus):
    out, shape = multiplied(x, weight, scale)
    return plus + (out + bias).view(shape)


def added_without_bias(x, gain, weight, scale, _bias, plus):
    out, shape = multiplied(norm(x, gain), weight, scale)
    return out.view(shape) + plus


def read_twice(x, gain, weight, scale, bias, _plus):
    """Others read the normed rows, which are made anyway: they are rounded where they are made."""
    rows = norm(x, gain)
    out, shape = multiplied(rows, weight, scale)
    return rows, (out + bias).view(shape)


def heads_normed(x, gain, weight, scale, bias, _plus):
    """Every half of a row is normed for itself: the product would norm it whole."""
    halves = norm(x.reshape(*x.shape[:-1], 2, -1), gain[: WIDTH // 2])
    rows = quantise_rows(halves.reshape(-1, WIDTH))
    return linear_fp8(*rows, weight, scale, x.dtype) + bias


def gated(x, _gain, weight, scale, bias, _plus):
    """What a compiled launch makes is rounded by it."""
    out, shape = multiplied(torch.nn.functional.silu(x) * x, weight, scale)
    return (out + bias).view(shape)


@pytest.mark.parametrize(
    ("function", "operator", "parts"),
    [
        (normed, "mogul.rows_linear_fp8", (True, True, False)),
        (added, "mogul.rows_linear_fp8", (False, True, True)),
        (added_without_bias, "mogul.rows_linear_fp8", (True, False, True)),
        (read_twice, "mogul.linear_fp8", None),
        (heads_normed, "mogul.linear_fp8", None),
        (gated, "mogul.linear_fp8", None),
    ],
)
def test_products_take_what_surrounds_them(function, operator, parts):
    torch.manual_seed(0)
    x, gain = torch.randn(1, 5, WIDTH).bfloat16(), (1 + torch.randn(WIDTH) / 4).bfloat16()
    bias, plus = torch.randn(COLUMNS).bfloat16(), torch.randn(1, 5, COLUMNS).bfloat16()
    args = (x, gain, *packed(COLUMNS, WIDTH), bias, plus)
    graph = traced_reshaped(function, *args)
    want = graph(*args)
    FewRows()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    (found,) = (node for node in graph.graph.nodes if str(node.target).startswith("mogul."))
    assert str(found.target).removesuffix(".default") == operator
    if parts is not None:
        assert tuple(found.args[place] is not None for place in (1, 6, 7)) == parts
    got = graph(*args)
    pairs = [(got, want)] if isinstance(want, torch.Tensor) else zip(got, want, strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=6e-2, rtol=2e-2)


def block(x, gain, router, factors, experts, shared):
    rows = norm(x, gain).reshape(-1, WIDTH)
    logits = torch.ops.mogul.linear(rows, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, factors, RULE, 1.0)
    parts = torch.ops.mogul.moe_quantised_shared(rows, *experts, ids, weights, *shared)
    return x + (parts[0] + parts[1]).reshape(x.shape)


def unequal_parts(x, gain, router, factors, experts, shared):
    rows = norm(x, gain).reshape(-1, WIDTH)
    logits = torch.ops.mogul.linear(rows, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, factors, RULE, 1.0)
    parts = torch.ops.mogul.moe_quantised_shared(rows, *experts, ids, weights, *shared)
    return x + (parts[0] + 2 * parts[1]).reshape(x.shape)


def computed_norm(x, gain, *more):
    """One token's launch reads the norm's weight and the router before what came ahead ends."""
    return block(x, 1 + gain, *more)


def computed_router(x, gain, router, *more):
    return block(x, gain, 2 * router, *more)


def of_a_block():
    torch.manual_seed(0)
    x, gain = torch.randn(1, 5, WIDTH).bfloat16(), (1 + torch.randn(WIDTH) / 4).bfloat16()
    router, factors = torch.randn(8, WIDTH).bfloat16(), 0.5 + torch.rand(8)
    experts = (*packed(8, 64, WIDTH), *packed(8, WIDTH, 32))
    return x, gain, router, factors, experts, (*packed(96, WIDTH), *packed(WIDTH, 48))


def rewritten(function):
    args = of_a_block()
    graph = traced_reshaped(function, *args)
    FewRows()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes]
    return args, graph, [name for name in names if name.startswith("mogul.")]


def test_experts_norm_route_and_add():
    args, graph, found = rewritten(block)
    assert found == ["mogul.moe_normed_shared"]
    x, gain, router, factors, experts, shared = args
    more = (router, None, factors, RULE, 1.0, *experts, *shared)
    want = fp8_token._moe_host(x[0], gain, None, 1e-6, *more)
    torch.testing.assert_close(graph(*args), want[None], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("function", [unequal_parts, computed_norm, computed_router])
def test_what_is_not_simply_added_or_not_there_yet_stays(function):
    _, _, found = rewritten(function)
    assert found == ["mogul.moe_routed_shared"]
