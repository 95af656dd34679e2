"""fp8 products and experts with what surrounds them on an NVIDIA GPU, against their definitions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mogul.kernels.quant_format import quantise_rows

pytest.importorskip("triton")
from mogul.kernels.triton import fp8_token

pytestmark = pytest.mark.gpu


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").mul_(shape[-1] ** -0.5).bfloat16()


def packed(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return quantise_rows(normal(*shape))


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.float().cpu() - want.float()).norm() / want.float().norm())


def on_host(*args: Any) -> list[Any]:
    return [one.cpu() if isinstance(one, torch.Tensor) else one for one in args]


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 700])
@pytest.mark.parametrize("normed", [True, False])
def test_products(tokens: int, normed: bool) -> None:
    columns, inner = 272, 1360
    weight, scale = packed(columns, inner)
    x, norm = normal(tokens, inner) * 30, 1 + normal(inner)
    args = (x, norm if normed else None, None, 1e-5, weight, scale, normal(columns))
    args = (*args, normal(tokens, columns))
    got = torch.ops.mogul.rows_linear_fp8(*args)
    assert error(got, torch.ops.mogul.rows_linear_fp8(*on_host(*args))) <= 4e-2
    assert torch.equal(torch.ops.mogul.rows_linear_fp8(*args), got)


@pytest.mark.parametrize("tokens", [1, 3, 100, 700])
@pytest.mark.parametrize("score", [0, 1])
def test_experts(tokens: int, score: int) -> None:
    experts, picks, width, inner, shared = 64, 8, 320, 208, 528
    tensors = (*packed(experts, 2 * inner, width), *packed(experts, width, inner))
    tensors = (*tensors, *packed(2 * shared, width), *packed(width, shared))
    router, norm = 8 * normal(experts, width), 1 + normal(width)
    factors = 0.5 + torch.rand(experts, device="cuda")
    x, rule = normal(tokens, width) * 30, [experts, picks, picks, 0, 0, score, 0]
    args = (x, norm, None, 1e-5, router, None, factors, rule, 1.0, *tensors)
    got = torch.ops.mogul.moe_normed_shared(*args)
    want = torch.ops.mogul.moe_normed_shared(*on_host(*args))
    assert error(got - x, want - x.cpu()) <= 8e-2
    for _ in range(3):
        assert torch.equal(torch.ops.mogul.moe_normed_shared(*args), got)


def test_one_token_captured_many_times() -> None:
    """Counters are left as found and no launch overtakes another."""
    experts, picks, width, inner, shared = 64, 8, 1024, 320, 1280
    tensors = (*packed(experts, 2 * inner, width), *packed(experts, width, inner))
    tensors = (*tensors, *packed(2 * shared, width), *packed(width, shared))
    router, norm = 8 * normal(experts, width), 1 + normal(width)
    more = (router, None, None, [experts, picks, picks, 0, 0, 0, 0], 1.0, *tensors)
    weight, scale = packed(width, width)
    x = normal(1, width) * 30

    def chain() -> torch.Tensor:
        y = x
        for _ in range(6):
            y = torch.ops.mogul.rows_linear_fp8(y, norm, None, 1e-5, weight, scale, None, y)
            y = torch.ops.mogul.moe_normed_shared(y, norm, None, 1e-5, *more)
        return y

    want = chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = chain()
    for _ in range(50):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(got, want)
    assert not fp8_token.counters(x.device).any()
