"""One layer spread over ranks, by every dispatch, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_cases import CASES, EXPERTS, INNER, PICKS, WIDTH, case, near
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.kernels import RouterSpec, moe_forward, route
from mogul.parallel import Plan, World, contiguous, dispatch, make_dispatcher
from mogul.parallel.groups import node_groups
from mogul.parallel.parcel import quantise, restore
from mogul.spec.grouping import Grouping


class Layer:
    """One layer's inputs for all ranks, and what one process computes from them."""

    def __init__(
        self, world: World, tokens: list[int], groups: int, dtype: torch.dtype, nulls: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.grouping = Grouping(num_experts=EXPERTS, num_groups=groups, top_k=PICKS)
        total = sum(tokens)
        self.x, self.dy = normal(total, WIDTH), normal(total, WIDTH)
        self.gate_up, self.down = normal(EXPERTS, 2 * INNER, WIDTH), normal(EXPERTS, WIDTH, INNER)
        spec = RouterSpec(
            num_experts=EXPERTS, top_k=PICKS, num_groups=groups, num_null_experts=nulls
        )
        routing = route(normal(total, EXPERTS + nulls), spec)
        self.ids, self.weights = routing.ids, routing.weights.to(dtype)
        first = sum(tokens[: world.rank])
        self.own = slice(first, first + tokens[world.rank])
        self.wanted = self.run(self.x, self.ids, self.weights, self.gate_up, self.down, self.dy)

    @staticmethod
    def run(
        x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, dy: Tensor
    ) -> list[Tensor]:
        """Output and gradients of x, weights, gate_up, down."""
        leaves = [t.clone().requires_grad_() for t in (x, weights, gate_up, down)]
        y = moe_forward(leaves[0], leaves[2], leaves[3], ids, leaves[1], backend="reference")
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def check_layer(world: World, layer: Layer, name: str, moe_tp: int = 1, **options: Any) -> None:
    """Spread the layer and compare output and every gradient."""
    owners = contiguous(EXPERTS, world.size // moe_tp, moe_tp)
    plan = Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, **options)  # type: ignore[arg-type]
    dispatcher = make_dispatcher(name, plan)
    kept = list(owners.experts_of_rank[plan.expert_rank])
    share = INNER // moe_tp
    inner = torch.arange(share) + share * (world.rank % moe_tp)
    rows = torch.cat([inner, inner + INNER])
    whole = [layer.x[layer.own], layer.weights[layer.own], layer.gate_up[kept][:, rows]]
    whole.append(layer.down[kept][:, :, inner])
    x, weights, gate_up, down = (t.clone().requires_grad_() for t in whole)

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, gate_up, down, ids, weights, backend="reference")

    y = dispatcher(x, layer.ids[layer.own], weights, experts)
    grads = torch.autograd.grad(y, (x, weights, gate_up, down), layer.dy[layer.own])
    wanted_y, wanted_x, wanted_w, wanted_gate_up, wanted_down = layer.wanted
    near(y, wanted_y[layer.own], "output")
    near(grads[0], wanted_x[layer.own], "gradient of x")
    near(grads[1], wanted_w[layer.own], "gradient of the weights")
    near(grads[2], wanted_gate_up[kept][:, rows], "gradient of gate_up")
    near(grads[3], wanted_down[kept][:, :, inner], "gradient of down")
    with torch.no_grad():  # the packed road
        near(dispatcher(x, layer.ids[layer.own], weights, experts), wanted_y[layer.own], "packed")


def _add_layer_cases() -> None:
    even = {2: [6, 6], 4: [6, 6, 6, 6]}
    uneven = {2: [5, 2], 4: [5, 0, 7, 3]}
    f64, f32 = torch.float64, torch.float32

    def add(title: str, name: str, tokens: dict[int, list[int]], groups: int, **more: Any) -> None:
        dtype, nulls = more.pop("dtype", f64), more.pop("nulls", 0)

        def run(world: World) -> None:
            layer = Layer(world, tokens[world.size], groups, dtype, nulls)
            check_layer(world, layer, name, **more)

        CASES[title] = run

    add("static", "static", even, 4)
    add("static fp32", "static", even, 4, dtype=f32)
    add("static in chunks", "static", even, 4, chunks=3)
    add("static with null picks", "static", even, 4, nulls=4)
    add("static uneven", "static", uneven, 4, rows="agree")
    add("static uneven, known", "static", uneven, 4, rows=9, chunks=2)
    add("static cut experts", "static", even, 4, moe_tp=2)
    add("gather any router", "gather", uneven, 1, rows="agree")
    add("all_to_all", "all_to_all", even, 1)
    add("all_to_all fp32", "all_to_all", even, 1, dtype=f32)
    add("all_to_all grouped, in chunks", "all_to_all", even, 4, chunks=3)
    add("all_to_all uneven", "all_to_all", uneven, 1, rows="agree", nulls=4)
    add("all_to_all cut experts", "all_to_all", even, 1, moe_tp=2)
    add("all_to_all capacity", "all_to_all", even, 1, capacity=1.0, chunks=2)


_add_layer_cases()


@case("all_to_all without picks")
def _no_picks(world: World) -> None:
    """A rank that sends nothing and one that gets nothing still take part in both passes."""
    layer = Layer(world, [3] * world.size, 1, torch.float64)
    layer.ids = torch.full_like(layer.ids, EXPERTS)
    layer.ids[3:6] = torch.arange(PICKS)  # rank 1 alone has picks, all on rank 0
    layer.wanted = layer.run(layer.x, layer.ids, layer.weights, layer.gate_up, layer.down, layer.dy)
    check_layer(world, layer, "all_to_all")


@case("4: two levels")
def _two_levels(world: World) -> None:
    """Two nodes of two ranks; sizes are uneven at every stage."""
    levels = node_groups(dist.group.WORLD, 2)  # type: ignore[arg-type]
    for nulls in (0, 4):
        layer = Layer(world, [5, 2, 7, 3], 1, torch.float64, nulls)
        check_layer(world, layer, "two_level", levels=levels, rows="agree", chunks=2)


@case("tokens of one byte")
def _one_byte(world: World) -> None:
    """The error stays within half a step of a row's scale; gradients are refused."""
    torch.manual_seed(0)
    layer = Layer(world, [6] * world.size, 4, torch.float32)
    owners = contiguous(EXPERTS, world.size)
    kept = list(owners.experts_of_rank[world.rank])

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up[kept], layer.down[kept], ids, weights)

    def plan(payload: str) -> Plan:
        return Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, payload=payload)  # type: ignore[arg-type]

    own = layer.own
    for name in ("static", "all_to_all"):
        for payload, bound in (("int8", 1 / 254), ("fp8", 1 / 16)):
            dispatcher = make_dispatcher(name, plan(payload))
            values, scale = quantise(layer.x, payload)  # type: ignore[arg-type]
            rounded = restore(values, scale, torch.float32)
            error = (rounded - layer.x).abs() / layer.x.abs().amax(1, keepdim=True)
            assert 0 < float(error.max()) <= bound
            wanted = layer.run(
                rounded, layer.ids, layer.weights, layer.gate_up, layer.down, layer.dy
            )[0]
            given = dispatcher(layer.x[own], layer.ids[own], layer.weights[own], experts)
            near(given, wanted[own], f"{name} {payload}")
            x = layer.x[own].clone().requires_grad_()
            with pytest.raises(ConfigError, match="cannot travel as"):
                dispatcher(x, layer.ids[own], layer.weights[own], experts)


@case("unequal rows are noticed under MOGUL_DEBUG")
def _debug(world: World) -> None:
    layer = Layer(world, ([7, 2] if world.size == 2 else [5, 2, 7, 3]), 4, torch.float64)
    dispatch.DEBUG = True
    try:
        if len(layer.x[layer.own]) == max([7, 2] if world.size == 2 else [5, 2, 7, 3]):
            plan = Plan(
                group=dist.group.WORLD,  # type: ignore[arg-type]
                owners=contiguous(EXPERTS, world.size),
                grouping=layer.grouping,
            )
            assert make_dispatcher("static", plan).rows_of(7, world.device) == 7
        else:
            with pytest.raises(ConfigError, match="another 7, but rows='equal'"):
                check_layer(world, layer, "static")
    finally:
        dispatch.DEBUG = False


@case("capacity drops and counts")
def _drops(world: World) -> None:
    layer = Layer(world, [8] * world.size, 1, torch.float64)
    layer.ids[:] = torch.arange(PICKS)  # all on rank 0
    owners = contiguous(EXPERTS, world.size)
    plan = Plan(group=dist.group.WORLD, owners=owners, grouping=layer.grouping, capacity=0.5)  # type: ignore[arg-type]
    dispatcher = make_dispatcher("all_to_all", plan)
    kept = list(owners.experts_of_rank[world.rank])

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return moe_forward(x, layer.gate_up[kept], layer.down[kept], ids, weights)

    y = dispatcher(layer.x[layer.own], layer.ids[layer.own], layer.weights[layer.own], experts)
    assert int(dispatcher.dropped) == 4  # type: ignore[attr-defined]
    assert (y[4:] == 0).all()
    assert (y[:4] != 0).any()
