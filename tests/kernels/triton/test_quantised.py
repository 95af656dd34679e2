"""The quantised Triton kernels: against the reference in the interpreter, and compiled."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from scripts import rows_of

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.kernels import ExpertFormat, ExpertLayout  # noqa: E402
from mogul.kernels.triton import quant_kernels, quant_token_kernels  # noqa: E402
from mogul.kernels.triton.plans import Shape  # noqa: E402
from mogul.kernels.triton.quant import why_not_triton_quantised  # noqa: E402
from mogul.kernels.triton.quant_layer import JOINED_ROWS  # noqa: E402
from mogul.kernels.triton.quant_plans import INT4_FEW, quant_plan_for  # noqa: E402

CASES = {
    "rounding": 1e-5,
    "gated rounding": 1e-5,
    "shared": 1e-5,
    "fp8 plain": 1e-5,
    "fp8 swapped half": 4e-3,
    "fp8 clamped with biases": 1e-5,
    "fp8-w8a16 plain": 1e-5,
    "fp8-w8a16 swapped half": 4e-3,
    "fp8-w8a16 clamped with biases": 1e-5,
    "int4-32 spans": 2e-6,
    "int4-64 half": 2e-3,
    "int4-128 short group": 2e-6,
    "int4-128 clamped with biases": 2e-6,
    "few int4-32": 2e-6,
    "few int4-64 clamped with biases": 2e-6,
    "operator": 1e-9,
}


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    rows = rows_of("run_quantised.py", *CASES)
    return {row["case"]: row["error"] for row in rows}


@pytest.mark.parametrize("case", CASES)
def test_kernels_equal_the_reference(found: dict[str, float], case: str) -> None:
    assert found[case] < CASES[case]


def compiled(group: int, arch: int, dtype: str = "bf16", few: str = "", **changes: Any) -> Any:
    """The up product for sm_`arch`; `few` names a kernel without a sort."""
    kernel = getattr(quant_token_kernels, few) if few else quant_kernels.up_quantised
    value, rows = ("u8", dtype) if group else ("fp8e4nv", "fp8e4nv")
    types = {
        "x_ptr": f"*{rows}",
        "x_scale_ptr": f"*{rows}" if group else "*fp32",
        "w_ptr": f"*{value}",
        "w_desc": f"*{value}",
        **dict.fromkeys(("w_scale_ptr", "scale_ptr"), "*i32" if group else "*fp32"),
        **dict.fromkeys(("bias_ptr", "out_ptr"), f"*{dtype}"),
        "act_ptr": "*fp32" if few else f"*{dtype}",
        **{"ids_ptr": "*i64", "weights_ptr": "*fp32"},
        **dict.fromkeys(("order_ptr", "head_ptr", "tiles_ptr"), "*i32"),
    }
    constants = {
        **{"D": 256, "F": 1344, "K": 8, "E": 64, "GROUP": group, "SPLIT": False},
        **{"BLOCK_T": 16, "BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_GROUP": 1},
        **{"TMA": False, "SWAP": True, "STREAM": True, "BIAS": False, "PDL": False},
        **{"ACT": 0, "ALPHA": 1.0, "LIMIT": 7.0, "STAGES": 1},
        **changes,
    }
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name][0] == "*"
    }
    constexprs = {(i,): constants[name] for i, name in enumerate(names) if name in constants}
    source = ASTSource(kernel, signature, constexprs=constexprs, attrs=attributes)
    options = {"num_warps": 4, "num_stages": 3}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize("name", ["up_tokens_quantised", "down_tokens_quantised"])
@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_few_tokens_compile(name: str, arch: int) -> None:
    plan, up = INT4_FEW, name.startswith("up")
    blocks = {"BLOCK_N": plan.up_n if up else plan.down_n}
    blocks["BLOCK_K"] = plan.up_k if up else plan.down_k
    done = compiled(64, arch, few=name, STAGES=plan.stages, PDL=arch >= 90, **blocks)
    assert done.metadata.shared < 100_000


@pytest.mark.parametrize("arch", [80, 89, 90, 100])
def test_int4_compiles(arch: int) -> None:
    done = compiled(64, arch)
    assert done.metadata.shared < 100_000
    assert bool(re.search(r"wgmma\.mma_async", done.asm["ptx"])) == (arch == 90)


def test_what_is_no_number_stays_so_under_gpt_oss_clamps() -> None:
    ptx = compiled(64, 90, ACT=1).asm["ptx"]
    assert set(re.findall(r"\b(?:min|max)(?:\.NaN)?\.f32", ptx)) == {"min.NaN.f32", "max.NaN.f32"}


@pytest.mark.parametrize("arch", [89, 90, 100])
def test_fp8_compiles_to_fp8_products(arch: int) -> None:
    done = compiled(0, arch)
    assert done.metadata.shared < 100_000
    if arch < 100:
        assert re.search(r"(wgmma|mma\.sync).*e4m3", done.asm["ptx"])


@pytest.mark.parametrize("arch", [89, 90, 100])
@pytest.mark.parametrize("tokens", [1, 64, 456, 4096])
def test_split_rows_compile(arch: int, tokens: int) -> None:
    shape = Shape(64, 8, 256, 1344, arch)
    plan = quant_plan_for(shape, tokens, 0, split=True)
    tile = plan.up
    done = compiled(
        0,
        arch,
        SPLIT=2 if plan.rows <= JOINED_ROWS else 1,
        BLOCK_T=plan.rows,
        BLOCK_N=tile.n,
        BLOCK_K=tile.k,
        SWAP=tile.swap,
    )
    assert done.metadata.shared < 200_000


def test_fp16_rows_compile() -> None:
    assert "m64n16k16.f32.f16" in compiled(32, 90, "fp16", PDL=True).asm["ptx"]


@pytest.mark.parametrize("group", [0, 32, 128])
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("tokens", [1, 64, 500, 20000])
def test_every_shape_has_a_plan(group: int, capability: int, tokens: int) -> None:
    for sizes in ((64, 8, 5120, 1344), (8, 2, 4096, 14336), (32, 8, 576, 192)):
        plan = quant_plan_for(Shape(*sizes, capability), tokens, group)
        assert plan.rows >= 16
        for tile in (plan.up, plan.down):
            assert tile.swap or not group
            assert not tile.tma or capability == 90
            held = tile.n * tile.k * (2 if tile is plan.up else 1) + plan.rows * tile.k
            assert held * tile.stages < 227_000


FACTS = {
    "device": torch.device("cuda", 0),
    "dtype": torch.bfloat16,
    "format": ExpertFormat("fp8"),
    "num_experts": 8,
    "hidden_size": 64,
    "expert_width": 64,
    "layout": ExpertLayout(),
}


@pytest.mark.parametrize(
    ("change", "capability", "words"),
    [
        ({}, (9, 0), None),
        ({}, (8, 6), "compute capability 8.6, and fp8 products need 8.9"),
        ({"format": ExpertFormat("int4", 64)}, (8, 0), None),
        ({"device": torch.device("cpu")}, (9, 0), "not on an NVIDIA GPU"),
        ({"dtype": torch.float32}, (9, 0), "float32"),
        ({"layout": ExpertLayout(activation="gelu")}, (9, 0), "'gelu'"),
        ({"expert_width": 40}, (9, 0), "expert width 40"),
        ({"num_experts": 5000}, (9, 0), "5000 experts"),
    ],
)
def test_refusals_name_the_reason(monkeypatch, change, capability, words) -> None:
    monkeypatch.setattr("mogul.kernels.triton.quant._device_reason", lambda index: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = why_not_triton_quantised(**{**FACTS, **change})
    assert reason is None if words is None else words in (reason or "")
