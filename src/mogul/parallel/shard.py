"""Spread the experts of any Transformers MoE over ranks, leaving the rest of the model as it is.

The experts module keeps its own experts only and its forward goes through a dispatcher; router,
block and model code stay. Works for every experts module Transformers knows (stacked weights
`[E, ...]`), with any experts implementation. Used alone for data-parallel ranks, and by `layout`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.parallel.dispatch import Dispatcher, Plan, Rows, Wire, make_dispatcher
from mogul.parallel.groups import node_groups
from mogul.parallel.local import local_experts
from mogul.parallel.owners import Owners, contiguous, placed
from mogul.parallel.parcel import Payload
from mogul.parallel.slices import cut_experts
from mogul.spec.grouping import Grouping
from mogul.spec.placement import Placement

DISPATCHER = "_mogul_dispatcher"
"""Attribute of an experts module that has been spread."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertSpread:
    """How experts are spread; the fields of `Plan` that a user chooses."""

    dispatch: str = "auto"
    moe_tp: int = 1
    """Neighbouring ranks that cut each expert; the rest of the group are expert ranks."""
    chunks: int = 1
    rows: Rows = "equal"
    capacity: float | None = None
    placement: Placement | None = None
    payload: Payload = "same"
    wire: Wire | None = None
    node_ranks: int | None = None
    """Ranks of a node, for dispatch="two_level"."""


def experts_of(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every routed experts module of a model, with its name, in order of depth."""
    for name, module in model.named_modules():
        down = getattr(module, "down_proj", None)
        if name.endswith("experts") and isinstance(down, Tensor) and down.ndim == 3:
            yield name, module


def grouping_of(experts: Any, num_experts: int | None = None) -> Grouping:
    """The grouping of the router in front of an experts module, from the model's config.

    `num_experts` is for a module that has been cut already.

    One group unless the router is known to list its picks group by group (mogul's own).
    """
    config = experts.config
    groups = getattr(config, "router_n_groups", 1) or 1
    if config.model_type not in ("moge", "PanguProMoE"):
        groups = 1
    return Grouping(
        num_experts=num_experts or experts.num_experts,
        num_groups=groups,
        top_k=config.num_experts_per_tok,
    )


def spread_experts(
    model: nn.Module, group: dist.ProcessGroup, spread: ExpertSpread | None = None
) -> list[Dispatcher]:
    """Cut every experts module of `model` to this rank's experts and dispatch to the others.

    Works on the meta device too: cut first, then give the parameters memory. Returns the
    dispatchers, one a layer.

    Raises:
        ConfigError: The model has no experts, or they do not fit the ranks.
        BackendError: The dispatch is illegal for the router; the message names what is legal.
    """
    spread = spread or ExpertSpread()
    found = list(experts_of(model))
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no stacked experts to spread", fix="load an MoE model"
        )
    dispatchers = []
    levels = None if spread.node_ranks is None else node_groups(group, spread.node_ranks)
    for name, experts in found:
        if DISPATCHER in experts.__dict__:
            raise ConfigError(f"{name} is spread already", fix="load the model anew")
        owners = _owners(name, experts, group, spread)
        plan = Plan(
            group=group,
            owners=owners,
            grouping=grouping_of(experts),
            chunks=spread.chunks,
            rows=spread.rows,
            capacity=spread.capacity,
            payload=spread.payload,
            wire=spread.wire,
            levels=levels,
        )
        dispatcher = make_dispatcher(spread.dispatch, plan)
        local = owners.experts_of_rank[plan.expert_rank]
        cut_experts(experts, local, group.rank() % spread.moe_tp, spread.moe_tp)
        route_through(experts, dispatcher)
        dispatchers.append(dispatcher)
    if any(d.owners.has_replicas for d in dispatchers):
        model.requires_grad_(False)  # replicas would drift apart
    return dispatchers


def _owners(name: str, experts: Any, group: dist.ProcessGroup, spread: ExpertSpread) -> Owners:
    if group.size() % spread.moe_tp:
        raise ConfigError(f"moe_tp={spread.moe_tp} does not divide {group.size()} ranks")
    ep = group.size() // spread.moe_tp
    if spread.placement is None:
        return contiguous(experts.num_experts, ep, spread.moe_tp)
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers:
        raise ConfigError(f"{name} has no layer number to look up in the placement")
    slots_DS = spread.placement.slots_of(numbers[-1])
    return placed(slots_DS, experts.num_experts, ep, spread.moe_tp)


def route_through(experts: Any, dispatcher: Dispatcher) -> None:
    """Make the forward of a (cut) experts module go through a dispatcher."""
    local_forward = experts.forward

    def forward(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return dispatcher(hidden_states, top_k_index, top_k_weights, local)

    experts.__dict__[DISPATCHER] = dispatcher
    experts.local_forward = local_forward
    local = local_experts(experts)
    experts.forward = forward
