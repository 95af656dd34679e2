"""Two computations at once give what they give one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mogul.kernels import moe_forward, side_by_side


def parts(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return side_by_side(lambda: x @ weight, lambda: torch.tanh(x) @ weight.T, x)


def test_results_and_gradients_come_in_order() -> None:
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(4, 4)
    first, second = parts(x, weight)
    assert torch.equal(first, x @ weight)
    assert torch.equal(second, torch.tanh(x) @ weight.T)
    (first + second).sum().backward()
    assert x.grad is not None


def test_is_traced_into_one_graph() -> None:
    x, weight = torch.randn(5, 4), torch.randn(4, 4)
    traced = torch.compile(parts, fullgraph=True, backend="eager")
    for a, b in zip(traced(x, weight), parts(x, weight), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 4096])
def test_a_captured_pair_follows_its_input(tokens: int) -> None:
    weight = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    x, other = (torch.randn(tokens, 512, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    with torch.no_grad():
        want = [other @ weight, torch.tanh(other) @ weight.T]
        for _ in range(3):  # plain calls take turns on the same side stream
            plain = parts(other, weight)
            assert all(torch.equal(a, b) for a, b in zip(plain, want, strict=True))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            given = parts(x, weight)
        x.copy_(other)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(given, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 1024])
def test_routed_experts_beside_a_shared_one_are_the_same_captured_or_not(tokens: int) -> None:
    torch.manual_seed(tokens)
    options = {"device": "cuda", "dtype": torch.bfloat16}
    gate_up, down = torch.randn(8, 512, 256, **options) / 16, torch.randn(8, 256, 256, **options)
    weights, ids = torch.rand(tokens, 8, device="cuda").topk(2, -1)
    shared = torch.randn(256, 256, **options)

    def layer(x: Tensor) -> Tensor:
        routed, beside = side_by_side(
            lambda: moe_forward(x, gate_up, down, ids, weights), lambda: x @ shared, x
        )
        return routed + beside

    x, other = (torch.randn(tokens, 256, **options) for _ in range(2))
    with torch.no_grad():
        want = moe_forward(other, gate_up, down, ids, weights) + other @ shared
        assert all(torch.equal(layer(other), want) for _ in range(3))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        x.copy_(other)
        graph.replay()
    assert torch.equal(out, want)
