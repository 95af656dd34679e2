"""Kernels that write to other GPUs compile without a device, and write sixteen bytes at once."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from test_compiles import compiled

from mogul.kernels.triton import push_kernels


@pytest.mark.parametrize("width", [2048, 5120])
def test_sums_leave_in_whole_words_of_sixteen_bytes(width: int) -> None:
    rows = dict.fromkeys(("y_ptr", "more_ptr", "own_ptr"), "*bf16")
    types = {**rows, "ids_ptr": "*i32", "weights_ptr": "*fp32", "addresses_ptr": "*i64"}
    types |= {"rank": "i32", "tokens": "i32"}
    sizes = {"D": width, "K": 4, "E": 64, "RANKS": 2, "BLOCK_D": 1024, "MORE": True}
    done = compiled(push_kernels.push_sums, types, sizes, 90, num_warps=4)
    code = done.asm["ptx"]
    assert code.count("st.global.v4.b32") == 2, "to the own rows and to a peer's"
    assert "st.global.b16" not in code
    assert "ld.global.v4.b32" in code


def test_picks_are_taken_from_ids_of_eight_bytes() -> None:
    types = {"ids_ptr": "*i64", "weights_ptr": "*fp32", "local_ptr": "*i32", "taken_ptr": "*fp32"}
    types |= dict.fromkeys(("slots", "first", "column"), "i32")
    sizes = {"K": 8, "A": 4, "E": 64, "BLOCK": 1024}
    assert compiled(push_kernels.take_picks, types, sizes, 90, num_warps=4).metadata.shared == 0
