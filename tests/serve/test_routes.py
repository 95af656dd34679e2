"""A router goes inside the operator of its experts where nobody else wants what it found."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from torch.fx.experimental.proxy_tensor import make_fx

from mogul.kernels.triton import quant_shared, routing
from mogul.serve.routes import route_inside

assert routing
assert quant_shared
RULE = [8, 2, 2, 0, 0, 0, 0]
FP8 = torch.float8_e4m3fn


def block(x, router, experts, shared):
    logits = torch.ops.mogul.linear(x, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, None, RULE, 1.0)
    return torch.ops.mogul.moe_quantised_shared(x, *experts, ids, weights, *shared)


def with_scores(x, router, experts, shared):
    logits = torch.ops.mogul.linear(x, router, torch.float32)
    ids, weights, scores, _ = torch.ops.mogul.route(logits, None, None, RULE, 1.0)
    return *torch.ops.mogul.moe_quantised_shared(x, *experts, ids, weights, *shared), scores + 1


def with_logits(x, router, experts, shared):
    logits = torch.ops.mogul.linear(x, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, None, RULE, 1.0)
    return *torch.ops.mogul.moe_quantised_shared(x, *experts, ids, weights, *shared), logits * 2


def doubled_weights(x, router, experts, shared):
    logits = torch.ops.mogul.linear(x, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, None, RULE, 1.0)
    return torch.ops.mogul.moe_quantised_shared(x, *experts, ids, weights * 2, *shared)


def traced(function):
    def packed(*shape):
        return torch.zeros(shape).to(FP8), torch.ones(shape[:-1])

    x, router = torch.randn(5, 32, dtype=torch.bfloat16), torch.randn(8, 32, dtype=torch.bfloat16)
    experts = (*packed(8, 64, 32), *packed(8, 32, 32))
    shared = (*packed(96, 32), *packed(32, 48))
    return make_fx(function, tracing_mode="fake")(x, router, experts, shared).graph


def operators(graph):
    return [str(n.target) for n in graph.nodes if str(n.target).startswith("mogul.")]


def test_a_router_goes_inside():
    graph = traced(block)
    (before,) = (n for n in graph.nodes if "moe_quantised_shared" in str(n.target))
    x, *tensors = before.args
    route_inside(graph)
    graph.eliminate_dead_code()
    graph.lint()
    assert operators(graph) == ["mogul.moe_routed_shared.default"]
    (after,) = (n for n in graph.nodes if "moe_routed_shared" in str(n.target))
    assert after.args[0] is x
    assert after.args[1] is x
    assert list(after.args[3:7]) == [None, None, RULE, 1.0]
    assert list(after.args[7:]) == [*tensors[:4], *tensors[6:]]


@pytest.mark.parametrize("function", [with_scores, with_logits, doubled_weights])
def test_a_router_that_others_read_stays(function):
    graph = traced(function)
    route_inside(graph)
    graph.eliminate_dead_code()
    assert "mogul.moe_quantised_shared.default" in operators(graph)
