"""Launches of the sort: one for few slots, three for many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton import sort_kernels
from mogul.kernels.triton.launch import Launch, cdiv, next_power_of_2
from mogul.kernels.triton.sorting import Sorted, sorted_size, sorted_views

_ONE_LAUNCH_SLOTS = 4096
"""Above this the sort takes three launches (in the one-launch sort every program reads all ids)."""
_BLOCKS = ((8192, 128), (1 << 62, 256))
"""Slots of a block of the sort in three launches, by the most slots that it is for."""


class Sorter:
    """Sorts slots over a number of experts on one device; launches are made when first needed."""

    def __init__(self, experts: int, device: int, *, pdl: bool) -> None:
        self.experts, self.device, self.pdl = experts, device, pdl
        self._bins = max(32, next_power_of_2(experts))
        self._launches: dict[Any, Launch] = {}

    def __call__(self, ids: Tensor, rows: int) -> Sorted:
        """Sort the slots of ids [T, K] by expert, with row tiles of `rows`."""
        slots = ids.numel()
        size = sorted_size(slots, self.experts)
        buffer = torch.empty(size, dtype=torch.int32, device=ids.device)
        result = sorted_views(buffer, slots, self.experts)
        if slots > _ONE_LAUNCH_SLOTS:
            self._in_three(ids, result, rows)
            return result
        block = max(64, next_power_of_2(slots))
        warps = 4 if block <= 512 else 8 if block <= 2048 else 16
        launch = self._launch(sort_kernels.sort_in_one, block, warps, BLOCK_T=rows)
        tables = (result.order, result.head, result.tiles)
        launch((self.experts, 1), self.device, ids, *tables, slots)
        return result

    def _launch(self, kernel: Any, block: int, warps: int = 4, **more: int) -> Launch:
        key = (kernel.__name__, block, *more.values())
        launch = self._launches.get(key)
        if launch is None:
            constants = {"E": self.experts, "BINS": self._bins, "BLOCK_S": block, "PDL": self.pdl}
            launch = Launch(kernel, {**constants, **more}, warps=warps, pdl=self.pdl)
            self._launches[key] = launch
        return launch

    def _scan(self) -> Launch:
        launch = self._launches.get("scan")
        if launch is None:
            constants = {"BINS": self._bins, "BLOCK": 1024, "PDL": self.pdl}
            launch = Launch(sort_kernels.scan_blocks, constants, pdl=self.pdl)
            self._launches["scan"] = launch
        return launch

    def _in_three(self, ids: Tensor, result: Sorted, rows: int) -> None:
        slots = ids.numel()
        block = next(block for most, block in _BLOCKS if slots <= most)
        blocks = cdiv(slots, block)
        scratch = torch.empty((2 * blocks + 1, self._bins), dtype=torch.int32, device=ids.device)
        count, before, total = scratch, scratch[blocks:], scratch[2 * blocks :]
        tables = (result.order, result.head, result.tiles)
        first = self._launch(sort_kernels.count_blocks, block)
        first((blocks, 1), self.device, ids, count, slots)
        self._scan()((self.experts, 1), self.device, count, before, total, blocks)
        place = self._launch(sort_kernels.place_slots, block, BLOCK_T=rows)
        place((blocks, 1), self.device, ids, before, total, *tables, slots)
