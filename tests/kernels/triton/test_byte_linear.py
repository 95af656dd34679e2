"""Rows in 16 bits times whole numbers of 8 bits: interpreted against the definition, compiled."""

from __future__ import annotations

import pytest
import torch
from scripts import printed_by

triton = pytest.importorskip("triton")

from test_compiles import WGMMA, compiled  # noqa: E402

from mogul.kernels.triton import byte_linear_kernels as kernels  # noqa: E402

SCRIPT = """
import torch
from mogul.kernels.triton import byte_linear as b

torch.manual_seed(0)
b.one_tile = b.ByteTile(1, 8, 16)
b.few_tiles = (b.ByteTile(16, 16, 16), b.ByteTile(32, 32, 16))
for width in (64, 72):
    words, scale = b.pack_bytes(torch.randn(45, width))
    for dtype in (torch.float16, torch.bfloat16):
        for rows in (1, 5, 16, 21, 140):
            if dtype == torch.bfloat16 and rows > 1:
                continue  # the interpreter multiplies no matrices of bf16
            x = torch.randn(rows, width).to(dtype)
            got = b.multiply(x, words, scale).float()
            want = x.float() @ b.unpack_bytes(words, scale, torch.float32).T
            error = float((got - want).abs().max() / want.abs().max())
            assert error < (2e-3 if dtype == torch.float16 else 1e-2), (width, dtype, rows, error)
assert b.multiply(x[:0], words, scale).shape == (0, 45)
print("bytes are right")
"""


def test_interpreted_products_are_those_of_the_definition():
    assert "bytes are right" in printed_by(SCRIPT)


@pytest.mark.parametrize("device", ["CPU", "CUDA", "XPU", "MPS"])
def test_every_device_has_a_way(device):
    has_kernel = torch._C._dispatch_has_computed_kernel_for_dispatch_key
    assert has_kernel("mogul::linear_bytes", device)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_few_rows_go_through_matrix_units_on_hopper(element):
    types = {"x_ptr": f"*{element}", "w_ptr": "*i16", "scale_ptr": "*fp32"}
    types |= {"out_ptr": f"*{element}", "num_rows": "i32"}
    constants = {"N": 1024, "K": 512, "BLOCK_T": 64, "BLOCKS_T": 1, "BLOCK_N": 64, "BLOCK_K": 64}
    constants |= {"STAGES": 4, "PDL": True}
    program = compiled(kernels.bytes_few, types, constants, 90, num_warps=4, num_stages=4)
    assert WGMMA.search(program.asm["ptx"])


@pytest.mark.parametrize("arch", [80, 90])
def test_one_row_takes_few_registers(arch):
    types = {"x_ptr": "*bf16", "w_ptr": "*i16", "scale_ptr": "*fp32", "out_ptr": "*bf16"}
    constants = {"N": 1024, "K": 5120, "BLOCK_N": 8, "BLOCK_K": 512, "PDL": arch == 90}
    program = compiled(kernels.bytes_one, types, constants, arch, num_warps=4, num_stages=1)
    assert "cvt.rn.f32.s8" not in program.asm["ptx"], "numbers are made by permuting bytes"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 64, 65, 228, 300])
def test_on_a_device(rows, dtype):
    from mogul.kernels.triton.byte_linear import linear_bytes, pack_bytes, unpack_bytes

    torch.manual_seed(rows)
    words, scale = (one.cuda() for one in pack_bytes(torch.randn(5000, 5120) / 70))
    x = torch.randn(rows, 5120, device="cuda").to(dtype)
    want = x.float() @ unpack_bytes(words, scale, torch.float32).T
    error = float((linear_bytes(x, words, scale).float() - want).norm() / want.norm())
    assert error < (1e-3 if dtype == torch.float16 else 5e-3)
