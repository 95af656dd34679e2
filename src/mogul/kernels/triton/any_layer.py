"""Launches of the plain kernels for every layout, and their operators `mogul::moe_any*`.

Decides block sizes from the rows an expert gets. Keeps for backward x, `pre` and the sort, as the
fast layer does; the sort and the ordered sums are those of the fast layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.layout import CLAMPED_SILU, CLAMPED_SWIGLU, ExpertLayout
from mogul.kernels.triton import any_kernels
from mogul.kernels.triton.launch import Launch, cdiv, device_index
from mogul.kernels.triton.layer import Layer, layer_of
from mogul.kernels.triton.plans import Plan, Tile
from mogul.kernels.triton.sorting import Sorted, max_tiles, sorted_views

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", CLAMPED_SWIGLU, CLAMPED_SILU)
"""By the kernels' numbers."""


@dataclass(frozen=True)
class Form:
    """A layout as the kernels read it."""

    transposed: bool
    interleaved: bool
    gated: bool
    act: int
    alpha: float
    limit: float

    @classmethod
    def of(cls, layout: ExpertLayout) -> Form:
        """From the public record; alpha counts for gpt-oss only."""
        clamped = layout.activation == CLAMPED_SWIGLU
        return cls(
            layout.is_transposed,
            layout.has_gate and not layout.is_concatenated,
            layout.has_gate,
            ACTIVATIONS.index(layout.activation),
            layout.alpha if clamped else 1.0,
            layout.limit,
        )

    def activation(self) -> dict[str, Any]:
        """Constants of the kernels that activate."""
        return {"GATED": self.gated, "ACT": self.act, "ALPHA": self.alpha, "LIMIT": self.limit}

    def strides(self, rows: int, columns: int) -> dict[str, int]:
        """Of a weight with this many output rows and contracted columns."""
        row, column = (1, rows) if self.transposed else (columns, 1)
        return {"ROW_STRIDE": row, "COL_STRIDE": column}


@dataclass(frozen=True)
class Call:
    """Tensors of one call."""

    x: Tensor
    gate_up: Tensor
    down: Tensor
    ids: Tensor
    weights: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class AnyLayer:
    """One shape and form on one device."""

    def __init__(self, layer: Layer, form: Form) -> None:
        self.layer, self.form = layer, form
        self.wide = (2 if form.gated else 1) * layer.shape.inner
        self._launches: dict[Any, Launch] = {}

    def _launch(self, key: Any, kernel: Any, constants: Callable[[], dict[str, Any]]) -> Launch:
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = Launch(kernel, constants(), warps=4, stages=2)
        return launch

    def _blocks(self, tokens: int) -> tuple[int, dict[str, int]]:
        """Row tile and block sizes."""
        mean = tokens * self.layer.shape.picks / self.layer.shape.experts
        rows = 16 if mean <= 24 else 64
        return rows, {"BLOCK_T": rows, "BLOCK_N": 64, "BLOCK_K": 64 if rows == 16 else 32}

    def _grid(self, slots: int, rows: int, width: int) -> tuple[int, int]:
        return max_tiles(slots, self.layer.shape.experts, rows) * cdiv(width, 64), 1

    def forward(self, call: Call, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Output [T, D], pre [S, WIDE] (else of no use) and the sort's buffer."""
        layer, shape, form = self.layer, self.layer.shape, self.form
        tokens, slots = call.x.shape[0], call.ids.numel()
        rows, blocks = self._blocks(tokens)
        sort = layer.sort(call.ids, rows)
        act = call.x.new_empty((slots, shape.inner))
        pre = call.x.new_empty((slots, self.wide)) if save else act
        tables = (sort.order, sort.head, sort.tiles)
        bias = call.gate_up_bias
        up = self._launch(
            ("up", rows, save, bias is None),
            any_kernels.up_any,
            lambda: {
                **{"D": shape.width, "F": shape.inner, "K": shape.picks, "E": shape.experts},
                **form.strides(self.wide, shape.width),
                **form.activation(),
                **{"INTERLEAVED": form.interleaved, "BIAS": bias is not None, "SAVE": save},
                **blocks,
            },
        )
        grid = self._grid(slots, rows, shape.inner)
        some = call.x if bias is None else bias
        up(grid, layer.device, call.x, call.gate_up, some, act, pre, *tables)
        y = call.x.new_empty((slots, shape.width))
        self._product(act, call.down, call.down_bias, y, sort, rows, back=False)
        out = layer.sum(_SUM_PLANS[rows], y, call.ids, call.weights, weighted=True)
        return out, pre, sort.buffer

    def _product(
        self,
        a: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        out: Tensor,
        sort: Sorted,
        rows: int,
        *,
        back: bool,
    ) -> None:
        """out[slot] = a[row] @ down.T (+ bias), or back: a[row] @ gate_up."""
        shape, form = self.layer.shape, self.form
        blocks = self._blocks(out.shape[0] // shape.picks)[1] | {"BLOCK_T": rows}
        stored = (self.wide, shape.width) if back else (shape.width, shape.inner)
        launch = self._launch(
            ("product", rows, back, bias is None),
            any_kernels.product_any,
            lambda: {
                **{"N": shape.width, "C": a.shape[1], "F": shape.inner, "E": shape.experts},
                **form.strides(*stored),
                **{"BACK": back, "INTERLEAVED": form.interleaved, "BIAS": bias is not None},
                **blocks,
            },
        )
        grid = self._grid(a.shape[0], rows, shape.width)
        some = a if bias is None else bias
        tables = (sort.order, sort.head, sort.tiles)
        launch(grid, self.layer.device, a, weight, some, out, *tables)

    def backward(
        self, dout: Tensor, call: Call, pre: Tensor, buffer: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Gradients of x, gate_up, down, weights and both biases (empty where there is none)."""
        layer, shape, slots = self.layer, self.layer.shape, call.ids.numel()
        rows, _ = self._blocks(call.x.shape[0])
        sort = sorted_views(buffer, slots, shape.experts)
        dpre, act = torch.empty_like(pre), pre.new_empty((slots, shape.inner))
        part = self._down_grad(dout, call, pre, dpre, act, sort, rows)
        dgate_up = self._weight_grad(dpre, call.x, call.gate_up, sort, up=True)
        ddown = self._weight_grad(dout, act, call.down, sort, up=False)
        dbias_up = self._bias_grad(dpre, call, call.gate_up_bias, sort, weighted=False)
        dbias_down = self._bias_grad(dout, call, call.down_bias, sort, weighted=True)
        dx_slots = dout.new_empty((slots, shape.width))
        self._product(dpre, call.gate_up, None, dx_slots, sort, rows, back=True)
        dx = layer.sum(_SUM_PLANS[rows], dx_slots, call.ids, call.weights, weighted=False)
        dweights = layer.sum_parts(part, call.ids, call.weights)
        return dx, dgate_up, ddown, dweights, dbias_up, dbias_down

    def _down_grad(
        self,
        dout: Tensor,
        call: Call,
        pre: Tensor,
        dpre: Tensor,
        act: Tensor,
        sort: Sorted,
        rows: int,
    ) -> Tensor:
        shape, form, slots = self.layer.shape, self.form, pre.shape[0]
        part = torch.empty((cdiv(shape.inner, 64), slots), dtype=torch.float32, device=pre.device)
        bias = call.down_bias
        blocks = self._blocks(call.x.shape[0])[1]
        launch = self._launch(
            ("down_grad", rows, bias is None),
            any_kernels.down_grad_any,
            lambda: {
                **{"D": shape.width, "F": shape.inner, "K": shape.picks, "E": shape.experts},
                **form.strides(shape.width, shape.inner),
                **form.activation(),
                **{"BIAS": bias is not None},
                **blocks,
            },
        )
        tensors = (dout, call.down, dout if bias is None else bias, pre, call.weights)
        tables = (sort.order, sort.head, sort.tiles)
        grid = self._grid(slots, rows, shape.inner)
        launch(grid, self.layer.device, *tensors, dpre, act, part, *tables, slots)
        return part

    def _weight_grad(
        self, left: Tensor, right: Tensor, like: Tensor, sort: Sorted, *, up: bool
    ) -> Tensor:
        shape, form, out = self.layer.shape, self.form, torch.empty_like(like)
        m, n = left.shape[1], right.shape[1]
        launch = self._launch(
            ("weight", up),
            any_kernels.weight_grad_any,
            lambda: {
                **{"M": m, "N": n, "F": shape.inner, "K": shape.picks},
                **form.strides(m, n),
                **{"INTERLEAVED": up and form.interleaved, "GATHER_LEFT": not up},
                **{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_R": 32},
            },
        )
        grid = (shape.experts, cdiv(m, 64) * cdiv(n, 64))
        launch(grid, self.layer.device, left, right, out, sort.order, sort.head)
        return out

    def _bias_grad(
        self, rows: Tensor, call: Call, like: Tensor | None, sort: Sorted, *, weighted: bool
    ) -> Tensor:
        if like is None:
            return rows.new_empty(0)
        shape, form, out = self.layer.shape, self.form, torch.empty_like(like)
        launch = self._launch(
            ("bias", weighted),
            any_kernels.bias_grad_any,
            lambda: {
                **{"N": rows.shape[1], "F": shape.inner, "K": shape.picks},
                **{"INTERLEAVED": not weighted and form.interleaved, "WEIGHTED": weighted},
                **{"BLOCK_N": 64, "BLOCK_R": 32},
            },
        )
        grid = (shape.experts, cdiv(rows.shape[1], 64))
        launch(grid, self.layer.device, rows, call.weights, out, sort.order, sort.head)
        return out


_SUM_PLANS = {rows: Plan(rows, Tile(64, 32), Tile(64, 32)) for rows in (16, 64)}
"""For the ordered sum, which tells its launches apart by plan."""
_layers: dict[tuple[Layer, Form], AnyLayer] = {}


def layer_for(call: Call, form: Form) -> AnyLayer:
    """The layer of a call, made once."""
    device = device_index(call.x)
    dtypes = (call.x.dtype, call.ids.dtype, call.weights.dtype)
    experts, inner = call.down.shape[0], call.down.shape[1 if form.transposed else 2]
    layer = layer_of(experts, call.ids.shape[1], call.x.shape[1], inner, dtypes, device)
    found = _layers.get((layer, form))
    if found is None:
        found = _layers[layer, form] = AnyLayer(layer, form)
    return found
