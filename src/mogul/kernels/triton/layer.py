"""One expert layer on one device: sort, up, down, ordered sum; and its backward.

Holds the launches of one (shape, dtypes, device).  Nothing here waits for the device, so a call can
be captured in a CUDA graph.  Keeps for backward only x, the two up products `pre` and the sort.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton import row_kernels, token_kernels, weight_kernels
from mogul.kernels.triton.launch import (
    INTERPRETED,
    Launch,
    cdiv,
    descriptor,
    even_block,
    split_descriptor,
)
from mogul.kernels.triton.plans import (
    Plan,
    Shape,
    Tile,
    few_plan,
    last_width,
    plan_for,
    tell_of_rule,
)
from mogul.kernels.triton.sorter import Sorter
from mogul.kernels.triton.sorting import Sorted, max_tiles, sorted_views
from mogul.kernels.triton.tape import Tape, Tapes

_COUNTER_OF = {
    "UP": 1,
    "DOWN": 2,
    "DOWN_GRAD": 3,
    "UP_GRAD": 4,
    "UP_WEIGHT": 5,
    "DOWN_WEIGHT": 6,
}
"""Counter of the sort's head that hands out a product's tiles, or keeps its programs in step."""
_GATHER_ROLES = {"LOAD_WARPS": 4, "LOAD_REGS": 56, "MULTIPLY_REGS": 224}
_TMA_ROLES = {"LOAD_WARPS": 1, "LOAD_REGS": 24, "MULTIPLY_REGS": 224}
"""Warps and registers of the loader, registers of each multiplier: together the register file."""


class Layer:
    """Launches of one layer shape on one device, made when first needed."""

    def __init__(self, shape: Shape, device: int, *, pdl: bool) -> None:
        self.shape = shape
        self.device = device
        self.pdl = pdl
        self._launches: dict[Any, Launch] = {}
        self._plans: list[Plan] = []
        self.tapes = Tapes()
        self.ready: dict[Any, Any] = {}
        """Kinds of calls whose kernels are compiled (compile_ahead)."""
        self.sort = Sorter(shape.experts, device, pdl=pdl)

    def _launch(self, key: Any, plan: Plan | None, build: Callable[[], Launch]) -> Launch:
        """The launch of a key and plan. Plans are told apart by identity: hashing one is slow."""
        full_key = (key, id(plan))
        launch = self._launches.get(full_key)
        if launch is None:
            launch = self._launches[full_key] = build()
            if plan is not None:
                self._plans.append(plan)  # its id stays taken
        return launch

    def _dims(self) -> dict[str, int]:
        shape = self.shape
        return {"D": shape.width, "F": shape.inner, "K": shape.picks, "E": shape.experts}

    def _grid(self, tile: Tile, work: int) -> tuple[int, int]:
        return (min(work, self.shape.sms * tile.per_sm) if tile.per_sm else work, 1)

    def _row_grid(self, plan: Plan, tile: Tile, slots: int, width: int) -> tuple[int, int]:
        tiles = max_tiles(slots, self.shape.experts, plan.rows)
        return self._grid(tile, tiles * cdiv(width, tile.n))

    # ---- forward

    def infer(self, *inputs: Tensor) -> Tensor:
        """Forward that keeps nothing, of x, gate_up, down, ids, weights and perhaps a residual."""
        return self.tapes.forward(self, inputs, (plan_for, few_plan))

    def tape(self, tokens: int) -> Tape | None:
        """What replays a forward of so many tokens without a residual, once there was one."""
        return self.tapes.get(tokens, 5, (plan_for, few_plan))

    def few(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Two launches, no sort: each slot reads its expert on its own."""
        plan, tokens, slots = few_plan(self.shape), x.shape[0], ids.numel()
        act = torch.empty((slots, self.shape.inner), dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)

        def build(kernel: Any, n: int, k: int, **more: bool) -> Launch:
            blocks = {"BLOCK_N": n, "BLOCK_K": k, "STAGES": plan.stages, "PDL": self.pdl, **more}
            return Launch(kernel, {**self._dims(), **blocks}, warps=plan.warps, pdl=self.pdl)

        up = self._launch(
            ("few_up", plan), None, lambda: build(token_kernels.up_tokens, plan.up_n, plan.up_k)
        )
        adds = residual is not None
        last = self._launch(
            ("few_down", plan, adds),
            None,
            lambda: build(token_kernels.down_tokens, plan.down_n, plan.down_k, ADD=adds),
        )
        up((cdiv(self.shape.inner, plan.up_n), slots), self.device, x, gate_up, ids, act)
        grid = (cdiv(self.shape.width, plan.down_n), tokens)
        plus = out if residual is None else residual
        last(grid, self.device, act, down, ids, weights, plus, out)
        return out

    def forward(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        residual: Tensor | None = None,
        *,
        save: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, D]; with save also `pre` [S, 2F] and the sort's buffer (else of no use)."""
        plan = plan_for(self.shape, x.shape[0])
        slots, inner = ids.numel(), self.shape.inner
        sort = self.sort(ids, plan.rows)
        act = x.new_empty((slots, inner))
        pre = x.new_empty((slots, 2 * inner)) if save else act
        self.up(plan, x, gate_up, act, pre, sort, save=save)
        more = {} if residual is None else {"residual": residual}
        args = (plan, plan.down, act, down, sort, ids, weights)
        return self.product_sum(*args, transposed=False, **more), pre, sort.buffer

    def up(
        self,
        plan: Plan,
        x: Tensor,
        gate_up: Tensor,
        act: Tensor,
        pre: Tensor,
        sort: Sorted,
        *,
        save: bool,
    ) -> None:
        """act[row] from x[token]; with save also pre[row]."""
        tile, inner, width = plan.up, self.shape.inner, self.shape.width
        grid = self._row_grid(plan, tile, act.shape[0], inner)
        tables = (sort.order, sort.head, sort.tiles)
        if tile.split:
            narrow = tile.narrow and not save
            box = last_width(inner, tile.n) if narrow else tile.n
            desc = split_descriptor(gate_up.view(-1, width), [box, tile.k])
            launch = self._split_product("UP", plan, tile, inner, width, save=save)
            launch(grid, self.device, x, x, desc, x, act, pre, pre, act, act, *tables, 0)
            return
        flags = {"SAVE": save, **_flags(tile), "PDL": self.pdl}
        launch = self._launch(
            ("up", tile.n, save),
            plan,
            lambda: Launch(
                row_kernels.up_rows,
                {**self._dims(), **_blocks(plan, tile), **flags},
                warps=tile.warps,
                stages=tile.stages,
                pdl=self.pdl,
            ),
        )
        desc = descriptor(gate_up.view(-1, width), [tile.n, tile.k]) if tile.tma else gate_up
        launch(grid, self.device, x, gate_up, desc, act, pre, *tables)

    def product(
        self,
        plan: Plan,
        tile: Tile,
        a: Tensor,
        weight: Tensor,
        out: Tensor,
        sort: Sorted,
        *,
        transposed: bool,
    ) -> None:
        """out[slot] = a[row] @ weight[expert].T, or @ weight[expert] when transposed."""
        width, contracted = out.shape[1], a.shape[1]
        grid = self._row_grid(plan, tile, a.shape[0], width)
        tables = (sort.order, sort.head, sort.tiles)
        block = [tile.k, tile.n] if transposed else [tile.n, tile.k]
        if tile.split:
            a_desc = split_descriptor(a, [plan.rows, tile.k])
            w_desc = split_descriptor(weight.view(-1, weight.shape[-1]), block)
            mode = "UP_GRAD" if transposed else "DOWN"
            launch = self._split_product(mode, plan, tile, width, contracted)
            launch(grid, self.device, a, a_desc, w_desc, *[out] * 6, *tables, 0)
            return
        sizes = {"N": width, "C": contracted, "E": self.shape.experts, **_blocks(plan, tile)}
        flags = {"TRANSPOSED": transposed, **_flags(tile), "PDL": self.pdl}
        launch = self._launch(
            ("product", transposed),
            plan,
            lambda: Launch(
                row_kernels.down_rows,
                {**sizes, **flags},
                warps=tile.warps,
                stages=tile.stages,
                pdl=self.pdl,
            ),
        )
        a_desc, w_desc = a, weight
        if tile.tma:
            a_desc = descriptor(a, [plan.rows, tile.k])
            w_desc = descriptor(weight.view(-1, weight.shape[-1]), block)
        launch(grid, self.device, a, a_desc, weight, w_desc, out, *tables)

    def product_sum(
        self,
        plan: Plan,
        tile: Tile,
        a: Tensor,
        weight: Tensor,
        sort: Sorted,
        ids: Tensor,
        weights: Tensor,
        *,
        transposed: bool,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Product, then the ordered sum over picks: weighted forward, plain in backward."""
        y = a.new_empty((a.shape[0], self.shape.width))
        self.product(plan, tile, a, weight, y, sort, transposed=transposed)
        return self.sum(plan, y, ids, weights, weighted=not transposed, residual=residual)

    def sum(
        self,
        plan: Plan,
        y: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        weighted: bool,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Ordered sum over picks, and a residual where there is one."""
        width, tokens = self.shape.width, ids.shape[0]
        block = even_block(width)
        out = y.new_empty((tokens, width))
        adds = residual is not None
        flags = {"BLOCK_D": block, "WEIGHTED": weighted, "ADD": adds, "PDL": self.pdl}
        dims = {"D": width, "K": self.shape.picks, "E": self.shape.experts}
        launch = self._launch(
            ("sum", weighted, adds),
            plan,
            lambda: Launch(
                token_kernels.sum_slots, {**dims, **flags}, warps=max(1, block // 256), pdl=self.pdl
            ),
        )
        plus = out if residual is None else residual
        launch((tokens, cdiv(width, block)), self.device, y, ids, weights, plus, out)
        return out

    def sum_parts(self, part: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Gradient of the top-k weights from its parts by column tile [tiles, S]."""
        dweights, slots = torch.empty_like(weights), ids.numel()
        constants = {"E": self.shape.experts, "PARTS": part.shape[0], "BLOCK_S": 256}
        launch = self._launch(
            ("sum_parts", part.shape[0]), None, lambda: Launch(token_kernels.sum_parts, constants)
        )
        launch((cdiv(slots, 256), 1), self.device, part, ids, dweights, slots)
        return dweights

    # ---- backward

    def backward(
        self,
        dout: Tensor,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        pre: Tensor,
        sort_buffer: Tensor,
        *,
        need_input: bool = True,
        need_weight: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, gate_up, down and the top-k weights; empty where not needed."""
        plan, shape = plan_for(self.shape, x.shape[0]), self.shape
        sort = sorted_views(sort_buffer, ids.numel(), shape.experts)
        dpre = torch.empty_like(pre)
        act = pre.new_empty((pre.shape[0], shape.inner))
        part = self.down_grad(plan, dout, down, pre, weights, dpre, act, sort)
        dx = dgate_up = ddown = x.new_empty(0)
        if need_weight:
            tile = _tile(plan.down_weight)
            ddown = self.weight_grad(tile, dout, act, down, sort, gather_left=True)
            del act
            tile = _tile(plan.gate_up_weight)
            dgate_up = self.weight_grad(tile, dpre, x, gate_up, sort, gather_left=False)
        if need_input:
            tile = _tile(plan.up_grad)
            dx = self.product_sum(plan, tile, dpre, gate_up, sort, ids, weights, transposed=True)
        return dx, dgate_up, ddown, self.sum_parts(part, ids, weights)

    def down_grad(
        self,
        plan: Plan,
        dout: Tensor,
        down: Tensor,
        pre: Tensor,
        weights: Tensor,
        dpre: Tensor,
        act: Tensor,
        sort: Sorted,
    ) -> Tensor:
        """Fill dpre and the weighted act; return the parts of d weights [tiles, S]."""
        tile, slots, inner = _tile(plan.down_grad), pre.shape[0], self.shape.inner
        part = torch.empty((cdiv(inner, tile.n), slots), dtype=torch.float32, device=pre.device)
        grid = self._row_grid(plan, tile, slots, inner)
        tables = (sort.order, sort.head, sort.tiles)
        block = [tile.k, tile.n]
        if tile.split:
            desc = split_descriptor(down.view(-1, inner), block)
            launch = self._split_product("DOWN_GRAD", plan, tile, inner, self.shape.width)
            pre_desc = split_descriptor(pre, [plan.rows // 2, tile.n])
            tensors = (dout, dout, desc, pre_desc, act, pre, dpre, weights, part)
            launch(grid, self.device, *tensors, *tables, slots)
            return part
        flags = {"TMA": tile.tma, "FLATTEN": tile.flatten}
        launch = self._launch(
            "down_grad",
            plan,
            lambda: Launch(
                row_kernels.down_rows_grad,
                {**self._dims(), **_blocks(plan, tile), **flags},
                warps=tile.warps,
                stages=tile.stages,
            ),
        )
        desc = descriptor(down.view(-1, inner), block) if tile.tma else down
        tensors = (dout, down, desc, pre, weights, dpre, act, part)
        launch(grid, self.device, *tensors, *tables, slots)
        return part

    def weight_grad(
        self,
        tile: Tile,
        left: Tensor,
        right: Tensor,
        like: Tensor,
        sort: Sorted,
        *,
        gather_left: bool,
    ) -> Tensor:
        """[E, M, N] like `like`: left[rows].T @ right[rows] of each expert."""
        experts, m, n = like.shape
        out = torch.empty_like(like)
        describe = split_descriptor if tile.split else descriptor
        uses_tma = tile.split or tile.tma
        left_desc, right_desc = left, right
        if uses_tma and gather_left:
            right_desc = describe(right, [tile.k, tile.n])
        elif uses_tma:
            left_desc = describe(left, [tile.k, tile.m])
        launch = self._launch(
            ("weight", tile, gather_left),
            None,
            lambda: self._weight_launch(tile, m, n, gather_left),
        )
        grid = self._grid(tile, experts * cdiv(m, tile.m) * cdiv(n, tile.n))
        tensors = (left, left_desc, right, right_desc, out, sort.order, sort.head)
        launch(grid, self.device, *tensors)
        return out

    def _weight_launch(self, tile: Tile, m: int, n: int, gather_left: bool) -> Launch:
        constants = {
            "M": m,
            "N": n,
            "K": self.shape.picks,
            "E": self.shape.experts,
            "BLOCK_M": tile.m,
            "BLOCK_N": tile.n,
            "BLOCK_R": tile.k,
            "BLOCK_GROUP": tile.group,
            "GATHER_LEFT": gather_left,
        }
        if not tile.split:
            constants["TMA"] = tile.tma
            return Launch(
                weight_kernels.weight_grad, constants, warps=tile.warps, stages=tile.stages
            )
        from mogul.kernels.triton.hopper_weight_kernels import split_weight_grad

        counter = _COUNTER_OF["DOWN_WEIGHT" if gather_left else "UP_WEIGHT"]
        sync = counter if tile.sync else 0
        ring = {"STAGES": tile.stages, "SYNC": sync, **_pace(tile), "NARROW": tile.narrow}
        return Launch(split_weight_grad, {**constants, **ring, **_GATHER_ROLES})

    def _split_product(
        self, role: str, plan: Plan, tile: Tile, width: int, contracted: int, *, save: bool = False
    ) -> Launch:
        """hopper_kernels.row_product in one of its four roles."""
        return self._launch(
            (role, save),
            plan,
            lambda: self._split_launch(role, plan, tile, width, contracted, save),
        )

    def _split_launch(
        self, role: str, plan: Plan, tile: Tile, width: int, contracted: int, save: bool
    ) -> Launch:
        from mogul.kernels.triton import hopper_kernels as kernels

        gathers = role in ("UP", "DOWN_GRAD")
        mode = {"UP": kernels.UP, "DOWN_GRAD": kernels.DOWN_GRAD}.get(role, kernels.PRODUCT)
        constants = {
            "MODE": mode.value,
            "N": width,
            "C": contracted,
            "K": self.shape.picks,
            "E": self.shape.experts,
            **_blocks(plan, tile),
            "STAGES": tile.stages,
            "GATHER": gathers,
            "TRANSPOSED": role in ("DOWN_GRAD", "UP_GRAD"),
            "SAVE": save,
            "COUNTER": _COUNTER_OF[role] if tile.counted or tile.sync else 0,
            "COUNTED": tile.counted,
            **_pace(tile),
            "NARROW": tile.narrow and not save,
            **(_GATHER_ROLES if gathers else _TMA_ROLES),
        }
        return Launch(kernels.row_product, constants, pdl=self.pdl)


def _tile(tile: Tile | None) -> Tile:
    assert tile is not None, "plan_for fills the backward tiles"
    return tile


def _blocks(plan: Plan, tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_T": plan.rows,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "BLOCK_GROUP": tile.group,
    }


def _pace(tile: Tile) -> dict[str, int]:
    return {"SLACK": tile.slack, "PATIENCE": tile.patience}


def _flags(tile: Tile) -> dict[str, bool]:
    return {"TMA": tile.tma, "SWAP": tile.swap, "FLATTEN": tile.flatten, "STREAM": tile.stream}


@cache
def layer_of(
    experts: int, picks: int, width: int, inner: int, dtypes: tuple[torch.dtype, ...], device: int
) -> Layer:
    """The Layer of a shape, made once. `dtypes` only separates the launches."""
    if INTERPRETED or device < 0:
        return Layer(Shape(experts, picks, width, inner, 80, 4), -1, pdl=False)
    properties = torch.cuda.get_device_properties(device)
    capability = properties.major * 10 + properties.minor
    sms = properties.multi_processor_count
    shape = Shape(experts, picks, width, inner, capability, sms, properties.name)
    tell_of_rule(shape)
    return Layer(shape, device, pdl=capability >= 90)
