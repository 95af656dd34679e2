"""One training step: arithmetic, launches, bubbles, exchanges, optimizer.

What a micro-batch costs the busiest stage is decided in `train_device.py`, what copies and stages
send in `train_traffic.py`, memory in `train_memory.py`. With m micro-batches a step:

    step = m * (max(device, host) + hops) * (1 + bubble) + gradients + optimizer
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mogul.simulate import train_device, train_traffic
from mogul.simulate.calibration import Calibration
from mogul.simulate.memory import Memory
from mogul.simulate.routing import LayerLoad, Routing
from mogul.simulate.train_memory import with_recompute
from mogul.simulate.train_plan import TrainPlan, flop_per_token
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme


@dataclass(frozen=True)
class TrainPrediction:
    """A training step, taken apart."""

    step_s: float
    parts: dict[str, float]
    """Seconds by part; hidden exchanges are not taken off."""

    bubble: float
    """Share of the step no micro-batch fills."""

    model_flop: float
    """Of the whole step, over all devices."""

    memory: Memory
    tokens: int
    plan: TrainPlan
    """The plan with its recomputation settled."""

    peak_flop_per_s: float
    loads: tuple[tuple[int, LayerLoad], ...] = field(default_factory=tuple)

    @property
    def flop_per_s_per_device(self) -> float:
        """Model FLOP/s a device."""
        return self.model_flop / self.step_s / self.plan.devices

    @property
    def mfu(self) -> float:
        """Of the device's peak."""
        return self.flop_per_s_per_device / self.peak_flop_per_s

    @property
    def tokens_per_s_per_device(self) -> float:
        """Training tokens a device."""
        return self.tokens / self.step_s / self.plan.devices

    def days(self, total_tokens: float) -> float:
        """Days to train on `total_tokens`."""
        return total_tokens / (self.tokens / self.step_s) / 86400


def predict_training(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    *,
    quant: QuantScheme | None = None,
    routing: Routing | None = None,
    calibration: Calibration | None = None,
) -> TrainPrediction:
    """Price one training step.

    Raises:
        ConfigError: a layout or batch that does not divide.
    """
    quant, routing = quant or QuantScheme(), routing or Routing()
    parallel.check(model)
    micro_batches = plan.micro_batches(parallel)
    work = train_device.price(model, device, parallel, plan, quant, routing, calibration)
    plan, memory = with_recompute(model, device, parallel, plan, work.loads)
    micro = train_device.micro_batch(work, plan)
    hops_s = train_traffic.hops_s(model, device, parallel, plan)
    busy_s = micro_batches * (micro.seconds + hops_s)
    bubble = plan.bubble(parallel)
    traffic_s = train_traffic.gradients_s(model, device, parallel, plan)
    exposed_s = train_traffic.exposed_s(traffic_s, busy_s, micro_batches, plan)
    optimizer_s = train_traffic.optimizer_s(model, device, parallel, plan)
    parts = {name: micro_batches * s for name, s in micro.parts.items()}
    parts |= {"hops": micro_batches * hops_s, "bubble": busy_s * bubble}
    parts |= {"gradients": exposed_s, "optimizer": optimizer_s}
    tokens = plan.global_batch * plan.sequence_tokens
    return TrainPrediction(
        step_s=busy_s * (1 + bubble) + exposed_s + optimizer_s,
        parts=parts,
        bubble=bubble / (1 + bubble),
        model_flop=tokens * flop_per_token(model, plan.sequence_tokens, plan.mtp_layers),
        memory=memory,
        tokens=tokens,
        plan=plan,
        peak_flop_per_s=device.peak(quant.arithmetic(quant.weights)),
        loads=tuple(work.loads),
    )
