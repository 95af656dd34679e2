"""Norms, rotations, residuals and routers inside the operators beside them: numbers as before."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
from traced import as_inductor_sees_it, norm, with_reshapes

from mogul.serve.attention import LayerCache, StepState, running
from mogul.serve.passes import FewRows

HEADS, KV_HEADS, WIDTH, TOKENS = 4, 2, 16, 6


def product(x, weight, w):
    return F.linear(norm(x, weight), w)


def residual(x, w, more):
    return more + F.linear(x, w)


def router(x, weight, w):
    rows = norm(x, weight)
    values, ids = F.linear(rows, w).softmax(-1, dtype=torch.float).topk(3, -1)
    values /= values.sum(-1, keepdim=True)
    return rows, values.to(x.dtype), ids


def output_and_router(x, w, more, weight, gate):
    """A layer's middle: what attention gave, the residual, and who picks from their sum."""
    total = more[None] + F.linear(x, w).view(1, len(x), -1)
    rows, values, ids = router(total.view(-1, total.shape[-1]), weight, gate)
    return total, rows, values, ids


def shared_expert_first(x, weight, w, own):
    """Somebody reads the normed rows before the router does."""
    rows = norm(x, weight)
    first = F.linear(rows, own)
    values, ids = F.linear(rows, w).softmax(-1, dtype=torch.float).topk(3, -1)
    return first, values, ids


def other_norm(x, weight, w):
    """A mean of four powers: not recognised."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(4).mean(-1, keepdim=True) + 1e-6)
    return F.linear(weight * wide.to(x.dtype), w)


def heads_normed(x, weight, w):
    """Every head is normed for itself, the product reads all of a token: the norm stays."""
    return F.linear(norm(x, weight).reshape(len(x), -1), w)


def computed_norm(x, weight, w):
    """A launch before would make the weight, which a router reads ahead of what is before it."""
    return router(x, 1 + weight, w)


def computed_weight(x, weight, w):
    """One row's product reads its weight as far ahead."""
    return product(x, weight, 2 * w)


def computed_weight_and_residual(x, w, more):
    return residual(x, 2 * w, more)


def shared(x, weight, w):
    """Normed rows that others read too, and no router: the norm stays."""
    rows = norm(x, weight)
    return rows, F.linear(rows, w)


def rewritten(function, *args):
    graph = with_reshapes(as_inductor_sees_it(function, *args))
    want = graph(*args)
    FewRows()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes]
    return graph, want, [name for name in names if name.startswith("mogul")]


@pytest.mark.parametrize(
    ("function", "shapes", "operators"),
    [
        (product, ((5, 32), (32,), (16, 32)), ["mogul.normed_linear"]),
        (residual, ((5, 32), (16, 32), (5, 16)), ["mogul.added_linear"]),
        (residual, ((1, 32), (16, 32), (5, 16)), ["mogul.linear"]),
        (router, ((5, 32), (32,), (16, 32)), ["mogul.normed_route"]),
        (
            output_and_router,
            ((5, 32), (24, 32), (5, 24), (24,), (16, 24)),
            ["mogul.added_route"],
        ),
        (
            shared_expert_first,
            ((5, 32), (32,), (16, 32), (24, 32)),
            ["mogul.normed_route", "mogul.linear"],
        ),
        (other_norm, ((5, 32), (32,), (16, 32)), ["mogul.linear"]),
        (shared, ((5, 32), (32,), (16, 32)), ["mogul.linear"]),
        (heads_normed, ((5, 2, 16), (16,), (24, 32)), ["mogul.linear"]),
        (computed_weight, ((5, 32), (32,), (16, 32)), ["mogul.linear"]),
        (computed_weight_and_residual, ((5, 32), (16, 32), (5, 16)), ["mogul.linear"]),
        (
            computed_norm,
            ((5, 32), (32,), (16, 32)),
            ["mogul.linear", "mogul.softmax_topk"],
        ),
    ],
)
def test_products_say_the_same_in_fewer_operators(function, shapes, operators):
    torch.manual_seed(0)
    args = [torch.randn(shape).bfloat16() for shape in shapes]
    graph, want, found = rewritten(function, *args)
    assert found == operators
    got = graph(*args)
    pairs = [(got, want)] if isinstance(want, torch.Tensor) else list(zip(got, want, strict=True))
    for one, other in pairs:
        torch.testing.assert_close(one, other, atol=2e-2, rtol=2e-2)


def rotate(x, cos, sin):
    left, right = x[..., : WIDTH // 2], x[..., WIDTH // 2 :]
    return x * cos[:, None] + torch.cat((-right, left), -1) * sin[:, None]


def attention(*, norms=True, rotation=rotate):
    def run(query, key, value, cos, sin, query_norm, key_norm, layer):
        if norms:
            query, key = norm(query, query_norm), norm(key, key_norm, 1e-3)
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = rotation(query, cos, sin), rotation(key, cos, sin)
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]
        return torch.ops.mogul.attend(*rows, layer, 0.25, None, None)

    return run


def state():
    pages = [torch.zeros(2, 16, KV_HEADS, WIDTH).bfloat16() for _ in range(2)]
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    table = torch.tensor([[1]], dtype=torch.int32)
    return StepState(
        16 + torch.arange(TOKENS), table, ends, ends[1:].clone(), TOKENS, [LayerCache(*pages)]
    )


def inputs():
    torch.manual_seed(0)
    angle = torch.randn(1, TOKENS, WIDTH // 2).repeat(1, 1, 2)
    heads = [torch.randn(1, TOKENS, n, WIDTH).bfloat16() for n in (HEADS, KV_HEADS, KV_HEADS)]
    norms = [(1 + torch.randn(WIDTH) / 4).bfloat16() for _ in range(2)]
    return *heads, angle.cos().bfloat16(), angle.sin().bfloat16(), *norms, torch.tensor(0)


def other_rotation(x, cos, sin):
    """Neighbours paired instead of halves: not recognised."""
    return (
        x * cos[:, None]
        + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * (sin[:, None])
    )


def test_a_rotation_that_changes_the_dtype_stays():
    """Attention would say it in the dtype before."""
    query, key, value, cos, sin, *others = inputs()
    args = (query, key, value, cos.float(), sin.float(), *others)
    graph = as_inductor_sees_it(attention(), *args)
    FewRows()(graph.graph)
    names = [str(node.target) for node in graph.graph.nodes]
    assert "mogul.attend.default" in names


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (attention(), "mogul.attend_turned"),
        (attention(norms=False), "mogul.attend_turned"),
        (attention(rotation=other_rotation), "mogul.attend"),
    ],
)
def test_attention_norms_and_rotates_by_itself(function, operator):
    args = inputs()
    first, second = state(), state()
    with running(first):
        graph = as_inductor_sees_it(function, *args)
        want = graph(*args)
    FewRows()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    names = [str(node.target).removesuffix(".default") for node in graph.graph.nodes]
    assert [name for name in names if name.startswith("mogul")] == [operator]
    with running(second):
        got = graph(*args)
    torch.testing.assert_close(got, want, atol=3e-2, rtol=3e-2)
    keys = [one.caches[0].key for one in (first, second)]
    torch.testing.assert_close(*keys, atol=3e-2, rtol=3e-2)
    assert keys[0].any()


def test_experts_are_one_operator_in_compiled_code(monkeypatch):
    """Also the second time, when a call of the kind was served before."""
    from mogul.kernels import moe

    entry = moe.MOE_FORWARD._entries["triton"]
    served = replace(entry, why_not=lambda **_facts: None)
    monkeypatch.setitem(moe.MOE_FORWARD._entries, "triton", served)
    monkeypatch.setattr(moe.MOE_FORWARD, "_resolved", {})
    monkeypatch.setattr(moe, "_SETTLED", {})
    graphs = []

    def keep(graph, _inputs):
        graphs.append(graph)
        return lambda *args: tuple(args)

    x, ids = torch.randn(3, 32).bfloat16(), torch.zeros(3, 2, dtype=torch.int64)
    gate_up, down = torch.randn(4, 48, 32).bfloat16(), torch.randn(4, 32, 24).bfloat16()
    compiled = torch.compile(moe.moe_forward, backend=keep, fullgraph=True, dynamic=True)
    with torch.inference_mode():
        for _ in range(2):
            torch._dynamo.reset()
            compiled(x, gate_up, down, ids, torch.ones(3, 2))
    operators = [
        node.target
        for graph in graphs
        for node in graph.graph.find_nodes(op="call_function", target=torch.ops.mogul.moe)
    ]
    assert len(graphs) == len(operators) == 2
