"""From a trace to a placement: chooses the method, keeps the rules, predicts rho and delta.

A MoGE goes on its devices in whole groups (rho is 1 by construction; the map of groups to devices
evens the distinct experts), or is refused. Everything else is solved layer by layer, and is never
worse than the contiguous placement.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mogul.core.errors import ConfigError, nearest
from mogul.core.log import progress
from mogul.core.units import show_bytes
from mogul.place import ilp
from mogul.place.coactivation import gather
from mogul.place.greedy import greedy
from mogul.place.nodes import by_node
from mogul.place.predict import balance_of, draw_counts
from mogul.place.problem import Problem, contiguous, device_load, lower_bound
from mogul.place.search import solve_for_load
from mogul.spec.placement import LayerPlacement, Placement
from mogul.spec.trace import ModelStamp, Trace

METHODS = ("auto", "contiguous", "greedy", "swap", "coactivation", "ilp")
_DRAWS = 32
MOST_BATCH = 65_536
"""Tokens of a batch that delta is predicted for: all draws stand in memory at once."""
MOST_DEVICES = 4096


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the user asks of a placement."""

    num_devices: int
    slots: int | None = None
    """Slots on every device; None: as few as hold the experts and the replicas."""

    replicas: int = 0
    """Slots a layer beyond one an expert."""

    num_nodes: int = 1
    method: str = "auto"
    allow_imbalance: bool = False
    """Place a MoGE expert by expert although that gives up its balance by construction."""

    batch_tokens: int = 64
    """Tokens of the batches for which delta is predicted."""

    memory_bytes: int | None = None
    """What a device may spend on experts, all layers together."""

    gap: float = 1e-3
    limit_s: float = 2.0
    """Time of the solver in one layer, where it is needed."""


def place(trace: Trace, wish: Wish) -> Placement:
    """Place the experts of every layer of a trace.

    Raises:
        ConfigError: Devices, slots, memory or groups that cannot be, with what can.
        BackendError: Method `ilp` without HiGHS.
    """
    model = trace.meta.model
    if wish.method not in METHODS:
        raise ConfigError(f"unknown method {wish.method!r}", fix=nearest(wish.method, METHODS))
    if wish.num_nodes < 1 or not 1 <= wish.batch_tokens <= MOST_BATCH:
        raise ConfigError(
            f"{wish.num_nodes} nodes and batches of {wish.batch_tokens} tokens cannot be",
            fix=f"give at least one node, and 1 to {MOST_BATCH:,} tokens",
        )
    if trace.meta.num_tokens == 0:
        raise ConfigError("the trace holds no tokens", fix="trace some data first")
    by_groups = model.num_groups > 1 and not wish.allow_imbalance
    if by_groups:
        _check_groups(model, wish)
    slots = _slots(model, wish, num_layers=len(trace.meta.layers))
    layers = []
    with progress("placing experts", total=len(trace.meta.layers)) as bar:
        for index, layer in enumerate(trace.meta.layers):
            counts_NE = _batches(trace, index, wish.batch_tokens)
            problem = _problem(trace, index, wish, slots)
            if by_groups:
                slots_DS, method = _whole_groups(model, problem, counts_NE), "groups"
            else:
                slots_DS, method = _solve(problem, wish)
            layers.append(_describe(layer, slots_DS, method, problem, counts_NE, wish))
            bar.advance(1, f"layer {layer}")
    return Placement(
        model=model,
        num_devices=wish.num_devices,
        slots_per_device=slots,
        num_nodes=wish.num_nodes,
        method="groups" if by_groups else wish.method,
        batch_tokens=wish.batch_tokens,
        layers=tuple(layers),
    )


def _check_groups(model: ModelStamp, wish: Wish) -> None:
    model.grouping.check_devices(wish.num_devices)
    asked = wish.method not in ("auto", "contiguous")
    if asked or wish.replicas or wish.slots not in (None, model.num_experts // wish.num_devices):
        raise ConfigError(
            f"a model with {model.num_groups} groups stands on {wish.num_devices} devices in "
            "whole groups, balanced by construction; replicas, spare slots and method "
            f"{wish.method!r} would only take that away",
            fix="leave them out, or pass --allow-imbalance",
        )


def _slots(model: ModelStamp, wish: Wish, *, num_layers: int) -> int:
    wanted = model.num_experts + wish.replicas
    useful = model.num_experts * (wish.num_devices - 1)  # every expert on every device
    if not 1 <= wish.num_devices <= MOST_DEVICES or not 0 <= wish.replicas <= useful:
        raise ConfigError(
            f"{wish.num_devices} devices and {wish.replicas} replicas of {model.num_experts} "
            "experts cannot be",
            fix=f"give 1 to {MOST_DEVICES:,} devices, and no more replicas than put every expert "
            "on every device",
        )
    slots = wish.slots if wish.slots is not None else -(-wanted // wish.num_devices)
    if slots * wish.num_devices < wanted:
        raise ConfigError(
            f"{wish.num_devices} devices with {slots} slots cannot hold {wanted} experts and "
            "replicas of a layer",
            fix=f"use at least {-(-wanted // wish.num_devices)} slots a device",
        )
    if slots > model.num_experts:
        raise ConfigError(
            f"{slots} slots a device are more than the {model.num_experts} experts of a layer",
            fix="leave out --slots",
        )
    needed_bytes = slots * model.expert_bytes * num_layers
    if wish.memory_bytes is not None and needed_bytes > wish.memory_bytes:
        fit = wish.memory_bytes // max(1, model.expert_bytes * num_layers)
        raise ConfigError(
            f"{slots} slots in {num_layers} layers need {show_bytes(needed_bytes)} on every "
            f"device, more than {show_bytes(wish.memory_bytes)}",
            fix=f"use at least {-(-wanted // fit)} devices" if fit else "allow more memory",
        )
    return slots


def _batches(trace: Trace, index: int, batch_tokens: int) -> np.ndarray | None:
    ids = trace.arrays.get("sample_ids")
    if ids is None or len(ids) == 0:
        return None
    experts = trace.meta.model.num_experts
    return draw_counts(
        ids[:, index].astype(np.int64), experts, batch_tokens=batch_tokens, draws=_DRAWS, seed=index
    )


def _problem(trace: Trace, index: int, wish: Wish, slots: int) -> Problem:
    model = trace.meta.model
    coactivation = trace.arrays.get("coactivation")
    return Problem(
        load_E=trace.count[index].astype(np.float64) if trace.count[index].any() else
        np.ones(model.num_experts),
        num_devices=wish.num_devices,
        slots=slots,
        num_nodes=wish.num_nodes,
        coactivation_EE=None if coactivation is None else coactivation[index],
        node_groups=model.limit_num_groups if wish.num_nodes > 1 else 1,
    )  # fmt: skip


def _whole_groups(model: ModelStamp, problem: Problem, counts_NE: np.ndarray | None) -> np.ndarray:
    """Groups to devices so that small batches touch as even a number of experts as possible."""
    groups, devices = model.num_groups, problem.num_devices
    expert_MJ = np.arange(model.num_experts).reshape(groups, -1)
    order = np.arange(groups).reshape(devices, -1)
    if counts_NE is not None and devices < groups:
        touched_M = (counts_NE > 0).reshape(len(counts_NE), groups, -1).sum(-1).mean(0)
        order = _kept_if_better(order, touched_M, Problem(touched_M, devices, groups // devices))
    return expert_MJ[order].reshape(devices, -1)


def _kept_if_better(order: np.ndarray, load_M: np.ndarray, problem: Problem) -> np.ndarray:
    found = np.sort(solve_for_load(problem), axis=1)
    is_better = device_load(found, load_M).max() < device_load(order, load_M).max() * (1 - 1e-9)
    return found if is_better else order


def _solve(problem: Problem, wish: Wish) -> tuple[np.ndarray, str]:
    plain = contiguous(problem)
    method = "swap" if wish.method == "auto" else wish.method
    if method == "contiguous":
        return plain, method
    if problem.num_nodes > 1:
        found = by_node(problem)
    elif method == "greedy":
        found = greedy(problem)
    else:
        found = solve_for_load(problem, gap=wish.gap)
    if method == "coactivation":
        found = gather(found, problem)
    elif method == "ilp":
        found = ilp.certify(found, problem, gap=wish.gap, limit_s=wish.limit_s).slots_DS
    top, plain_top = (float(device_load(s, problem.load_E).max()) for s in (found, plain))
    return (found, method) if top <= plain_top else (plain, "contiguous")


def _describe(
    layer: int,
    slots_DS: np.ndarray,
    method: str,
    problem: Problem,
    counts_NE: np.ndarray | None,
    wish: Wish,
) -> LayerPlacement:
    mean = float(problem.load_E.sum()) / problem.num_devices
    rho = float(device_load(slots_DS, problem.load_E).max()) / mean
    bound = min(lower_bound(problem) / mean, rho)
    plain = contiguous(problem)
    delta = delta_before = None
    if counts_NE is not None:
        delta, delta_before = (
            balance_of(counts_NE, one, batch_tokens=wish.batch_tokens).delta
            for one in (slots_DS, plain)
        )
    return LayerPlacement(
        layer=layer,
        expert_of_slot=tuple(slots_DS.ravel().tolist()),
        method=method,
        rho=rho,
        rho_before=float(device_load(plain, problem.load_E).max()) / mean,
        rho_bound=bound,
        gap=rho / bound - 1,
        delta=delta,
        delta_before=delta_before,
    )
