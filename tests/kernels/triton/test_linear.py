"""Products of few rows and fp8 products: in Triton's interpreter, compiled, and on a device."""

from __future__ import annotations

import pytest
import torch
from scripts import printed_by

from mogul.core.errors import ConfigError
from mogul.kernels.quant_format import quantise_rows

pytest.importorskip("triton")
from mogul.kernels.triton import linear

SCRIPT = """
import torch
from mogul.kernels.quant_format import quantise_rows
from mogul.kernels.triton import linear
from mogul.kernels.triton.topk import softmax_topk

torch.manual_seed(0)
for rows, columns, inner in ((1, 48, 64), (3, 80, 272), (70, 64, 256)):
    x, weight = torch.randn(rows, inner), torch.randn(columns, inner)
    (value, scale), (packed, scales) = quantise_rows(x), quantise_rows(weight)
    want = linear.linear_fp8(value, scale, packed, scales, torch.float32)
    got = linear.linear_few(value, packed, torch.float32, (scale, scales))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    x, weight = x.half(), weight.half()
    want = x.float() @ weight.float().T
    got = linear.linear_few(x[:, : inner // 2 * 2], weight, torch.float32)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    got = linear.linear_narrow(x, weight, torch.float32)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
assert linear.linear_few(x[:0], weight, torch.float16).shape == (0, 64)
for columns, k in ((128, 8), (60, 4)):
    logits = torch.randn(9, columns)
    for renormalise in (False, True):
        got = softmax_topk(logits, k, renormalise, torch.float32)
        want = torch.ops.mogul.softmax_topk(logits, k, renormalise, torch.float32)
        assert torch.equal(got[1], want[1])
        assert (got[0] - want[0]).abs().max() < 1e-6
print("linear is right")
"""


def test_kernels_equal_the_definition():
    assert "linear is right" in printed_by(SCRIPT)


def test_fp8_products_are_near_the_unrounded_ones():
    torch.manual_seed(0)
    x, weight = torch.randn(40, 256), torch.randn(64, 256)
    (value, scale), (packed, scales) = quantise_rows(x), quantise_rows(weight)
    got = linear.linear_fp8(value, scale, packed, scales, torch.float32)
    want = x @ weight.T
    assert 0.005 < float((got - want).norm() / want.norm()) < 0.05


def test_what_does_not_fit_is_refused():
    rows = torch.zeros(2, 32).to(torch.float8_e4m3fn)
    ones = torch.ones(2)
    with pytest.raises(ConfigError, match=r"rows \(2, 32\) do not fit weight \(4, 16\)"):
        linear.linear_fp8(rows, ones, rows.view(4, 16), torch.ones(4), torch.float32)
    with pytest.raises(ConfigError, match="are not one a row"):
        linear.linear_fp8(rows, ones, rows, torch.ones(3), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 7, 64, 65, 300])
@pytest.mark.parametrize(("columns", "inner"), [(128, 2048), (7168, 5120), (48, 272)])
def test_on_a_device(rows, columns, inner):
    torch.manual_seed(rows)
    x = torch.randn(rows, inner, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(columns, inner, device="cuda", dtype=torch.bfloat16)
    (value, scale), (packed, scales) = quantise_rows(x), quantise_rows(weight)
    got = linear.linear_fp8(value, scale, packed, scales, torch.bfloat16).float()
    want = (value.float() @ packed.float().T) * scale[:, None] * scales
    assert float((got - want).norm() / want.norm()) < 5e-3
    for dtype in (torch.bfloat16, torch.float32):
        got = torch.ops.mogul.linear(x, weight, dtype)
        assert got.dtype == dtype
        want = x.double() @ weight.double().T
        assert float((got - want).norm() / want.norm()) < (5e-3 if got.itemsize == 2 else 1e-5)


def test_the_processor_says_once_that_fp8_gains_no_time_there(caplog):
    linear._tell_of_definition.cache_clear()
    rows, scale = quantise_rows(torch.randn(3, 16))
    for _ in range(2):
        linear.linear_fp8(rows, scale, rows, scale, torch.float32)
    told = [record.message for record in caplog.records]
    assert told == [
        "fp8 linear layers run by their definition on the processor: it saves memory, not time"
    ]
