"""Edges of the layer on an NVIDIA GPU: the most tokens of a call, and sums that nearly cancel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mogul.kernels import RouterSpec, moe_forward
from mogul.kernels.reference.route import route_reference
from mogul.kernels.triton.routing import route_counted
from mogul.kernels.triton.sorting import sorted_size

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, INNER, EXPERTS, PICKS = 65_536, 5120, 64, 16, 8
"""2.7e9 numbers in the rows that down writes and in those that their sum reads."""
LIMIT = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


def relative(given: Tensor, want: Tensor) -> float:
    error = float((given.double() - want.double()).norm() / want.double().norm())
    return error if error == error else float("inf")


def weights_of(expert: int, call: tuple[Tensor, ...], dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of one expert's weights in fp32, from the layer's definition."""
    x, gate_up, down, ids, weights = call
    token, pick = (ids == expert).nonzero(as_tuple=True)
    leaves = [gate_up[expert].float().requires_grad_(), down[expert].float().requires_grad_()]
    gate, up = (x[token].float() @ leaves[0].T).chunk(2, -1)
    out = (torch.nn.functional.silu(gate) * up) @ leaves[1].T * weights[token, pick, None]
    return torch.autograd.grad(out, leaves, dout[token].float())


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_the_most_tokens_with_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    gate_up = normal(EXPERTS, 2 * INNER, WIDTH, scale=WIDTH**-0.5)
    down, x = normal(EXPERTS, WIDTH, INNER, scale=INNER**-0.5), normal(TOKENS, WIDTH)
    weights, ids = torch.rand(TOKENS, EXPERTS, device="cuda").topk(PICKS, -1)
    call = (x, gate_up, down, ids, weights / weights.sum(-1, keepdim=True))
    leaves = [tensor.requires_grad_() for tensor in (*call[:3], call[4])]
    out = moe_forward(*call, backend="triton")
    dout = (out.detach() + torch.randn_like(out)).detach()
    given = torch.autograd.grad(out, leaves, dout)
    call = tuple(tensor.detach() for tensor in call)
    with torch.no_grad():
        assert torch.equal(moe_forward(*call, backend="triton"), out)

    ends = torch.cat((torch.arange(48), torch.arange(TOKENS - 48, TOKENS))).to("cuda")
    some = [call[0][ends].float(), call[4][ends]]
    some = [tensor.requires_grad_() for tensor in some]
    plain = [weight.float() for weight in call[1:3]]
    want_out = moe_forward(some[0], *plain, call[3][ends], some[1], backend="reference")
    want = torch.autograd.grad(want_out, some, dout[ends].float())
    assert relative(out.detach()[ends], want_out.detach()) <= LIMIT[dtype]
    assert relative(given[0][ends], want[0]) <= LIMIT[dtype]
    assert relative(given[3][ends], want[1]) <= LIMIT[dtype]
    for expert in (0, EXPERTS - 1):
        for name, got, right in zip(
            ("gate_up", "down"), given[1:3], weights_of(expert, call, dout), strict=True
        ):
            assert relative(got[expert], right) <= LIMIT[dtype], name


@pytest.mark.parametrize("dtype", [torch.float32, *LIMIT], ids=str)
def test_routing_of_the_most_tokens(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    spec = RouterSpec(256, 8, num_groups=8, limit_groups=4, score="sigmoid")
    logits = torch.randn(TOKENS, 256, device="cuda").to(dtype)
    ids, weights, _, count, _ = route_counted(logits, spec)
    want_ids, want, _ = route_reference(logits, spec, None, None)
    same = (ids == want_ids).all(1)
    assert same.float().mean() >= 0.999  # scores that round alike may swap two picks
    assert float((weights - want)[same].abs().max()) <= 1e-6
    assert torch.equal(count, torch.bincount(ids.flatten(), minlength=256).int())


def test_a_forward_keeps_the_products_of_up_and_the_sort_alone() -> None:
    tokens, width, inner, experts, picks = 4096, 1024, 512, 32, 4
    x, gate_up, down = (
        torch.randn(size, device="cuda").bfloat16().requires_grad_()
        for size in ((tokens, width), (experts, 2 * inner, width), (experts, width, inner))
    )
    weights, ids = torch.rand(tokens, experts, device="cuda").topk(picks, -1)
    for _ in range(2):  # the first call also makes counters
        before = torch.cuda.memory_allocated()
        out = moe_forward(x, gate_up, down, ids, weights, backend="triton")
        kept = torch.cuda.memory_allocated() - before
        del out
    slots = tokens * picks
    products, result = 2 * slots * 2 * inner, 2 * tokens * width
    sort = 4 * sorted_size(slots, experts)
    assert products + result <= kept <= 1.05 * (products + result + sort)


def weight_gradient(tensors: list[Tensor], dtype: torch.dtype, backend: str) -> Tensor:
    """Of a call with every expert picked once, by the layer computed in a dtype."""
    x, gate_up, down, dout = (tensor.to(dtype) for tensor in tensors)
    ids = torch.arange(len(down), device=down.device)[None]
    weights = torch.full(ids.shape, 1 / len(down), device=down.device, requires_grad=True)
    out = moe_forward(x, gate_up, down, ids, weights, backend=backend)
    return torch.autograd.grad(out, weights, dout)[0]


def test_gradients_that_nearly_cancel_are_no_worse_than_those_of_torch() -> None:
    """One token, a gradient that knows nothing of the output: what is left of 2,048 products."""
    off: dict[str, list[float]] = {"triton": [], "reference": []}
    for seed in range(40):
        torch.manual_seed(seed)
        sizes = ((1, 2048), (8, 1536, 2048), (8, 2048, 768), (1, 2048))
        made = [torch.randn(size, device="cuda") for size in sizes]
        made[1] *= 2048**-0.5
        made[2] *= 768**-0.5
        tensors = [tensor.bfloat16() for tensor in made]
        want = weight_gradient(tensors, torch.float32, "reference")
        for backend, errors in off.items():
            errors.append(relative(weight_gradient(tensors, torch.bfloat16, backend), want))
    mean = {backend: sum(errors) / len(errors) for backend, errors in off.items()}
    print(mean, {backend: max(errors) for backend, errors in off.items()})
    assert mean["triton"] <= mean["reference"]
    assert mean["triton"] <= LIMIT[torch.bfloat16]
