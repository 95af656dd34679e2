"""One expert layer on one device: sort, up, down, ordered sum; and its backward.

Holds the launches of one (shape, dtype, device).  Nothing here waits for the device, so a call can
be captured in a CUDA graph.  Keeps for backward only x, the two up products `pre` and the sort.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton import row_kernels, sort_kernels, token_kernels, weight_kernels
from mogul.kernels.triton.launch import INTERPRETED, Launch, cdiv, descriptor, next_power_of_2, split_descriptor
from mogul.kernels.triton.plans import Plan, Shape, Tile, few_plan, plan_for

_COUNTERS = 8
_COUNTER_OF = {"UP": 1, "DOWN": 2, "DOWN_GRAD": 3, "UP_GRAD": 4, "UP_WEIGHT": 5, "DOWN_WEIGHT": 6}
"""Counter of the sort's head that keeps the programs of a product in step."""
_ONE_LAUNCH_SLOTS = 8192
"""Above this the sort takes three launches (every program of the one-launch sort reads every id)."""


@dataclass(frozen=True)
class Sorted:
    """Slots by expert, see sort_kernels. One int32 buffer, three views."""

    order: Tensor
    head: Tensor
    tiles: Tensor
    buffer: Tensor


def sorted_size(slots: int, experts: int) -> int:
    """Length of the int32 buffer behind Sorted, for any row tile of 16 or more."""
    return _padded(slots) + _padded(experts + 2 + _COUNTERS) + 4 * (experts + slots // 16)


def max_tiles(slots: int, experts: int, rows: int) -> int:
    """Most row tiles that `slots` rows over `experts` experts can make."""
    return min(slots, experts) + slots // rows


def _padded(n: int) -> int:
    return (n + 3) // 4 * 4


def sorted_views(buffer: Tensor, slots: int, experts: int) -> Sorted:
    """Views of a buffer of sorted_size."""
    head = _padded(slots)
    tiles = head + _padded(experts + 2 + _COUNTERS)
    return Sorted(buffer, buffer[head:], buffer[tiles:], buffer)


class Layer:
    """Launches of one layer shape and dtype on one device."""

    def __init__(self, shape: Shape, device: int, *, pdl: bool):
        self.shape = shape
        self.device = device
        self.pdl = pdl
        self._launches: dict[Any, Launch] = {}
        experts = shape.experts
        bins = max(32, next_power_of_2(experts + 1))
        self._sort_constants = {"E": experts, "BINS": bins}
        self._dims = {"D": shape.width, "F": shape.inner, "K": shape.picks, "E": experts}

    def _launch(self, key: Any, kernel: Any, constants: dict[str, Any], **options: Any) -> Launch:
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = Launch(kernel, constants, **options)
        return launch

    def _row_grid(self, tile: Tile, tiles: int, width: int) -> tuple[int, int]:
        work = tiles * cdiv(width, tile.n)
        return (min(work, self.shape.sms * tile.per_sm) if tile.per_sm else work, 1)

    # ---- sort

    def sort(self, ids: Tensor, rows: int) -> Sorted:
        """Sort the slots of ids [T, K] by expert, with row tiles of `rows`."""
        slots, experts = ids.numel(), self.shape.experts
        result = sorted_views(torch.empty(sorted_size(slots, experts), dtype=torch.int32, device=ids.device), slots, experts)
        constants = self._sort_constants
        if slots <= _ONE_LAUNCH_SLOTS:
            block = min(2048, max(64, next_power_of_2(slots)))
            launch = self._launch(
                ("sort", rows, block),
                sort_kernels.sort_in_one,
                {**constants, "BLOCK_S": block, "BLOCK_T": rows, "PDL": self.pdl},
                warps=4 if block <= 512 else 8,
                pdl=self.pdl,
            )
            launch((experts, 1), self.device, ids, result.order, result.head, result.tiles, slots)
            return result
        self._sort_in_three(ids, result, rows)
        return result

    def _sort_in_three(self, ids: Tensor, result: Sorted, rows: int) -> None:
        slots, bins, block = ids.numel(), self._sort_constants["BINS"], 1024
        blocks = cdiv(slots, block)
        scratch = torch.empty((2 * blocks + 1, bins), dtype=torch.int32, device=ids.device)
        count, before, total = scratch, scratch[blocks:], scratch[2 * blocks :]
        pdl = {"PDL": self.pdl}
        sizes = {**self._sort_constants, "BLOCK_S": block}
        first = self._launch("count", sort_kernels.count_blocks, {**sizes, **pdl}, pdl=self.pdl)
        first((blocks, 1), self.device, ids, count, slots)
        scan = self._launch("scan", sort_kernels.scan_blocks, {"BINS": bins, "BLOCK": 1024, **pdl}, pdl=self.pdl)
        scan((self.shape.experts, 1), self.device, count, before, total, blocks)
        place = self._launch(
            ("place", rows), sort_kernels.place_slots, {**sizes, "BLOCK_T": rows, **pdl}, pdl=self.pdl
        )
        place(
            (blocks, 1), self.device, ids, count, before, total, result.order, result.head, result.tiles, slots
        )  # fmt: skip

    # ---- forward

    def few(self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Two launches, no sort: each slot reads its expert on its own."""
        plan, tokens = few_plan(self.shape), x.shape[0]
        act = torch.empty((ids.numel(), self.shape.inner), dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        common = {**self._dims, "STAGES": plan.stages, "PDL": self.pdl}
        up = self._launch(
            ("few_up", plan), token_kernels.up_tokens, {**common, "BLOCK_N": plan.up_n, "BLOCK_K": plan.up_k},
            warps=plan.warps, pdl=self.pdl,
        )  # fmt: skip
        up((cdiv(self.shape.inner, plan.up_n), ids.numel()), self.device, x, gate_up, ids, act)
        last = self._launch(
            ("few_down", plan), token_kernels.down_tokens,
            {**common, "BLOCK_N": plan.down_n, "BLOCK_K": plan.down_k}, warps=plan.warps, pdl=self.pdl,
        )  # fmt: skip
        last((cdiv(self.shape.width, plan.down_n), tokens), self.device, act, down, ids, weights, out)
        return out

    def forward(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, *, save: bool = False,
        plan: Plan | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Output [T, D]; with save also `pre` [S, 2F] and the sort's buffer (else empty)."""
        plan = plan or plan_for(self.shape, x.shape[0])
        slots, shape = ids.numel(), self.shape
        sort = self.sort(ids, plan.rows)
        tiles = max_tiles(slots, shape.experts, plan.rows)
        act = x.new_empty((slots, shape.inner))
        pre = x.new_empty((slots, 2 * shape.inner)) if save else act
        self._up(plan, tiles, x, gate_up, act, pre, sort, save)
        y = x.new_empty((slots, shape.width))
        self._product(plan, plan.down, tiles, act, down, y, sort, transposed=False)
        out = self._sum(plan, y, ids, weights, weighted=True)[0]
        return out, pre if save else x.new_empty(0), sort.buffer

    def _up(
        self, plan: Plan, tiles: int, x: Tensor, gate_up: Tensor, act: Tensor, pre: Tensor, sort: Sorted, save: bool
    ) -> None:
        tile = plan.up
        if tile.split:
            w_desc = split_descriptor(gate_up.view(-1, self.shape.width), [tile.n, tile.k])
            launch = self._split(
                plan, tile, "UP", tiles, self.shape.inner, self.shape.width, gather=True, transposed=False, save=save
            )
            launch(x, x, w_desc, act, pre, pre, act, act, sort, 0)
            return
        launch = self._launch(
            ("up", plan.rows, tile, save), row_kernels.up_rows,
            {**self._dims, **_blocks(plan, tile), "TMA": tile.tma, "SWAP": tile.swap, "SAVE": save,
             "FLATTEN": tile.flatten, "STREAM": tile.stream, "PDL": self.pdl},
            warps=tile.warps, stages=tile.stages, pdl=self.pdl,
        )  # fmt: skip
        desc = descriptor(gate_up.view(-1, self.shape.width), [tile.n, tile.k]) if tile.tma else gate_up
        grid = self._row_grid(tile, tiles, self.shape.inner)
        launch(grid, self.device, x, gate_up, desc, act, pre, sort.order, sort.head, sort.tiles)

    def _product(
        self, plan: Plan, tile: Tile, tiles: int, a: Tensor, weight: Tensor, out: Tensor, sort: Sorted, *,
        transposed: bool,
    ) -> None:  # fmt: skip
        """out[slot] = a[row] @ weight[expert].T, or @ weight[expert] when transposed."""
        width, contracted = out.shape[1], a.shape[1]
        launch = self._launch(
            ("product", plan.rows, tile, transposed), row_kernels.down_rows,
            {"N": width, "C": contracted, "E": self.shape.experts, **_blocks(plan, tile), "TMA": tile.tma,
             "SWAP": tile.swap, "TRANSPOSED": transposed, "FLATTEN": tile.flatten, "STREAM": tile.stream,
             "PDL": self.pdl},
            warps=tile.warps, stages=tile.stages, pdl=self.pdl,
        )  # fmt: skip
        if tile.split:
            block = [tile.k, tile.n] if transposed else [tile.n, tile.k]
            w_desc = split_descriptor(weight.view(-1, weight.shape[-1]), block)
            split = self._split(plan, tile, "PRODUCT", tiles, width, contracted, gather=False, transposed=transposed)
            split(a, split_descriptor(a, [plan.rows, tile.k]), w_desc, out, out, out, out, out, sort, 0)
            return
        a_desc, w_desc = a, weight
        if tile.tma:
            a_desc = descriptor(a, [plan.rows, tile.k])
            block = [tile.k, tile.n] if transposed else [tile.n, tile.k]
            w_desc = descriptor(weight.view(-1, weight.shape[-1]), block)
        grid = self._row_grid(tile, tiles, width)
        launch(grid, self.device, a, a_desc, weight, w_desc, out, sort.order, sort.head, sort.tiles)

    def _sum(
        self, plan: Plan, y: Tensor, ids: Tensor, weights: Tensor, *, weighted: bool, part: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Ordered sum over picks; with `part` also the gradient of the weights."""
        shape, tokens = self.shape, ids.shape[0]
        parts = 0 if part is None else part.shape[0]
        block = min(plan.sum_block, next_power_of_2(shape.width))
        out = y.new_empty((tokens, shape.width))
        dweights = weights if part is None else torch.empty_like(weights)
        launch = self._launch(
            ("sum", block, plan.sum_warps, weighted, parts), token_kernels.sum_slots,
            {"D": shape.width, "K": shape.picks, "E": shape.experts, "BLOCK_D": block, "WEIGHTED": weighted,
             "PARTS": parts, "PDL": self.pdl},
            warps=plan.sum_warps, pdl=self.pdl,
        )  # fmt: skip
        grid = (tokens, cdiv(shape.width, block))
        part = y if part is None else part
        launch(grid, self.device, y, ids, weights, part, out, dweights, ids.numel())
        return out, dweights

    # ---- backward

    def backward(
        self, dout: Tensor, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, pre: Tensor,
        sort_buffer: Tensor, *, need_input: bool = True, need_weight: bool = True, plan: Plan | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of x, gate_up, down and the top-k weights."""
        plan = plan or plan_for(self.shape, x.shape[0])
        shape, slots = self.shape, ids.numel()
        sort = sorted_views(sort_buffer, slots, shape.experts)
        tiles = max_tiles(slots, shape.experts, plan.rows)
        dpre = torch.empty_like(pre)
        act = pre.new_empty((slots, shape.inner))
        part = self._down_grad(plan, tiles, dout, down, pre, weights, dpre, act, sort)
        none = x.new_empty(0)
        dgate_up = ddown = none
        if need_weight:
            ddown = self._weight_grad(plan, _tile(plan.down_weight), dout, act, down, sort, gather_left=True)
            del act
            dgate_up = self._weight_grad(plan, _tile(plan.gate_up_weight), dpre, x, gate_up, sort, gather_left=False)
        if not need_input:
            live = (ids >= 0) & (ids < shape.experts)
            return none, dgate_up, ddown, part.sum(0).view(ids.shape).where(live, 0.0).to(weights.dtype)
        dx_slots = x.new_empty((slots, shape.width))
        self._product(plan, _tile(plan.up_grad), tiles, dpre, gate_up, dx_slots, sort, transposed=True)
        dx, dweights = self._sum(plan, dx_slots, ids, weights, weighted=False, part=part)
        return dx, dgate_up, ddown, dweights

    def _down_grad(
        self, plan: Plan, tiles: int, dout: Tensor, down: Tensor, pre: Tensor, weights: Tensor, dpre: Tensor,
        act: Tensor, sort: Sorted,
    ) -> Tensor:  # fmt: skip
        tile, slots = _tile(plan.down_grad), pre.shape[0]
        part = torch.empty((cdiv(self.shape.inner, tile.n), slots), dtype=torch.float32, device=dout.device)
        if tile.split:
            w_desc = split_descriptor(down.view(-1, self.shape.inner), [tile.k, tile.n])
            split = self._split(
                plan, tile, "DOWN_GRAD", tiles, self.shape.inner, self.shape.width, gather=True, transposed=True
            )
            split(dout, dout, w_desc, act, pre, dpre, weights, part, sort, slots)
            return part
        launch = self._launch(
            ("down_grad", plan.rows, tile), row_kernels.down_rows_grad,
            {**self._dims, **_blocks(plan, tile), "TMA": tile.tma, "FLATTEN": tile.flatten},
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        desc = descriptor(down.view(-1, self.shape.inner), [tile.k, tile.n]) if tile.tma else down
        launch(
            self._row_grid(tile, tiles, self.shape.inner), self.device, dout, down, desc, pre, weights, dpre, act,
            part, sort.order, sort.head, sort.tiles, slots,
        )  # fmt: skip
        return part

    def _weight_grad(
        self, plan: Plan, tile: Tile, left: Tensor, right: Tensor, like: Tensor, sort: Sorted, *, gather_left: bool
    ) -> Tensor:
        m, n = like.shape[1:]
        out = torch.empty_like(like)
        if tile.split:
            self._split_weight_grad(plan, tile, left, right, out, sort, gather_left)
            return out
        launch = self._launch(
            ("weight", tile, plan.weight_m, gather_left), weight_kernels.weight_grad,
            {"M": m, "N": n, "K": self.shape.picks, "E": self.shape.experts, "BLOCK_M": plan.weight_m,
             "BLOCK_N": tile.n, "BLOCK_R": tile.k, "BLOCK_GROUP": tile.group, "GATHER_LEFT": gather_left,
             "TMA": tile.tma},
            warps=tile.warps, stages=tile.stages,
        )  # fmt: skip
        left_desc = descriptor(left, [tile.k, plan.weight_m]) if tile.tma and not gather_left else left
        right_desc = descriptor(right, [tile.k, tile.n]) if tile.tma and gather_left else right
        work = self.shape.experts * cdiv(m, plan.weight_m) * cdiv(n, tile.n)
        grid = (min(work, self.shape.sms * tile.per_sm) if tile.per_sm else work, 1)
        launch(grid, self.device, left, left_desc, right, right_desc, out, sort.order, sort.head)
        return out


    # ---- Hopper kernels with split roles

    def _split(
        self, plan: Plan, tile: Tile, mode: str, tiles: int, width: int, contracted: int, *, gather: bool,
        transposed: bool, save: bool = False,
    ) -> Callable[..., None]:  # fmt: skip
        """A call of hopper_kernels.row_product with everything but its tensors fixed."""
        from mogul.kernels.triton import hopper_kernels as kernels

        counter = _COUNTER_OF[mode if mode != "PRODUCT" else "UP_GRAD" if transposed else "DOWN"]
        launch = self._launch(
            ("split", mode, plan.rows, tile, transposed, save), kernels.row_product,
            {"MODE": getattr(kernels, mode).value, "N": width, "C": contracted, "K": self.shape.picks,
             "E": self.shape.experts, **_blocks(plan, tile), "STAGES": tile.stages, "GATHER": gather,
             "TRANSPOSED": transposed, "SAVE": save, "SYNC": counter if tile.sync else 0, **_roles(gather)},
        )  # fmt: skip
        grid = self._row_grid(tile, tiles, width)

        def call(
            a: Tensor, a_desc: Any, w_desc: Any, out: Tensor, pre: Tensor, dpre: Tensor, weights: Tensor,
            part: Tensor, sort: Sorted, slots: int,
        ) -> None:  # fmt: skip
            launch(
                grid, self.device, a, a_desc, w_desc, out, pre, dpre, weights, part, sort.order, sort.head, sort.tiles,
                slots,
            )  # fmt: skip

        return call

    def _split_weight_grad(
        self, plan: Plan, tile: Tile, left: Tensor, right: Tensor, out: Tensor, sort: Sorted, gather_left: bool
    ) -> None:
        from mogul.kernels.triton import hopper_weight_kernels as kernels

        m, n = out.shape[1:]
        counter = _COUNTER_OF["DOWN_WEIGHT" if gather_left else "UP_WEIGHT"]
        launch = self._launch(
            ("split_weight", tile, plan.weight_m, gather_left), kernels.split_weight_grad,
            {"M": m, "N": n, "K": self.shape.picks, "E": self.shape.experts, "BLOCK_M": plan.weight_m,
             "BLOCK_N": tile.n, "BLOCK_R": tile.k, "BLOCK_GROUP": tile.group, "STAGES": tile.stages,
             "GATHER_LEFT": gather_left, "SYNC": counter if tile.sync else 0, **_roles(True)},
        )  # fmt: skip
        left_desc = left if gather_left else split_descriptor(left, [tile.k, plan.weight_m])
        right_desc = split_descriptor(right, [tile.k, tile.n]) if gather_left else right
        work = self.shape.experts * cdiv(m, plan.weight_m) * cdiv(n, tile.n)
        grid = (min(work, self.shape.sms), 1)
        launch(grid, self.device, left, left_desc, right, right_desc, out, sort.order, sort.head)


def _roles(gather: bool) -> dict[str, int]:
    """Warps and registers of the loader and registers of each multiplier (they sum to the file's 512)."""
    if gather:
        return {"LOAD_WARPS": 4, "LOAD_REGS": 56, "MULTIPLY_REGS": 224}
    return {"LOAD_WARPS": 1, "LOAD_REGS": 24, "MULTIPLY_REGS": 224}


def _tile(tile: Tile | None) -> Tile:
    assert tile is not None, "plan_for fills the backward tiles"
    return tile


def _blocks(plan: Plan, tile: Tile) -> dict[str, int]:
    return {"BLOCK_T": plan.rows, "BLOCK_N": tile.n, "BLOCK_K": tile.k, "BLOCK_GROUP": tile.group}


@cache
def layer_of(experts: int, picks: int, width: int, inner: int, dtype: torch.dtype, device: int) -> Layer:
    """The Layer of a shape, made once. `dtype` only separates launches."""
    if INTERPRETED or device < 0:
        return Layer(Shape(experts, picks, width, inner, 80, 4), -1, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    shape = Shape(experts, picks, width, inner, capability, properties.multi_processor_count)
    return Layer(shape, device, pdl=capability >= 90)
