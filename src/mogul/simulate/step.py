"""The time of one step: kernels, collectives, overlap, launches, and what limits it."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

from mogul.simulate import curves, physics
from mogul.simulate.calibration import Calibration
from mogul.simulate.collectives import CollectiveTables, collective, point_to_point_s
from mogul.simulate.estimate import Estimate
from mogul.simulate.operators import Layout, Operator, Step, step_operators
from mogul.simulate.routing import LayerLoad, Routing
from mogul.spec.hardware import Hardware
from mogul.spec.quant import ARITHMETIC

ENGINE_SIGMA = 0.2
"""What a step leaves unexplained even where every kernel was measured: 79 % of the fitting fifth of
the measured deployments lie within p10 and p90 (`validate/silicon.py`; 81 % of the others)."""


@dataclass(frozen=True)
class OperatorTime:
    """What one operator takes in a step."""

    operator: Operator
    estimate: Estimate
    limit: str
    """memory | arithmetic | launches | communication."""

    @property
    def seconds(self) -> float:
        """All of its calls."""
        return self.operator.count * self.estimate.seconds


@dataclass(frozen=True)
class StepTime:
    """A step, taken apart."""

    seconds: float
    sigma: float
    operators: tuple[OperatorTime, ...]
    loads: tuple[tuple[int, LayerLoad], ...]
    host_s: float = 0.0

    def parts(self) -> dict[str, float]:
        """Seconds by part of the model; overlap is not taken off."""
        found: defaultdict[str, float] = defaultdict(float)
        for one in self.operators:
            found[one.operator.part] += one.seconds
        if self.host_s:
            found["host"] += self.host_s
        return dict(found)

    def limits(self) -> dict[str, float]:
        """Seconds by what limits them."""
        found: defaultdict[str, float] = defaultdict(float)
        for one in self.operators:
            found[one.limit] += one.seconds
        if self.host_s:
            found["host"] += self.host_s
        return dict(found)

    @property
    def binding(self) -> str:
        """The limit most of the time goes to."""
        limits = self.limits()
        return max(limits, key=lambda name: limits[name])


@dataclass
class StepModel:
    """Prices steps of one deployment on one device; equal steps are priced once."""

    layout: Layout
    device: Hardware
    routing: Routing
    calibration: Calibration
    collectives: CollectiveTables | None = None
    _known: dict[Step, StepTime] = field(default_factory=dict, repr=False)

    def time(self, step: Step) -> StepTime:
        """Time of a step of one pipeline stage after another."""
        if (known := self._known.get(step)) is None:
            known = self._known[step] = self._time(step)
        return known

    def _time(self, step: Step) -> StepTime:
        operators, loads = step_operators(self.layout, step, self.routing)
        priced = tuple(self.price(one) for one in operators)
        engine = self.layout.engine
        exchange_s = sum(p.seconds for p in priced if _is_exchange(p.operator))
        arithmetic_s = sum(p.seconds for p in priced) - exchange_s
        seconds = engine.overlap.seconds(arithmetic_s, exchange_s)
        host_s = engine.step_host_s
        if not engine.has_graphs:
            launches = sum(p.operator.count for p in priced) * self.device.launch_s
            host_s += max(0.0, launches - seconds)
        stages = self.layout.parallel.pp
        hop_s = self._hop_s(step) if stages > 1 else 0.0
        whole = engine.scale * (stages * seconds + (stages - 1) * hop_s + host_s)
        return StepTime(whole, _sigma(priced, seconds), priced, tuple(loads), host_s)

    def _hop_s(self, step: Step) -> float:
        num_bytes = step.tokens * self.layout.model.hidden_size * 2.0
        is_far = self.layout.parallel.stage_devices >= self.device.link_devices
        return point_to_point_s(num_bytes, self.device, is_far=is_far)

    def price(self, one: Operator) -> OperatorTime:
        """Time of one operator."""
        if one.part == "collectives":
            ranks, num_bytes = int(one.dims["ranks"]), one.dims["num_bytes"]
            far = one.dims.get("far_bytes")
            estimate = collective(one.kind, ranks, num_bytes, self.device, self.collectives, far)
            return OperatorTime(one, estimate, "communication")
        estimate = self.calibration.estimate(one.kind, one.dims, self.device, one.dtype)
        return OperatorTime(one, estimate, _limit(one, estimate, self.device))


def _is_exchange(one: Operator) -> bool:
    return one.part == "collectives"


def _limit(one: Operator, estimate: Estimate, device: Hardware) -> str:
    """What most of an operator's time goes to, at the efficiencies its curve knows."""
    demand = physics.demand(one.kind, one.dims)
    curve = curves.curve(device.architecture, one.kind, one.dtype)
    if curve.floor_s > 0.5 * estimate.seconds:
        return "launches"
    memory_s = float(demand.moved_bytes) / (curve.memory * device.memory_bytes_per_s)
    peak = device.peak(ARITHMETIC.get(one.dtype, one.dtype))
    return "memory" if memory_s >= float(demand.flop) / (curve.compute * peak) else "arithmetic"


def _sigma(priced: tuple[OperatorTime, ...], seconds: float) -> float:
    """Errors of one kind go together, those of different kinds do not."""
    by_kind: defaultdict[str, float] = defaultdict(float)
    for one in priced:
        by_kind[one.operator.kind] += one.seconds * one.estimate.sigma
    total = math.sqrt(sum(value**2 for value in by_kind.values())) / max(seconds, 1e-12)
    return math.hypot(total, ENGINE_SIGMA)
