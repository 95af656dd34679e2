"""The sort's tables equal those of a stable sort by torch; its kernels compile without a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scripts import rows_of
from sort_cases import KINDS, faults, make_ids

pytest.importorskip("triton")

from test_compiles import compiled

from mogul.kernels.triton import sort_kernels, sorter


def test_tables_in_one_launch_and_in_three() -> None:
    rows = rows_of("run_sort.py")
    assert len(rows) == 12
    assert [row for row in rows if row["wrong"]] == []


def test_faults_are_seen() -> None:
    ids = make_ids(4, 2, 20, "null", torch.int64)
    nothing = sorter.Sorted(*(torch.zeros(400, dtype=torch.int32) for _ in range(4)))
    assert faults(nothing, ids, 4, 16) == ["order", "head", "tiles"]


def built(kernel: Any, arch: int, experts: int, block: int, warps: int) -> Any:
    """One kernel of the sort, for sm_`arch`."""
    pointers = ("before_ptr", "total_ptr", "order_ptr", "head_ptr", "tiles_ptr")
    types = {**dict.fromkeys(pointers, "*i32"), "ids_ptr": "*i64", "num_slots": "i32"}
    bins = sorter.Sorter(experts, -1, pdl=False)._bins
    sizes = {"E": experts, "BINS": bins, "BLOCK_S": block, "BLOCK_T": 128}
    return compiled(kernel, types, {**sizes, "PDL": arch >= 90}, arch, num_warps=warps)


@pytest.mark.parametrize(("arch", "experts"), [(80, 64), (89, 64), (90, 64), (100, 64), (90, 384)])
def test_slots_are_sorted_in_registers(arch: int, experts: int) -> None:
    """No stack, and little shared memory: several programs fit a multiprocessor."""
    done = built(sort_kernels.place_slots, arch, experts, 256, 4)
    assert done.metadata.shared <= 8192
    assert ".local" not in done.asm["ptx"]
    assert done.asm["ptx"].count("griddepcontrol.wait") == (arch >= 90)


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_most_slots_of_one_launch_fit_registers(arch: int) -> None:
    done = built(sort_kernels.sort_in_one, arch, 128, sorter._ONE_LAUNCH_SLOTS, 16)
    assert ".local" not in done.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [64, 128, 200])
@pytest.mark.parametrize("tokens", [40, 456, 700, 4096, 65536])
def test_tables_on_a_device(experts: int, tokens: int) -> None:
    """Twice, as an order must not depend on timing; memory is dirtied in between."""
    pdl = torch.cuda.get_device_capability()[0] >= 9
    sort = sorter.Sorter(experts, torch.cuda.current_device(), pdl=pdl)
    for kind in KINDS * 2:
        ids = make_ids(experts, 8, tokens, kind, torch.int64).cuda()
        assert faults(sort(ids, 128), ids, experts, 128) == [], kind
        torch.full((4 * tokens * 8,), -7, dtype=torch.int32, device=ids.device)
