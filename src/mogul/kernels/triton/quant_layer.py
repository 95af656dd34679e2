"""One quantised experts layer on one device: sort, round, up, round, down, ordered sum.

Very few tokens take two launches without a sort in int4. Uses the sort and the sum of the
unquantised `Layer`. Nothing here waits for the device, so a call can be captured in a CUDA graph;
everything is also the operator `mogul::moe_quantised`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.kernels.triton import quant_kernels, quant_token_kernels
from mogul.kernels.triton.launch import (
    Launch,
    aligned,
    cdiv,
    descriptor,
    device_index,
    next_power_of_2,
)
from mogul.kernels.triton.layer import Layer, layer_of
from mogul.kernels.triton.linear import has_pdl
from mogul.kernels.triton.plans import Plan, Tile
from mogul.kernels.triton.quant_plans import INT4_FEW, quant_plan_for
from mogul.kernels.triton.sorting import Sorted, max_tiles

SILU, CLAMPED = 0, 1
"""ACT of the kernels."""
_ROUND_COLUMNS = 8192
JOINED_ROWS = 64
"""Row tiles up to which both numbers of a row meet a weight tile in one product (none by TMA)."""


@dataclass(frozen=True)
class Weights:
    """The tensors of one call; biases may be missing. `group` is 0 for fp8.

    `split`: rows are two numbers of e4m3 each, whose sum is as exact as in 16 bits.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    group: int
    act: int
    alpha: float
    limit: float
    split: bool = False

    @property
    def inner(self) -> int:
        """Expert width."""
        return self.down.shape[2] * (2 if self.group else 1)


class QuantLayer:
    """Launches of one layer shape and format on one device, made when first needed."""

    def __init__(
        self, layer: Layer, group: int, act: tuple[int, float, float], *, split: bool = False
    ) -> None:
        self.layer, self.group, self.act, self.split = layer, group, act, split
        self._launches: dict[Any, Launch] = {}
        self._plans: list[Plan | None] = []

    def _launch(self, key: Any, plan: Plan | None, build: Callable[[], Launch]) -> Launch:
        """The launch of a key and plan. Plans are told apart by identity: hashing one is slow."""
        full_key = (key, id(plan))
        launch = self._launches.get(full_key)
        if launch is None:
            launch = self._launches[full_key] = build()
            self._plans.append(plan)  # its id stays taken
        return launch

    def forward(
        self,
        x: Tensor,
        weights: Weights,
        ids: Tensor,
        factors: Tensor,
        rounded: tuple[Tensor, Tensor] | None,
        *,
        summed: bool = True,
    ) -> Tensor:
        """Output [T, D]; `rounded` are the rows of x in fp8 where a caller has them.

        Not `summed` (fp8 alone): what every pick gives, [T * K, D].
        """
        layer, slots = self.layer, ids.numel()
        if self.group and layer.shape.uses_few(x.shape[0]):
            return self._few(x, weights, ids, factors)
        plan = quant_plan_for(layer.shape, x.shape[0], self.group, split=self.split)
        sort = layer.sort(ids, plan.rows)
        act = x.new_empty((slots, layer.shape.inner))
        rows, scale = rounded or self._rounded(x)
        self._up(plan, rows, scale, weights, act, sort)
        rows, scale = self._rounded(act, sort.head[layer.shape.experts :])
        y = x.new_empty((slots, layer.shape.width))
        self._down(plan, rows, scale, weights, y, sort)
        if not summed:
            return y
        return layer.sum(plan, y, ids, factors, weighted=True)

    def _few(self, x: Tensor, weights: Weights, ids: Tensor, factors: Tensor) -> Tensor:
        """Two launches: each slot reads its expert on its own."""
        shape, device, pdl = self.layer.shape, self.layer.device, self.layer.pdl
        plan, tokens, slots = INT4_FEW, x.shape[0], ids.numel()
        act = torch.empty((slots, shape.inner), dtype=torch.float32, device=x.device)
        out = torch.empty_like(x)
        dims = {"D": shape.width, "F": shape.inner, "K": shape.picks, "E": shape.experts}
        same = {**dims, "GROUP": self.group, "STAGES": plan.stages, "PDL": pdl}

        def launch(name: str, bias: Tensor | None, n: int, k: int, kind: dict[str, Any]) -> Launch:
            kernel = getattr(quant_token_kernels, name)
            constants = {**same, **kind, "BLOCK_N": n, "BLOCK_K": k, "BIAS": bias is not None}
            key = (name, None if bias is None else bias.dtype, plan)
            return self._launch(
                key, None, lambda: Launch(kernel, constants, warps=plan.warps, pdl=pdl)
            )

        kind: dict[str, Any] = dict(zip(("ACT", "ALPHA", "LIMIT"), self.act, strict=True))
        bias = weights.gate_up_bias
        up = launch("up_tokens_quantised", bias, plan.up_n, plan.up_k, kind)
        scale = _words(weights.gate_up_scale, self.group)
        tensors = (x, weights.gate_up, scale, act if bias is None else bias, ids, act)
        up((cdiv(shape.inner, plan.up_n), slots), device, *tensors)
        bias = weights.down_bias
        down = launch("down_tokens_quantised", bias, plan.down_n, plan.down_k, {})
        scale = _words(weights.down_scale, self.group)
        tensors = (act, weights.down, scale, out if bias is None else bias, ids, factors, out)
        down((cdiv(shape.width, plan.down_n), tokens), device, *tensors)
        return out

    def _rounded(self, x: Tensor, live: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Rows as e4m3 with their scales; int4 leaves them as they are."""
        return (x, x) if self.group else rounded_rows(x, live, split=self.split)

    def _constants(self, plan: Plan, tile: Tile, bias: Tensor | None) -> dict[str, Any]:
        return {
            "E": self.layer.shape.experts,
            "GROUP": self.group,
            "SPLIT": self.split * (2 if plan.rows <= JOINED_ROWS and not tile.tma else 1),
            "BLOCK_T": plan.rows,
            "BLOCK_N": tile.n,
            "BLOCK_K": tile.k,
            "BLOCK_GROUP": tile.group,
            "TMA": tile.tma,
            "SWAP": tile.swap,
            "STREAM": tile.stream,
            "BIAS": bias is not None,
            "PDL": self.layer.pdl,
        }

    def _grid(self, plan: Plan, tile: Tile, slots: int, width: int) -> tuple[int, int]:
        shape = self.layer.shape
        work = max_tiles(slots, shape.experts, plan.rows) * cdiv(width, tile.n)
        return (min(work, shape.sms * tile.per_sm) if tile.per_sm else work, 1)

    def _up(
        self, plan: Plan, x: Tensor, scale: Tensor, weights: Weights, act: Tensor, sort: Sorted
    ) -> None:
        shape, tile, bias = self.layer.shape, plan.up, weights.gate_up_bias

        def build() -> Launch:
            dims = {"D": shape.width, "F": shape.inner, "K": shape.picks}
            kind = dict(zip(("ACT", "ALPHA", "LIMIT"), self.act, strict=True))
            constants = {**dims, **kind, **self._constants(plan, tile, bias)}
            return Launch(
                quant_kernels.up_quantised,
                constants,
                warps=tile.warps,
                stages=tile.stages,
                pdl=self.layer.pdl,
            )

        launch = self._launch(("up", None if bias is None else bias.dtype), plan, build)
        value = weights.gate_up
        desc = descriptor(value.view(-1, shape.width), [tile.n, tile.k]) if tile.tma else value
        launch(
            self._grid(plan, tile, act.shape[0], shape.inner),
            self.layer.device,
            *(x, scale, value, desc, _words(weights.gate_up_scale, self.group)),
            *(act if bias is None else bias, act, sort.order, sort.head, sort.tiles),
        )

    def _down(
        self, plan: Plan, a: Tensor, scale: Tensor, weights: Weights, out: Tensor, sort: Sorted
    ) -> None:
        shape, tile, bias = self.layer.shape, plan.down, weights.down_bias

        def build() -> Launch:
            dims = {"D": shape.width, "F": shape.inner}
            constants = {**dims, **self._constants(plan, tile, bias)}
            return Launch(
                quant_kernels.down_quantised,
                constants,
                warps=tile.warps,
                stages=tile.stages,
                pdl=self.layer.pdl,
            )

        launch = self._launch(("down", None if bias is None else bias.dtype), plan, build)
        value, a_desc = weights.down, a
        desc = value
        if tile.tma:
            a_desc = descriptor(a, [plan.rows, tile.k])
            desc = descriptor(value.view(-1, shape.inner), [tile.n, tile.k])
        launch(
            self._grid(plan, tile, out.shape[0], shape.width),
            self.layer.device,
            *(a, a_desc, scale, value, desc, _words(weights.down_scale, self.group)),
            *(out if bias is None else bias, out, sort.order, sort.head, sort.tiles),
        )


def rounded_rows(
    x: Tensor, live: Tensor | None = None, *, split: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows as e4m3 with a scale each; only the first `live[0]` where given.

    `split`: twice the columns, behind the rounded numbers what rounding left of them.
    """
    count, columns = x.shape
    value = x.new_empty((count, columns * (1 + split)), dtype=torch.float8_e4m3fn)
    scale = torch.empty(count, dtype=torch.float32, device=x.device)
    device = device_index(x)
    launch = _round(columns, live is not None, split, x.dtype, device)
    launch((count, 1), device, x, value, scale, scale if live is None else live)
    return value, scale


@cache
def _round(columns: int, counted: bool, split: bool, _dtype: torch.dtype, device: int) -> Launch:
    pdl = device >= 0 and has_pdl(device)
    block = min(_ROUND_COLUMNS, next_power_of_2(columns))
    constants = {"C": columns, "BLOCK_C": block, "SPLIT": split, "COUNTED": counted, "PDL": pdl}
    return Launch(quant_kernels.round_rows, constants, warps=4 if block <= 2048 else 8, pdl=pdl)


def _words(scale: Tensor, group: int) -> Tensor:
    """Pairs of bf16 as 32-bit words; fp8's scales as they are."""
    return scale.view(torch.int32) if group else scale


@cache
def _quant_layer(
    layer: Layer, group: int, act: tuple[int, float, float], split: bool
) -> QuantLayer:
    return QuantLayer(layer, group, act, split=split)


def run_quantised(
    x: Tensor,
    weights: Weights,
    ids: Tensor,
    factors: Tensor,
    rounded: tuple[Tensor, Tensor] | None = None,
    *,
    summed: bool = True,
) -> Tensor:
    """The layer: [T, D] -> [T, D]; `rounded` are the rows of x in fp8 where a caller has them.

    Not `summed` (fp8 alone): what every pick gives, [T * K, D].
    """
    if x.shape[0] == 0:
        return torch.empty_like(x)
    _check(weights)
    biases = (weights.gate_up_bias, weights.down_bias)
    if any(bias is not None for bias in biases):
        first, last = (None if bias is None else aligned(bias) for bias in biases)
        weights = replace(weights, gate_up_bias=first, down_bias=last)
    x, ids, factors = aligned(x), aligned(ids), aligned(factors)
    device = device_index(x)
    dtypes = (x.dtype, ids.dtype, factors.dtype)
    experts, width, _ = weights.down.shape
    layer = layer_of(experts, ids.shape[1], width, weights.inner, dtypes, device)
    act = (weights.act, weights.alpha, weights.limit)
    quant = _quant_layer(layer, weights.group, act, weights.split)
    if x.is_cuda and device != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return quant.forward(x, weights, ids, factors, rounded, summed=summed)
    return quant.forward(x, weights, ids, factors, rounded, summed=summed)


def _check(weights: Weights) -> None:
    for name in ("gate_up", "gate_up_scale", "down", "down_scale"):
        tensor: Tensor = getattr(weights, name)
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise BackendError(
                f"quantised {name} with strides {tensor.stride()} is not contiguous on a 16-byte "
                "boundary, as the Triton kernels need",
                fix=f"store {name}.contiguous()",
            )


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "moe_quantised(Tensor x, Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor ids, Tensor weights, int group, int act, "
    "float alpha, float limit, bool split=False) -> Tensor"
)


def _moe_quantised(
    x: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    down: Tensor,
    down_scale: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    group: int,
    act: int,
    alpha: float,
    limit: float,
    split: bool = False,
) -> Tensor:
    tensors = (gate_up, gate_up_scale, down, down_scale, gate_up_bias, down_bias)
    return run_quantised(x, Weights(*tensors, group, act, alpha, limit, split), ids, weights)


for _key in ("CUDA", "CPU"):  # CPU: the interpreter's path
    _LIB.impl("moe_quantised", _moe_quantised, _key)


@torch.library.register_fake("mogul::moe_quantised", lib=_LIB)
def _(x: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
