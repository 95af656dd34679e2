"""Products and experts in fp8 with what surrounds them: interpreted against their definitions."""

from __future__ import annotations

import re
from typing import Any

import pytest
from scripts import printed_by

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.kernels.triton import fp8_token_kernels as kernels  # noqa: E402

SCRIPT = """
import torch
from mogul.kernels import moe_with_shared
from mogul.kernels.quant_format import quantise_rows
from mogul.kernels.reference.route import route_reference
from mogul.kernels.triton import fp8_token as f, linear, quant_layer, quant_shared, routing

torch.manual_seed(0)

def close(got, want, most):
    error = (got.float() - want.float()).abs().max() / want.float().abs().max()
    assert error < most, error

def packed(*shape):
    return quantise_rows(torch.randn(shape) / shape[-1] ** 0.5)

def wide(value, scale):
    return value.float() * scale[..., None]

def half(*shape):
    return torch.randn(shape).half()

def expert(row, up, up_scale, down, down_scale):
    gate, up = (wide(up, up_scale) @ row).chunk(2)
    return wide(down, down_scale) @ (torch.nn.functional.silu(gate) * up)

def unrounded(x, norm, eps, route, tensors):
    # one token by the weights as they are, in fp32
    row = f.norm_host(x, norm, None, eps)
    router, *some, rule, factor = route
    told = route_reference(row.float() @ router.float().T, routing.spec_of(rule, factor), *some)
    row, out = row[0].float(), expert(row[0].float(), *tensors[4:])
    for e, weight in zip(told[0][0], told[1][0], strict=True):
        out += weight * expert(row, *(one[e] for one in tensors[:4]))
    return out

def torch_rounds(x, live=None, *, split=False):  # the interpreter's own conversion loses carries
    return quantise_rows(x)

quant_layer.rounded_rows = quant_shared.rounded_rows = f.rounded_rows = torch_rounds

def normed_by_torch(x, norm, *, keep):
    rows = f.norm_host(x, norm[0], None, norm[1])
    return rows, *quantise_rows(rows)

def gated_by_torch(both):
    gate, up = both.chunk(2, -1)
    return quantise_rows(torch.nn.functional.silu(gate) * up)

x, norm = half(5, 80), (1 + torch.randn(80) / 4).half()
normed, value, scale = f.normed_rows(x, (norm, 1e-2), keep=True)
want = normed_by_torch(x, (norm, 1e-2), keep=True)
close(normed, want[0], 2e-3)
close(scale, want[2], 2e-3)
near = (wide(value, scale) - want[0].float()).abs() < 0.2
assert near.float().mean() > 0.9  # the interpreter's own conversion to e4m3 loses carries
f.normed_rows, quant_shared.gated_rows = normed_by_torch, gated_by_torch

def scaled(rows, row_scale, weight, scale, dtype, bias=None):
    out = linear._fp8_on_host(rows, row_scale, weight, scale, dtype)
    return out if bias is None else out + bias

f.scaled_product = scaled
linear._fp8_on_device = linear._fp8_on_host

for count, columns, inner in ((1, 48, 64), (1, 50, 272), (3, 48, 96), (70, 32, 64)):
    weight, scale = packed(columns, inner)
    x, norm = half(count, inner), (1 + torch.randn(inner) / 4).half()
    bias, plus = half(columns), half(count, columns)
    normed, number = (norm, None, 1e-2), (norm, torch.tensor(1e-2), 0.0)
    for one, *more in ((normed, bias, plus), (number, None, plus), ((None, None, 0.0), bias, None)):
        got = f.rows_linear_fp8(x, *one, weight, scale, *more)
        want = x if one[0] is None else f.norm_host(x, *one)
        want = want.float() @ wide(weight, scale).T
        for term in more:
            want = want if term is None else want + term.float()
        close(got, want, 2e-3 if count == 1 else 4e-2)

for experts, picks, inner, shared in ((8, 4, 48, 80), (16, 2, 16, 144)):
    width = 64
    tensors = (*packed(experts, 2 * inner, width), *packed(experts, width, inner),
               *packed(2 * shared, width), *packed(width, shared))
    router, norm = half(experts, width), (1 + torch.randn(width) / 4).half()
    factors, bias = 0.5 + torch.rand(experts), torch.randn(experts)
    cases = ((0, 0, (None, factors)), (1, 1, (bias, factors)), (2, 0, (None, None)))
    for weighting, score, some in cases:
        rule = [experts, picks, picks, 0, 0, score, weighting]
        for count in (1, 3):
            x = half(count, width)
            got = f.moe_normed_shared(x, norm, None, 1e-3, router, *some, rule, 1.5, *tensors)
            want = f._moe_host(x, norm, None, 1e-3, router, *some, rule, 1.5, *tensors)
            close(got - x, want - x, 0.12)
        assert not f.counters(x.device).any(), "left as found"
        x = half(1, width)
        args = (router, *some, rule, 1.5)
        normed, ids, weights = f.pick_one(x, (norm, 1e-3), *args)
        rows = f.norm_host(x, norm, None, 1e-3)
        close(normed, rows, 2e-3)
        logits = normed.float() @ router.float().T
        told = route_reference(logits, routing.spec_of(rule, 1.5), *some)
        assert torch.equal(ids, told[0])
        close(weights, told[1], 1e-3)
        want = unrounded(x, norm, 1e-3, args, tensors)
        for f.down_tile in (f.OneTile(8, 1024), f.OneTile(8, 64, held=2), f.OneTile(8, 64, held=9)):
            got = f.moe_normed_shared(x, norm, None, 1e-3, *args, *tensors)
            close(got - x, want, 6e-3)
assert not f.takes_one(router, [8, 4, 2, 0, 0, 0, 0])
assert not f.takes_one(router, [8, 2, 2, 1, 0, 0, 0])
assert not f.takes_one(router, [12, 3, 3, 0, 0, 0, 0])
assert f.rows_linear_fp8(half(0, 64), None, None, 0.0, *packed(8, 64), None, None).shape == (0, 8)
print("fp8 tokens are right")
"""


def test_kernels_equal_their_definitions():
    assert "fp8 tokens are right" in printed_by(SCRIPT)


POINTERS = {
    **dict.fromkeys(("x_ptr", "norm_ptr", "bias_ptr", "plus_ptr", "out_ptr", "act_ptr"), "bf16"),
    **dict.fromkeys(("w_ptr", "shared_ptr"), "fp8e4nv"),
    **dict.fromkeys(("scale_ptr", "shared_scale_ptr", "weights_ptr"), "fp32"),
    "ids_ptr": "i64",
}
CONSTANTS = {
    **{"N": 512, "K": 512, "BLOCK_N": 8, "BLOCK_K": 512, "EPS": 1e-5, "NORM": True, "BIAS": True},
    **{"ADD": True, "LINES": 4, "HELD": 0, "PDL": True, "D": 512, "F": 64, "S": 1024, "E": 16},
}


def ptx(kernel: Any, **changes: int) -> str:
    """Compiled for sm_90."""
    names = [parameter.name for parameter in kernel.params]
    values = {**CONSTANTS, "K": 2} if "ids_ptr" in names else CONSTANTS
    values = {**values, **changes}
    constants = {name: values[name] for name in names if name.isupper()}
    signature = {name: "constexpr" if name in constants else f"*{POINTERS[name]}" for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in POINTERS
    }
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


@pytest.mark.parametrize("kernel", [kernels.product_one_fp8, kernels.up_one, kernels.down_one])
def test_weights_are_on_their_way_and_become_fp16_by_the_devices_own_conversion(
    kernel: Any,
) -> None:
    before, wait, after = ptx(kernel).partition("griddepcontrol.wait")
    assert wait
    assert "prefetch.global.L2" in before
    assert "ld.global" not in before, "what the kernel before writes is not there yet"
    assert "cvt.rn.f16x2.e4m3x2" in after


def test_held_weights_are_read_before_the_wait_and_no_others() -> None:
    words = r"ld\.global\S*\.v4\.b32"
    for held in (1, 2):
        before, _, after = ptx(kernels.down_one, HELD=held).partition("griddepcontrol.wait")
        loads = len(re.findall(words, before))
        assert loads == before.count("ld.global")
        assert "ld.global" in after
        assert loads * 16 * 128 == held * CONSTANTS["BLOCK_N"] * CONSTANTS["BLOCK_K"]


def test_picks_are_there_before_what_reads_them_begins() -> None:
    before, _, after = ptx(kernels.up_one).partition("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in after
    assert "griddepcontrol.launch_dependents" not in before
