"""Norms, residuals and picks in one launch with products: interpreted, compiled for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripts import printed_by

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.kernels.triton import linear_kernels, normed_kernels  # noqa: E402

SCRIPT = """
import torch
from mogul.kernels.triton import linear, normed

linear.product = lambda x, weight, dtype: (x @ weight.T).to(dtype)  # few rows too: no device
host = torch.device("cpu")

def wide(tensors):
    return [t.float() if getattr(t, "dtype", None) == torch.half else t for t in tensors]

def close(got, want):
    assert (got - want).abs().max() < 3e-3 * want.abs().max()

torch.manual_seed(0)
for rows, columns, inner in ((1, 48, 64), (1, 8, 2064), (3, 24, 272), (17, 32, 128)):
    x, weight = torch.randn(rows, inner).half(), (torch.randn(columns, inner) / inner**0.5).half()
    norm, plus = (1 + torch.randn(inner) / 4).half(), torch.randn(rows, columns).half()
    for number, eps in ((None, 1e-2), (torch.tensor(1e-2, dtype=torch.float64), 0.0)):
        args = (x, norm, number, eps, weight)
        close(normed.normed_linear(*args), normed._normed_linear_host(*wide(args)))
    args = (x, weight, plus)
    close(normed.added_linear(*args), normed._added_linear_host(*wide(args)))
    for columns, k, renormalise in ((32, 4, True), (24, 3, False)):
        router = (torch.randn(columns, inner) / inner**0.5).half()
        args = (x, norm, None, 1e-6, router, k, renormalise, torch.float32)
        got, want = normed.normed_route(*args), normed._normed_route_host(*args)
        close(got[0], want[0].float())
        logits = want[0] @ router.T
        told = torch.ops.mogul.softmax_topk(logits, k, renormalise, torch.float32)
        assert (logits.gather(1, got[2]) - logits.gather(1, told[1])).abs().max() < 4e-3
        assert (got[1] - told[0]).abs().max() < 4e-3
        assert not normed.counters(host).any(), "left as found"
        route = (1 + torch.randn(weight.shape[0]).half() / 4, None, 1e-2)
        last = (router[:, :1].expand(-1, weight.shape[0]) * torch.randn(weight.shape[0]).half())
        args = (x, weight, plus, *route, last, k, renormalise, torch.float32)
        got, want = normed.added_route(*args), normed._added_route_host(*args)
        close(got[0], want[0].float())
        close(got[1], want[1].float())
        logits = want[1] @ last.T
        picked, told = logits.gather(1, got[3]), logits.gather(1, want[3])
        assert (picked - told).abs().max() < 1e-2 * logits.abs().max()
x, weight, norm, plus = (torch.randn(*size).half() for size in ((1, 64), (8, 64), (64,), (1, 8)))
for cache, run in (
    (normed._norm, lambda t: normed.norm_rows(x, t(norm), 0.5)),
    (normed._norm, lambda t: normed.norm_sums(x, t(x), norm, 0.5)),
    (normed._one, lambda t: normed.product_one(x, weight, norm=t(norm), eps=0.5)),
    (normed._one, lambda t: normed.product_one(x, weight, residual=t(plus))),
    (normed._one, lambda t: normed.product_one(x, t(weight), eps=0.5)),
    (linear._narrow, lambda t: linear.linear_narrow(x, t(weight), torch.float32)),
    (normed._route, lambda t: normed.normed_route(
        x, t(norm), None, 0.5, weight, 2, True, torch.float32)),
):
    cache.cache_clear()
    for to in (torch.Tensor.half, torch.Tensor.float):
        run(to)
    assert cache.cache_info().currsize == 2, "dtypes tell launches apart"
print("normed is right")
"""


def test_launches_equal_their_definitions() -> None:
    assert "normed is right" in printed_by(SCRIPT)


POINTERS = {
    **dict.fromkeys(("x_ptr", "norm_ptr", "w_ptr", "plus_ptr", "out_ptr", "normed_ptr"), "bf16"),
    "bias_ptr": "bf16",
    **dict.fromkeys(("x_scale_ptr", "w_scale_ptr", "logits_ptr"), "fp32"),
    **{"done_ptr": "i32", "values_ptr": "bf16", "ids_ptr": "i64"},
}
CONSTANTS = {
    **{"N": 2048, "K": 4096, "BLOCK_N": 16, "BLOCK_K": 256, "BLOCK_T": 16, "STAGES": 4},
    **{"EPS": 1e-6, "NORM": True, "ADD": True, "BIAS": True, "SCALED": False, "LINES": 16},
    **{"WIDTH": 128, "PICKS": 8, "SLOTS": 8, "RENORMALISE": True, "PDL": True},
}


def ptx(kernel: Any, **changes: Any) -> str:
    """Compiled for sm_90."""
    names = [parameter.name for parameter in kernel.params]
    values = {**CONSTANTS, **changes}
    constants = {name: values[name] for name in names if name.isupper()}
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{POINTERS[name]}"
        if name in POINTERS
        else "i32"
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.parametrize(
    ("kernel", "sizes", "reads"),
    [
        (normed_kernels.product_one, {"BLOCK_N": 1, "BLOCK_K": 2048}, "ld.global"),
        (
            normed_kernels.route_few,
            {"N": 128, "K": 2048, "BLOCK_N": 4, "BLOCK_K": 2048},
            "ld.global",
        ),
        (linear_kernels.linear_few, {}, "prefetch.global.L2"),
    ],
)
def test_weights_are_on_their_way_before_the_kernel_before_ends(
    kernel: Any, sizes: dict[str, int], reads: str
) -> None:
    before, wait, after = ptx(kernel, **sizes).partition("griddepcontrol.wait")
    assert wait
    assert "griddepcontrol.launch_dependents" in before
    assert reads in before
    assert "st.global" in after
    assert "st.global" not in before


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 16, 64])
def test_launches_equal_their_definitions_on_a_device(rows: int) -> None:
    from mogul.kernels.triton import normed, ops

    torch.manual_seed(0)
    kind = {"device": "cuda", "dtype": torch.bfloat16}
    x, norm = torch.randn(rows, 512, **kind), 1 + torch.randn(512, **kind) / 4
    weight, plus = torch.randn(640, 512, **kind) / 23, torch.randn(rows, 640, **kind)
    near = {"rtol": 2e-2, "atol": 3e-2}
    args = (x, norm, None, 1e-6, weight)
    torch.testing.assert_close(
        normed.normed_linear(*args), normed._normed_linear_host(*args), **near
    )
    args = (x, weight, plus)
    torch.testing.assert_close(normed.added_linear(*args), normed._added_linear_host(*args), **near)
    args = (x, norm, None, 1e-6, weight[:128], 8, True, torch.float32)
    for _ in range(3):  # counters are left as found
        rows_TD, shares_TK, ids_TK = normed.normed_route(*args)
    torch.testing.assert_close(rows_TD, normed.norm_host(x, norm, None, 1e-6), **near)
    logits = rows_TD.float() @ weight[:128].float().T
    want = logits.topk(8, -1)
    torch.testing.assert_close(logits.gather(1, ids_TK), want.values, **near)
    torch.testing.assert_close(shares_TK, want.values.softmax(-1), **near)
    last = torch.randn(128, 640, **kind) / 25
    args = (x, weight, plus, 1 + torch.randn(640, **kind) / 4, None, 1e-6, last, 8, True)
    got = normed.added_route(*args, torch.float32)
    want = normed._added_route_host(
        *(a.cpu() if torch.is_tensor(a) else a for a in args), torch.float32
    )
    torch.testing.assert_close(got[0].cpu(), want[0], **near)
    torch.testing.assert_close(got[1].cpu(), want[1], **near)
    torch.testing.assert_close(got[2].cpu(), want[2], **near)
    gate_up, down = torch.randn(16, 256, 512, **kind) / 23, torch.randn(16, 512, 128, **kind) / 11
    moe = (x, gate_up, down, ids_TK % 16, shares_TK.bfloat16())
    for residual in torch.randn(3, rows, 512, **kind):  # from the second on from a tape
        torch.testing.assert_close(ops.moe_added(*moe, residual), ops.moe(*moe) + residual, **near)
