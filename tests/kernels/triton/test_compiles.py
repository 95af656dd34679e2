"""The kernels compile for four targets without a device, with the matrix units they should use."""

from __future__ import annotations

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.experimental.gluon import language as gl  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from mogul.kernels.triton import (  # noqa: E402
    hopper_kernels,
    hopper_weight_kernels,
    row_kernels,
    weight_kernels,
)

INT = "*i32"
WGMMA = re.compile(r"wgmma\.mma_async")


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], arch: int, **options: int
) -> Any:
    """Compile for sm_`arch`; every pointer counts as 16-byte aligned."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"
    }
    constexprs = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    program = source(kernel, signature, constexprs=constexprs, attrs=attributes)
    return triton.compile(program, target=GPUTarget("cuda", arch, 32), options=options)


def up_types(element: str) -> dict[str, str]:
    return {
        **dict.fromkeys(("x_ptr", "w_ptr", "w_desc", "act_ptr", "pre_ptr"), f"*{element}"),
        "order_ptr": INT,
        "head_ptr": INT,
        "tiles_ptr": INT,
    }


def up_constants(**changes: Any) -> dict[str, Any]:
    constants = {"D": 256, "F": 128, "K": 8, "E": 64, "BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64}
    flags = dict.fromkeys(("TMA", "SWAP", "SAVE", "FLATTEN", "STREAM", "PDL"), False)
    return {**constants, "BLOCK_GROUP": 8, **flags, **changes}


@pytest.mark.parametrize(
    ("arch", "element"), [(80, "bf16"), (89, "bf16"), (90, "bf16"), (100, "bf16"), (90, "fp16")]
)
def test_up_compiles_without_tma(arch: int, element: str) -> None:
    done = compiled(
        row_kernels.up_rows, up_types(element), up_constants(), arch, num_warps=4, num_stages=2
    )
    assert done.metadata.shared < 100_000
    assert bool(WGMMA.search(done.asm["ptx"])) == (arch == 90)


def test_weight_gradient_compiles_for_ampere() -> None:
    types = dict.fromkeys(("left_ptr", "left_desc", "right_ptr", "right_desc", "out_ptr"), "*bf16")
    sizes = {"M": 256, "N": 128, "K": 8, "E": 64, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 32}
    constants = {**sizes, "BLOCK_GROUP": 8, "GATHER_LEFT": False, "TMA": False}
    done = compiled(
        weight_kernels.weight_grad,
        {**types, "order_ptr": INT, "head_ptr": INT},
        constants,
        80,
        num_warps=4,
        num_stages=2,
    )
    assert "mma.sync" in done.asm["ptx"]


def test_swapped_product_uses_the_warp_group_unit() -> None:
    constants = up_constants(BLOCK_T=16, BLOCK_K=128, SWAP=True, STREAM=True, PDL=True)
    done = compiled(row_kernels.up_rows, up_types("bf16"), constants, 90, num_warps=4, num_stages=3)
    assert "m64n16k16" in done.asm["ptx"]
    assert "griddepcontrol.wait" in done.asm["ptx"]


def tile_type(block: list[int], element: str) -> str:
    dtype = {"bf16": gl.bfloat16, "fp16": gl.float16}[element]
    layout = gl.NVMMASharedLayout.get_default_for(block, dtype)
    return f"tensordesc<{element}[{block[0]},{block[1]}],{layout!r}>"


ROLES = {"LOAD_WARPS": 4, "LOAD_REGS": 56, "MULTIPLY_REGS": 224}


TURNS = {"COUNTER": 1, "COUNTED": True, "SLACK": 0, "PATIENCE": 64}
PRODUCT = {"NARROW": False, "SAVE": False, **TURNS}


def split_product(element: str, boxes: tuple[list[int] | None, list[int]], **changes: Any) -> Any:
    """hopper_kernels.row_product; `boxes` of the rows (None: gathered) and of the weights."""
    rows, weights = boxes
    pointers = ("out_ptr", "pre_ptr", "dpre_ptr", "a_ptr", "a_desc")
    types = {
        **dict.fromkeys(pointers, f"*{element}"),
        **dict.fromkeys(("order_ptr", "head_ptr", "tiles_ptr"), INT),
        **dict.fromkeys(("weights_ptr", "part_ptr"), "*fp32"),
        **{"w_desc": tile_type(weights, element), "pre_desc": tile_type([64, 128], element)},
        "num_slots": "i32",
    }
    if rows:
        types["a_desc"] = tile_type(rows, element)
    constants = {
        **{"N": 1344, "C": 512, "K": 8, "E": 64, "BLOCK_T": 128, "BLOCK_K": 64, "BLOCK_N": 128},
        **{"STAGES": 4, "BLOCK_GROUP": 8, "GATHER": rows is None, "TRANSPOSED": False},
        **PRODUCT,
        **ROLES,
        **changes,
    }
    return compiled(hopper_kernels.row_product, types, constants, 90, num_warps=4)


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_split_product_fits_hopper(element: str) -> None:
    done = split_product(element, (None, [64, 64]), MODE=0, NARROW=True)
    assert done.metadata.shared <= 232_448
    assert "m64n256k16" in done.asm["ptx"]
    assert "m64n128k16" in done.asm["ptx"]  # the last column tile, 64 of 128 columns
    assert "cp.async.bulk.tensor" in done.asm["ptx"]


@pytest.mark.parametrize(
    ("turns", "atomics", "looks"),
    [({}, 1, 0), ({"COUNTED": False}, 1, 1), ({"COUNTED": False, "COUNTER": 0}, 0, 0)],
    ids=["counted", "kept in step", "fixed turns"],
)
def test_turns_of_split_products(turns: dict[str, Any], atomics: int, looks: int) -> None:
    sizes = {"MODE": 1, "N": 5120, "C": 1344, "BLOCK_N": 256, "LOAD_WARPS": 1, "LOAD_REGS": 24}
    done = split_product("bf16", ([128, 64], [256, 64]), **sizes, **turns)
    assert len(re.findall(r"atom\.\S*add", done.asm["ptx"])) == atomics
    assert done.asm["ptx"].count("ld.volatile") == looks
    assert done.metadata.shared <= 232_448


def test_a_ring_that_outruns_what_is_told_of_tiles_does_not_compile() -> None:
    """A loader that far ahead would write over tiles that no multiplier has looked at."""
    with pytest.raises(Exception, match="must not be written over"):
        split_product("bf16", ([128, 64], [64, 64]), MODE=1, BLOCK_N=64, STAGES=8)


def test_backward_of_down_fits_hopper() -> None:
    sizes = {"MODE": 2, "TRANSPOSED": True, "NARROW": True}
    done = split_product("bf16", (None, [64, 128]), **sizes)
    assert done.metadata.shared <= 232_448
    assert "m64n128k16" in done.asm["ptx"]
    assert "m64n64k16" in done.asm["ptx"]
    copies = done.asm["ptx"].count("cp.async.bulk.tensor")
    assert copies == 5  # the weights, and both up products of both halves of the rows


@pytest.mark.parametrize(
    ("boxes", "changes"),
    [((None, [128, 64]), {"MODE": 0}), ((None, [64, 128]), {"MODE": 2, "TRANSPOSED": True})],
    ids=["up", "backward of down"],
)
def test_a_last_step_that_is_not_full_reads_no_further_than_its_rows(
    boxes: tuple[None, list[int]], changes: dict[str, Any]
) -> None:
    whole, rest = (split_product("bf16", boxes, C=c, **changes).asm["ptx"] for c in (512, 488))
    compares = re.compile(r"setp\.\w+\.\w+\s+%p\d+, %\w+, 488;")
    assert compares.search(rest)  # columns against the width
    copies = re.compile(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10, %r\d+;")
    assert len(copies.findall(rest)) == len(copies.findall(whole)) > 0  # still 16 bytes each


@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_split_weight_gradient_fits_hopper(element: str) -> None:
    types = {
        **dict.fromkeys(("left_ptr", "right_ptr", "right_desc", "out_ptr"), f"*{element}"),
        **{"order_ptr": INT, "head_ptr": INT, "left_desc": tile_type([64, 128], element)},
    }
    constants = {
        **{"M": 2688, "N": 512, "K": 8, "E": 64, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_R": 64},
        **{"BLOCK_GROUP": 8, "STAGES": 4, "GATHER_LEFT": False, "SYNC": 0, "SLACK": 0},
        **{"PATIENCE": 64, "NARROW": False},
        **ROLES,
    }
    done = compiled(hopper_weight_kernels.split_weight_grad, types, constants, 90, num_warps=4)
    assert done.metadata.shared <= 232_448
    assert "m64n256k16" in done.asm["ptx"]
