"""Paged attention's Triton kernels: interpreted against the reference, compiled for targets."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paged_calls import make, run
from scripts import lines_of

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mogul.core.errors import BackendError  # noqa: E402
from mogul.kernels.triton import attention_kernels as kernels  # noqa: E402
from mogul.kernels.triton import paged, paged_write, prompt_kernels  # noqa: E402
from mogul.kernels.triton.attention import why_not_triton_attention  # noqa: E402
from mogul.kernels.turn import Turn  # noqa: E402

CASES = ("few", "few16", "many", "many16", "fp8", "views", "turns", "alone", "neighbours")
LIMITS = {"few16": 2e-3, "many16": 2e-3, "fp8": 2e-3}  # fp8 pages are multiplied in fp16


def interpreted(examples: int) -> dict[str, float]:
    return json.loads(lines_of("run_paged.py", *CASES, EXAMPLES=str(examples))[-1])


def check_all(found: dict[str, float]) -> None:
    assert {name.split()[0] for name in found} == set(CASES)
    assert {name.split()[1] for name in found} == {"out", "keys", "values"}
    for name, error in found.items():
        limit = LIMITS.get(name.split()[0], 5e-6) if name.endswith("out") else 0
        limit = max(limit, 1e-6 * (name == "turns keys"))
        assert error <= limit, found


def test_kernels_equal_the_reference() -> None:
    check_all(interpreted(2))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_kernels_equal_the_reference_on_many_shapes() -> None:
    check_all(interpreted(30))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float8_e4m3fn])
def test_kernels_equal_the_reference_on_a_device(page_size: int, cache: torch.dtype) -> None:
    sizes = {"page_size": page_size, "width": 128, "group": 8, "padding": 2}
    for sequences in ([(1, 9), (1, 700), (3, 64)], [(40, 300), (1, 77), (0, 5), (129, 129)]):
        made = make(sequences, dtype=torch.bfloat16, cache_dtype=cache, **sizes)
        call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
        call["tables_SB"].clamp_(max=len(call["key_cache"]) - 1)
        (got, *pages), (want, *wanted) = run(call, "triton"), run(call, "reference")
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)
        for mine, its in zip(pages, wanted, strict=True):
            assert torch.equal(mine.view(torch.uint8), its.view(torch.uint8))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "sequences",
    [[(1, 9), (1, 700)], [(1, 40 + s) for s in range(20)], [(200, 200), (1, 77), (129, 300)]],
    ids=["inside", "before many sequences", "before prompts"],
)
def test_turns_equal_the_reference_on_a_device(sequences: list[tuple[int, int]]) -> None:
    made = make(sequences, dtype=torch.bfloat16, page_size=16, width=128, group=8, padding=2)
    call = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in made.items()}
    call["tables_SB"].clamp_(max=len(call["key_cache"]) - 1)
    angle = torch.randn(len(call["query_THC"]), 64, device="cuda").repeat(1, 2)
    norms = (1 + torch.randn(2, 128, device="cuda") / 4).bfloat16().unbind()
    turn = Turn(angle.cos().bfloat16(), angle.sin().bfloat16(), *norms, 1e-6, 1e-3)
    got, want = run(call, "triton", turn=turn), run(call, "reference", turn=turn)
    for mine, its in zip(got, want, strict=True):
        torch.testing.assert_close(mine, its, rtol=2e-2, atol=3e-2)


POINTERS = {
    **dict.fromkeys(("q_ptr", "key_ptr", "value_ptr", "out_ptr"), "bf16"),
    **dict.fromkeys(("tables_ptr", "starts_ptr", "lengths_ptr"), "i32"),
    **dict.fromkeys(("key_scale_ptr", "value_scale_ptr", "acc_ptr", "stat_ptr"), "fp32"),
    **dict.fromkeys(("sinks_ptr", "key_out_ptr", "value_out_ptr"), "bf16"),
    **dict.fromkeys(("cos_ptr", "sin_ptr", "q_norm_ptr", "k_norm_ptr", "turned_ptr"), "bf16"),
    "slots_ptr": "i64",
}
CONSTANTS = {
    **{"S": 64, "N": 4, "G": 8, "C": 128, "C_POW2": 128, "Z": 16, "MAX_Q": 1, "ROWS": 16},
    **{"BLOCK_L": 64, "WORKERS": 66, "MIN_BLOCKS": 2, "WINDOW": 0, "SCALE": 0.088, "STAGES": 3},
    **{"Q_T": 4096, "Q_H": 128, "K_T": 512, "K_N": 128, "V_T": 512, "V_N": 128, "WRITE": True},
    **{"BLOCK_W": 16, "SINKS": False, "FP8": False, "PDL": True, "FEW": 8, "BLOCK_Q": 16},
    **{"N_POW2": 4, "H": 32, "BLOCK_H": 16, "BLOCK_OUT": 4096, "Q_EPS": 1e-6, "K_EPS": 1e-6},
    **{"TURN": True, "NORM": True, "APART": True},
}


def compiled(kernel: Any, arch: int, *, warps: int, cache: str = "bf16", **changes: Any) -> Any:
    """Compile for sm_`arch`, as a launch would."""
    pointers = {**POINTERS, "key_cache_ptr": cache, "value_cache_ptr": cache}
    names = [parameter.name for parameter in kernel.params]
    values = {**CONSTANTS, "PDL": arch >= 90, **changes}
    constants = {name: values[name] for name in names if name.isupper()}
    signature = {
        name: "constexpr"
        if name in constants
        else f"*{pointers[name]}"
        if name in pointers
        else f"tensordesc<bf16[{values['BLOCK_L']}, {values['C']}]>"
        if name.endswith("_desc")
        else "i32"
        for name in names
    }
    attributes = {
        (i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in pointers
    }
    source = ASTSource(
        kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=attributes,
    )
    options = {"num_warps": warps, "num_stages": values["STAGES"]}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


@pytest.mark.parametrize(
    ("arch", "cache", "page_size"), [(80, "bf16", 16), (90, "bf16", 64), (90, "fp8e4nv", 16)]
)
def test_decode_compiles(arch: int, cache: str, page_size: int) -> None:
    done = compiled(
        kernels.attend_few, arch, warps=4, cache=cache, Z=page_size, FP8=cache != "bf16"
    )
    assert done.metadata.shared <= 110_000  # two programs a multiprocessor
    assert "cp.async" in done.asm["ptx"]
    assert "mma.sync" in done.asm["ptx"]


def test_values_of_fp8_pages_are_turned_by_the_device() -> None:
    done = compiled(kernels.attend_few, 90, warps=2, cache="fp8e4nv", FP8=True)
    found = re.findall(r"prmt\.b32|cvt\.rn\.f16x2\.e4m3x2", done.asm["ptx"])
    turned = found.count("prmt.b32")
    assert turned > 0
    assert found.count("cvt.rn.f16x2.e4m3x2") >= 2 * turned, "two conversions a pair of words"


def test_new_keys_are_rounded_in_one_launch() -> None:
    done = compiled(kernels.round_new, 90, warps=4, cache="fp8e4nv", BLOCK=512)
    assert "cvt.rn.satfinite.e4m3x2" in done.asm["ptx"]
    assert "max.NaN.f32" in done.asm["ptx"], "what is no number stays none"


@pytest.mark.parametrize(("width", "fits"), [(64, True), (128, True), (256, False)])
def test_new_keys_of_prompts_are_read_where_shared_memory_holds_them(
    monkeypatch: pytest.MonkeyPatch, width: int, fits: bool
) -> None:
    tile, hopper = paged.fresh_tile, 232_448
    sizes = {"C": width, "BLOCK_L": tile.block, "ROWS": tile.rows, "STAGES": tile.stages}
    done = compiled(prompt_kernels.attend_fresh, 90, warps=tile.warps, **sizes)
    assert done.metadata.shared <= paged.fresh_bytes(tile, width)
    assert (done.metadata.shared <= hopper) == fits
    monkeypatch.setattr(paged, "_shared_bytes", lambda _device: hopper)
    strides = (8 * width, width) + 2 * (2 * width, width)
    call = paged.Call(
        device=0, sequences=32, kv_heads=2, group=4, width=width, page_size=16, window=0,
        scaling=0.1, is_fp8=False, has_sinks=False, strides=strides, dtypes=(torch.bfloat16,),
        turns=False, norms=False, eps=(0.0, 0.0), pdl=True,
    )  # fmt: skip
    assert paged._may_read_fresh(call) == fits


def test_prompts_use_the_warp_group_unit() -> None:
    done = compiled(prompt_kernels.attend_many, 90, warps=8, ROWS=128)
    assert done.metadata.shared <= 232_448
    assert re.search(r"wgmma\.mma_async", done.asm["ptx"])


@pytest.mark.parametrize("kernel", [kernels.merge_few, kernels.write_pages])
def test_the_small_kernels_compile(kernel: Any) -> None:
    done = compiled(kernel, 90, warps=1, SINKS=True)
    assert "griddepcontrol.wait" in done.asm["ptx"]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"device": torch.device("cpu")}, "not on an NVIDIA GPU"),
        ({"dtype": torch.float32}, "bfloat16 and float16"),
        ({"cache_dtype": torch.float8_e4m3fn}, "capability 8.9"),
        ({"head_width": 100}, "head width 100"),
        ({"num_heads": 512}, "share a key head"),
    ],
)
def test_refusals_name_the_reason(monkeypatch: pytest.MonkeyPatch, facts: dict, words: str) -> None:
    monkeypatch.setattr("mogul.kernels.triton._device_reason", lambda index: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    call = {
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "cache_dtype": torch.bfloat16,
        "num_heads": 32,
        "num_kv_heads": 2,
        "head_width": 128,
    }
    assert why_not_triton_attention(**call) is None
    assert words in (why_not_triton_attention(**{**call, **facts}) or "")


def test_caches_that_are_views_are_refused_by_name() -> None:
    cache = torch.zeros(2, 4, 2, 16).transpose(1, 2)
    with pytest.raises(BackendError, match="key_cache with strides"):
        paged_write.check_pages(cache, cache)


@pytest.mark.parametrize(
    ("sequences", "queries", "changes", "tile"),
    [
        (7, 1, {}, paged.small_tile),
        (8, 1, {}, paged.middle_tile),
        (8, 2, {}, paged.small_tile),  # rows of several queries would not leave it three programs
        (8, 1, {"width": 256}, paged.small_tile),
        (16, 1, {}, paged.middle_tile),
        (17, 1, {}, paged.large_tile),
        (16, 1, {"is_fp8": True}, paged.fp8_tiles[1][1]),
        (17, 1, {"is_fp8": True}, paged.fp8_tiles[2][1]),
    ],
)
def test_tiles_follow_the_work(monkeypatch, sequences, queries, changes, tile) -> None:
    monkeypatch.setattr(paged, "_processors", lambda _device: 132)
    call = SimpleNamespace(**{"kv_heads": 4, "width": 128, "is_fp8": False, "device": 0, **changes})
    assert paged.tile_of(call, sequences, queries) is tile


@pytest.mark.parametrize(
    ("tile", "cache"),
    [(paged.middle_tile, "bf16"), (paged.large_tile, "bf16"), (paged.fp8_tiles[2][1], "fp8e4nv")],
)
def test_blocks_in_flight_fit(tile: paged.FewTile, cache: str) -> None:
    changes: dict[str, Any] = {"BLOCK_L": tile.block, "STAGES": tile.stages, "FP8": cache != "bf16"}
    done = compiled(kernels.attend_few, 90, warps=tile.warps, cache=cache, **changes)
    assert tile.per_sm * (done.metadata.shared + 1024) <= 233_472  # of a multiprocessor
    done = compiled(kernels.attend_few, 89, warps=tile.warps, cache=cache, **changes)
    assert done.metadata.shared <= 101_376  # of a program on smaller cards
