"""Products of bfloat16 factors with float32 sums, against float64."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mogul.train.narrow import add_wide_product, multiplies_wide, router_logits


def _factors(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (
        torch.randn(*shape, generator=generator) for shape in ((96, 64), (16, 64), (96, 16))
    )
    return x.bfloat16().to(device), weight.bfloat16().to(device), grad.to(device)


ON_DEVICE = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.accelerator.is_available(), reason="needs an accelerator; none is here"
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_DEVICE)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_logits_are_those_of_wide_factors(device, compiled):
    x, weight, grad = _factors(device)
    x.requires_grad_()
    weight.requires_grad_()
    product = torch.compile(router_logits, backend="aot_eager") if compiled else router_logits
    logits = product(x, weight)
    assert logits.dtype is torch.float32
    wide_x, wide_weight = x.detach().double(), weight.detach().double()
    assert torch.allclose(logits.double(), wide_x @ wide_weight.t(), atol=1e-5)
    logits.backward(grad)
    for found, want in (
        (x.grad, grad.double() @ wide_weight),
        (weight.grad, grad.double().t() @ wide_x),
    ):
        assert found.dtype is torch.bfloat16
        assert (found.double() - want).norm() < 2**-8 * want.norm()


def test_the_operator_keeps_its_word():
    x, weight, _ = _factors("cpu")
    torch.library.opcheck(router_logits, (x.requires_grad_(), weight.requires_grad_()))


@pytest.mark.parametrize("turned", ["x", "weight"])
def test_compilers_are_told_how_gradients_lie(turned):
    """They lie in rows, however the factor they belong to does."""
    x, weight, grad = _factors("cpu")
    x, weight = (
        one.t().contiguous().t() if turned == name else one
        for name, one in (("x", x), ("weight", weight))
    )
    both = [x.requires_grad_(), weight.requires_grad_()]
    plain = torch.autograd.grad(router_logits(*both), both, grad)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) for each in (grad, *both)]
        told = torch.ops.mogul.router_gradients(*fakes)
    assert [each.stride() for each in told] == [each.stride() for each in plain]


def test_only_devices_that_can_are_asked():
    x, weight, _ = _factors("cpu")
    assert not multiplies_wide(x, weight)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_sums_are_added_to_in_float32(device):
    x, _, grad = _factors(device)
    total = torch.ones(16, 64, device=device)
    add_wide_product(total, grad.bfloat16().t(), x)
    want = 1 + grad.bfloat16().double().t() @ x.double()
    assert torch.allclose(total.double(), want, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_router_in_training_multiplies_so(device):
    assert multiplies_wide(*_factors(device)[:2])
