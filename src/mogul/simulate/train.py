"""The time and memory of one training step: arithmetic, bubbles, exchanges, optimizer.

A micro-batch's forward is priced like a prompt whose every token has logits; the backward takes
twice the products and 2.5 times the attention. With p stages, v virtual stages a device and m
micro-batches a step:

    step = m * (forward + backward) * (1 + (p - 1) / (m * v)) + gradients + optimizer

Model FLOP are 6 a parameter a token that uses it, plus attention; recomputation is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pydantic import Field

from mogul.core.errors import ConfigError
from mogul.simulate.calibration import Calibration, many_rows_s, shipped
from mogul.simulate.collectives import collective
from mogul.simulate.engines import Engine, Overlap
from mogul.simulate.memory import RUNTIME_BYTES, Memory, weight_bytes
from mogul.simulate.operators import Layout, Operator, Step, step_operators
from mogul.simulate.routing import LayerLoad, Routing
from mogul.simulate.step import OperatorTime, StepModel
from mogul.spec.base import Spec
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme

BACKWARD = {"gemm": 2.0, "moe": 2.0, "attention_prefill": 2.5, "elementwise": 2.0}
"""Backward over forward; collectives go once more."""

OPTIMIZER_BYTES = 28.0
"""Read and written a parameter by Adam: 4 moments, master weight twice, gradient, weight."""


class TrainPlan(Spec):
    """One training step's batch and switches."""

    sequence_tokens: int = Field(default=4096, ge=1)
    global_batch: int = Field(default=2048, ge=1)
    """Sequences a step, over all devices."""

    micro_batch: int = Field(default=1, ge=1)
    """Sequences a data-parallel copy computes at once."""

    devices: int = Field(default=8, ge=1)
    virtual_stages: int = Field(default=1, ge=1)
    recompute: Literal["auto", "none", "experts", "full"] = "auto"
    """What the backward computes again: nothing, experts' inner activations, all of a layer;
    auto: the least of these that fits the memory."""

    scale: float = Field(default=1.0, gt=0)
    """Measured over predicted time of a framework's arithmetic: the constant one may fit."""

    shards_weights: bool = False
    """Weights are gathered layer by layer (FSDP) instead of held by every copy."""

    is_balanced: bool = False
    """Rows are forced to be even, whatever the router says (a benchmark's switch)."""

    overlap: Overlap = Overlap()


@dataclass(frozen=True)
class TrainPrediction:
    """A training step, taken apart."""

    step_s: float
    parts: dict[str, float]
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
    copies = _copies(parallel, plan)
    micro_batches = plan.global_batch // (copies * plan.micro_batch)
    forward, loads = _forward(model, device, parallel, plan, quant, routing, calibration)
    plan, memory = _with_recompute(model, device, parallel, plan, copies, loads)
    bubble = (parallel.pp - 1) / (micro_batches * plan.virtual_stages)
    hops_s = 2 * _hop_s(model, device, parallel, plan)
    reduce_s = _gradient_s(model, device, parallel, plan, copies, micro_batches)
    local = sum(weight_bytes(model, parallel, QuantScheme()).values()) / 2
    optimizer_s = local * OPTIMIZER_BYTES / copies / (0.8 * device.memory_bytes_per_s)
    busy_s = micro_batches * (_micro_batch_s(forward, plan) + hops_s)
    parts = {name: micro_batches * s for name, s in _parts(forward, plan).items()}
    parts |= {"bubble": busy_s * bubble, "gradients": reduce_s, "optimizer": optimizer_s}
    tokens = plan.global_batch * plan.sequence_tokens
    return TrainPrediction(
        step_s=busy_s * (1 + bubble) + reduce_s + optimizer_s,
        parts=parts,
        bubble=bubble / (1 + bubble),
        model_flop=tokens * flop_per_token(model, plan.sequence_tokens),
        memory=memory,
        tokens=tokens,
        plan=plan,
        peak_flop_per_s=device.peak(quant.arithmetic(quant.weights)),
        loads=tuple(loads),
    )


def _with_recompute(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    copies: int,
    loads: list[tuple[int, LayerLoad]],
) -> tuple[TrainPlan, Memory]:
    """Settle what is recomputed, and the memory that leaves."""

    def settled(kind: str) -> tuple[TrainPlan, Memory]:
        chosen = plan.replace(recompute=kind)
        return chosen, training_memory(model, device, parallel, chosen, copies, loads)

    if plan.recompute != "auto":
        return settled(plan.recompute)
    tried = [settled(kind) for kind in ("none", "experts", "full")]
    return next((one for one in tried if one[1].fits), tried[-1])


def flop_per_token(model: ModelSpec, sequence_tokens: int) -> float:
    """Forward and backward: 6 a parameter, and causal attention."""
    shape = model.attention
    widths = shape.num_heads * (shape.key_dim + shape.value_dim)
    attention = 3 * 2 * model.num_layers * widths * sequence_tokens / 2
    return 6.0 * model.active_params(input_embedding=False) + attention


def _copies(parallel: Parallel, plan: TrainPlan) -> int:
    """Data-parallel copies of the attention over all devices."""
    if plan.devices % (parallel.devices):
        raise ConfigError(
            f"{plan.devices} devices cannot hold whole copies of {parallel.describe()} "
            f"({parallel.devices} devices)",
            fix=f"use a multiple of {parallel.devices} devices",
        )
    copies = plan.devices // (parallel.tp * parallel.pp)
    if plan.global_batch % (copies * plan.micro_batch):
        raise ConfigError(
            f"a batch of {plan.global_batch} sequences does not divide into {copies} copies x "
            f"{plan.micro_batch} sequences",
            fix=f"use a multiple of {copies * plan.micro_batch}",
        )
    return copies


def _forward(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    quant: QuantScheme,
    routing: Routing,
    calibration: Calibration | None,
) -> tuple[list[OperatorTime], list[tuple[int, LayerLoad]]]:
    engine = Engine(name="training", exchange="all_to_all", small_kernels=4.0)
    layout = Layout(model, parallel, quant, engine, device.link_devices)
    steps = StepModel(layout, device, routing, calibration or shipped())
    step = Step(plan.micro_batch, plan.sequence_tokens, 0.0, is_prefill=True, has_all_logits=True)
    operators, loads = step_operators(layout, step, routing)
    if plan.is_balanced:
        operators = [_evened(one, loads) for one in operators]
    operators += _permutes(layout, step, loads)
    # The stage with the head holds fewer layers: its work counts like any other's.
    operators = [_shared_head(one, parallel.pp) for one in operators]
    return [_grouped(steps.price(one), device) for one in operators], loads


def _evened(one: Operator, loads: list[tuple[int, LayerLoad]]) -> Operator:
    """The same operator with the mean rank's rows."""
    if one.part not in ("experts", "collectives") or not loads:
        return one
    rho = loads[0][1].rho
    names = ("rows",) if one.kind == "moe" else ("num_bytes", "far_bytes")
    if one.kind not in ("moe", "all_to_all"):
        return one
    dims = {key: value / rho if key in names else value for key, value in one.dims.items()}
    return Operator(one.name, one.part, one.kind, dims, one.count, one.dtype)


def _grouped(one: OperatorTime, device: Hardware) -> OperatorTime:
    """Experts with many rows run at the speed of a plain product, whoever's kernel it is."""
    if one.operator.kind != "moe":
        return one
    plain_s = many_rows_s(one.operator.dims, device, one.operator.dtype)
    return replace(one, estimate=replace(one.estimate, seconds=min(one.estimate.seconds, plain_s)))


def _shared_head(one: Operator, stages: int) -> Operator:
    count = one.count / stages if one.part == "head" else one.count
    return Operator(one.name, one.part, one.kind, one.dims, count, one.dtype)


def _permutes(layout: Layout, step: Step, loads: list[tuple[int, LayerLoad]]) -> list[Operator]:
    """Rows are sorted by expert, and back, by kernels of their own in training."""
    found = []
    for count, load in loads:
        dims = {"moved_bytes": load.max_rows * layout.model.hidden_size * 4.0}
        layers = count / layout.parallel.pp
        found.append(Operator("permute", "experts", "elementwise", dims, 2 * layers))
    return found


def _backward_factor(one: OperatorTime, plan: TrainPlan) -> float:
    factor = 1.0 + BACKWARD.get(one.operator.kind, 1.0)
    again = plan.recompute == "full" or (
        plan.recompute == "experts" and one.operator.part == "experts"
    )
    return factor + (1.0 if again else 0.0)


def _parts(forward: list[OperatorTime], plan: TrainPlan) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in forward:
        scale = 1.0 if one.operator.part == "collectives" else plan.scale
        seconds = scale * one.seconds * _backward_factor(one, plan)
        found[one.operator.part] = found.get(one.operator.part, 0.0) + seconds
    return found


def _micro_batch_s(forward: list[OperatorTime], plan: TrainPlan) -> float:
    parts = _parts(forward, plan)
    exchange_s = parts.pop("collectives", 0.0)
    return plan.overlap.seconds(sum(parts.values()), exchange_s)


def _hop_s(model: ModelSpec, device: Hardware, parallel: Parallel, plan: TrainPlan) -> float:
    """Activations to the next stage; hidden but for its start-up where stages interleave."""
    if parallel.pp == 1:
        return 0.0
    rows = plan.micro_batch * plan.sequence_tokens / parallel.tp
    network = device.network_bytes_per_s or device.link_bytes_per_s
    return device.network_latency_s + rows * model.hidden_size * 2.0 / network


def _gradient_s(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    copies: int,
    micro_batches: int,
) -> float:
    """Reduce gradients and gather weights over the copies; half of it hides in the backward."""
    weights = weight_bytes(model, parallel, QuantScheme())
    experts = weights.pop("experts", 0.0)
    expert_copies = max(1, plan.devices // (parallel.pp * parallel.stage_devices))
    seconds = 0.0
    for num_bytes, ranks in ((sum(weights.values()), copies), (experts, expert_copies)):
        for name, factor in (("reduce_scatter", 1.0), ("all_gather", 1.0)):
            passes = micro_batches * 2 if plan.shards_weights and name == "all_gather" else 1
            one = collective(name, ranks, num_bytes * factor, device)
            seconds += one.seconds * passes
    return seconds * 0.5


def training_memory(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    copies: int,
    loads: list[tuple[int, LayerLoad]],
) -> Memory:
    """Weights, gradients, optimizer state and kept activations of the fullest device.

    Optimizer state is spread over the copies (6 + 12 / copies bytes a parameter), experts over
    their own. Kept a layer: about 34 bytes a token and hidden unit over tp, and for each row of
    an expert its input and three inner activations.
    """
    weights = weight_bytes(model, parallel, QuantScheme())
    experts = weights.pop("experts", 0.0) / 2
    plain = sum(weights.values()) / 2
    expert_copies = max(1, plan.devices // (parallel.pp * parallel.stage_devices))
    held = 6.0 / copies if plan.shards_weights else 6.0
    tokens = plan.micro_batch * plan.sequence_tokens
    layers = model.num_layers / parallel.pp
    rows = max((load.max_rows for _, load in loads), default=0.0)
    width = model.moe.expert_width / parallel.expert_tp if model.moe else 0
    kept = tokens * model.hidden_size * (34 if plan.recompute != "full" else 2) / parallel.tp
    inner = rows * (model.hidden_size * 2 + 3 * width * 2.0) if plan.recompute == "none" else 0.0
    in_flight = min(parallel.pp, plan.global_batch) * (1 + 1 / max(1, plan.virtual_stages))
    flying = in_flight if parallel.pp > 1 else 1
    parts = {
        "weights and gradients": held * (plain + experts),
        "optimizer": 12.0 * (plain / copies + experts / expert_copies),
        "activations": layers * (kept + inner) * flying,
        "logits": tokens * model.vocab_size / parallel.tp * 6.0,
        "runtime": RUNTIME_BYTES,
    }
    return Memory(parts, 0.95 * device.memory_bytes)
