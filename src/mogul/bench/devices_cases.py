"""What `bench devices` runs: the inputs of one experts layer on ranks, and each way to dispatch.

A case is (routing, dispatch, chunks). "grouped" picks group by group, "top-k" over all experts;
"uniform" draws every expert alike, "skewed" by log-normal popularity (sigma 1, as a busy layer of a
real trace). How uneven devices become is a matter of luck, so several draws are averaged; of skewed
ones those at even quantiles of an ungrouped router's rho. All ranks draw the same picks and take
their own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from mogul.bench.kernels import LayerShape
from mogul.kernels import moe_forward
from mogul.parallel import Dispatcher, Plan, World, contiguous, make_dispatcher
from mogul.parallel.dispatch import Wire
from mogul.parallel.local import LocalExperts
from mogul.spec import balance
from mogul.spec.grouping import Grouping

SIGMA = {"uniform": 0.0, "skewed": 1.0}
POPULARITIES, JUDGED_TOKENS = 32, 512
"""Skewed draws to choose from, and how many tokens show the rho of one."""


@dataclass(frozen=True)
class Way:
    """One way to run the layer."""

    router: str
    dispatch: str
    chunks: int = 1
    capacity: float | None = None
    wire: Wire | None = None

    @property
    def name(self) -> str:
        """Such as "grouped static window" or "top-k all_to_all x2"."""
        more = f" x{self.chunks}" if self.chunks > 1 else ""
        fixed = " fixed" if self.capacity else ""
        wire = f" {self.wire}" if self.wire else ""
        return f"{self.router} {self.dispatch}{fixed}{wire}{more}"

    @property
    def fits_a_graph(self) -> bool:
        """Whether no size is read on the host."""
        return self.dispatch != "all_to_all" or self.capacity is not None


@dataclass(frozen=True, eq=False)
class Weights:
    """This rank's experts."""

    gate_up: Tensor
    down: Tensor

    @property
    def run(self) -> LocalExperts:
        """The local experts."""

        def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return moe_forward(x, self.gate_up, self.down, ids, weights)

        return LocalExperts(run, lambda: (self.gate_up, self.down))


def local_weights(world: World, shape: LayerShape, dtype: torch.dtype) -> Weights:
    """Random weights of this rank's contiguous experts, the same however many ranks there are."""
    share = shape.experts // world.size
    gate_up = torch.empty(share, 2 * shape.inner, shape.width, device=world.device, dtype=dtype)
    down = torch.empty(share, shape.width, shape.inner, device=world.device, dtype=dtype)
    for local in range(share):
        seed = world.rank * share + local
        generator = torch.Generator(world.device).manual_seed(seed)
        gate_up[local].normal_(0, 0.02, generator=generator)
        down[local].normal_(0, 0.02, generator=generator)
    return Weights(gate_up, down)


@cache
def seeds_of(shape: LayerShape, routing: str, ranks: int, draws: int) -> tuple[int, ...]:
    """The draws of a routing that are measured."""
    if SIGMA[routing] == 0.0:
        return tuple(range(draws))
    device_E = np.arange(shape.experts) // (shape.experts // ranks)

    def rho(seed: int) -> float:
        ids_TK = draw_picks(shape, 1, routing, JUDGED_TOKENS, seed)
        return balance.rho(balance.rows_per_device(ids_TK, device_E, ranks))

    order = sorted(range(POPULARITIES), key=rho)
    return tuple(order[int((n + 0.5) / draws * POPULARITIES)] for n in range(draws))


@cache
def draw_picks(
    shape: LayerShape, groups: int, routing: str, tokens: int, seed: int = 0
) -> np.ndarray:
    """Picks [T, K] by popularity, without replacement within a group."""
    rng = np.random.default_rng(seed)
    popularity_E = rng.normal(0.0, SIGMA[routing], shape.experts)
    score_TE = popularity_E + rng.gumbel(size=(tokens, shape.experts))
    score_TMJ = score_TE.reshape(tokens, groups, -1)
    share = shape.picks // groups
    place_TMA = np.argsort(-score_TMJ, axis=2)[:, :, :share]
    first_M1 = np.arange(groups)[:, None] * (shape.experts // groups)
    return (place_TMA + first_M1).reshape(tokens, shape.picks)


@dataclass(frozen=True, eq=False)
class Inputs:
    """This rank's tokens of a case, and what is known of the whole batch."""

    x: Tensor
    ids: Tensor
    weights: Tensor
    rho: float
    delta: float
    distinct: int
    all_ids: np.ndarray


def make_inputs(
    world: World,
    shape: LayerShape,
    way: Way,
    routing: str,
    tokens: int,
    dtype: torch.dtype,
    seed: int = 0,
) -> Inputs:
    """Tokens shared evenly; the balance over contiguous devices."""
    groups = shape.groups if way.router == "grouped" else 1
    ids_TK = draw_picks(shape, groups, routing, tokens, seed)
    device_of = np.arange(shape.experts) // (shape.experts // world.size)
    rows_D = balance.rows_per_device(ids_TK, device_of, world.size)
    distinct_D = balance.distinct_per_device(ids_TK, device_of, world.size)
    each = -(-tokens // world.size)
    own = slice(min(world.rank * each, tokens), min((world.rank + 1) * each, tokens))
    generator = torch.Generator(world.device).manual_seed(1)
    x = torch.randn(tokens, shape.width, generator=generator, device=world.device, dtype=dtype)
    ids = torch.as_tensor(ids_TK[own], device=world.device)
    weights = torch.full(ids.shape, 1 / shape.picks, device=world.device)
    return Inputs(
        x[own].clone(),
        ids,
        weights,
        balance.rho(rows_D),
        balance.delta(distinct_D),
        int(distinct_D.sum()),
        ids_TK,
    )


def dispatcher_of(world: World, shape: LayerShape, way: Way, tokens: int) -> Dispatcher:
    """The dispatcher of a way over all ranks."""
    group = dist.group.WORLD
    assert group is not None
    grouping = Grouping(
        num_experts=shape.experts,
        num_groups=shape.groups if way.router == "grouped" else 1,
        top_k=shape.picks,
    )
    plan = Plan(
        group=group,
        owners=contiguous(shape.experts, world.size),
        grouping=grouping,
        chunks=way.chunks,
        rows=-(-tokens // world.size),
        capacity=way.capacity,
        wire=way.wire,
    )
    return make_dispatcher(way.dispatch, plan)


def sent_bytes(inputs: Inputs, way: Way, ranks: int, shape: LayerShape, element: int) -> int:
    """Bytes that the busiest rank sends in one forward, picks and weights included."""
    tokens, picks = inputs.all_ids.shape
    each = -(-tokens // ranks)
    there, back = shape.width * element + 8 * picks, shape.width * element
    if way.dispatch != "all_to_all" or way.capacity is not None:
        return (ranks - 1) * each * (there + back)
    device_TK = inputs.all_ids // (shape.experts // ranks)
    most = 0
    for rank in range(ranks):
        own = device_TK[rank * each : (rank + 1) * each]
        goes = sum(int((own == d).any(1).sum()) for d in range(ranks) if d != rank)
        rest = np.delete(device_TK, np.s_[rank * each : (rank + 1) * each], axis=0)
        comes = int((rest == rank).any(1).sum())
        most = max(most, goes * there + comes * back)
    return most
