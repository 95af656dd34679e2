"""What the experts answer to whoever wants more than one gradient: numbers, or words."""

from __future__ import annotations

import logging

import pytest
import torch
from torch.autograd import forward_ad

from mogul.core.errors import BackendError
from mogul.kernels import MOE_FORWARD, moe_forward

TOKENS, WIDTH = 5, 8


def tensors() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(*shape, generator=rng, dtype=torch.float64)
        for shape in ((TOKENS, WIDTH), (3, 12, WIDTH), (3, WIDTH, 6))
    )
    ids, weights = torch.randint(0, 4, (TOKENS, 2), generator=rng), torch.rand(TOKENS, 2)
    return {"x": x, "gate_up": gate_up, "down": down, "ids": ids, "weights": weights}


def penalised(call: dict[str, torch.Tensor], backend: str) -> torch.Tensor:
    """A loss that holds the square of a gradient which is linear in the layer's output."""
    out = moe_forward(**call, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), call["x"], create_graph=True)
    return out.sum() + grad.square().sum()


def test_a_second_derivative_is_refused_and_not_taken_for_zero() -> None:
    call = tensors()
    call["x"].requires_grad_()
    call["gate_up"].requires_grad_()
    loss = penalised(call, "cpu")
    torch.testing.assert_close(loss, penalised(call, "reference"))
    with pytest.raises(BackendError, match="cannot be differentiated again") as caught:
        loss.backward()
    assert "backend='reference'" in caught.value.__notes__[0]


def test_the_reference_has_a_second_derivative() -> None:
    call = tensors()
    names = ("x", "gate_up", "down")

    def run(*leaves: torch.Tensor) -> torch.Tensor:
        return moe_forward(**{**call, **dict(zip(names, leaves, strict=True))}, backend="reference")

    leaves = [call[name].requires_grad_() for name in names]
    assert torch.autograd.gradgradcheck(run, leaves)


def test_a_graph_of_gradients_that_nobody_differentiates_is_fine() -> None:
    call = tensors()
    call["x"].requires_grad_()
    out = moe_forward(**call, backend="cpu").sum()
    first, second = (
        torch.autograd.grad(out, call["x"], retain_graph=True, create_graph=again)[0]
        for again in (True, False)
    )
    assert torch.equal(first, second)


def run_rows(call: dict[str, torch.Tensor], backend: str = "auto"):
    return lambda x: moe_forward(**{**call, "x": x}, backend=backend)


def test_transforms_of_functions_go_to_the_reference_with_a_line(caplog, monkeypatch) -> None:
    monkeypatch.setattr(MOE_FORWARD, "_resolved", {})
    call = tensors()
    run, plain = run_rows(call), run_rows(call, "reference")
    several = torch.stack([call["x"], 2 * call["x"]])
    with caplog.at_level(logging.WARNING, logger="mogul"):
        both = torch.vmap(run)(several)
        slope = torch.func.grad(lambda x: run(x).square().sum())(call["x"])
        out, tangent = torch.func.jvp(run, (call["x"],), (call["x"],))
    torch.testing.assert_close(both, torch.stack([plain(x) for x in several]))
    leaf = call["x"].clone().requires_grad_()
    (want,) = torch.autograd.grad(plain(leaf).square().sum(), leaf)
    torch.testing.assert_close(slope, want)
    near = (plain(1.000001 * call["x"]) - plain(0.999999 * call["x"])) / 2e-6
    torch.testing.assert_close(tangent, near, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, run(call["x"]))
    assert "cpu: torch.func and forward-mode derivatives" in caplog.text


def test_a_forward_derivative_is_never_lost() -> None:
    call = tensors()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call["x"], torch.ones_like(call["x"]))
        with pytest.raises(BackendError, match=r"'cpu' cannot run here: torch\.func and"):
            run_rows(call, "cpu")(dual)
        assert forward_ad.unpack_dual(run_rows(call)(dual)).tangent is not None


def test_defaults_of_torch_change_nothing() -> None:
    call = tensors()
    one = {name: call[name][:1] if name in ("x", "ids", "weights") else call[name] for name in call}
    want, alone = moe_forward(**call), moe_forward(**one)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            assert torch.equal(moe_forward(**call), want)
            assert torch.equal(moe_forward(**one), alone)
    finally:
        torch.set_default_dtype(torch.float32)


def test_autocast_leaves_float64_alone() -> None:
    call = tensors()
    want = moe_forward(**call)
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", torch.bfloat16):
            got = moe_forward(**call, backend=backend)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
