"""What one micro-batch costs the busiest stage: kernels forward and backward, and the host.

A micro-batch's forward is priced like a prompt whose every token has logits; the backward takes
twice the products and 2.5 times the attention. What training adds to serving: tokens are cut over
tp between the products (sequence parallel), rows are sorted by kernels of their own, 8-bit
products quantise both operands, a framework without graphs launches every kernel from the host.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mogul.simulate.calibration import Calibration, many_rows_s, shipped
from mogul.simulate.engines import Engine
from mogul.simulate.operators import Layout, Operator, Step, step_operators
from mogul.simulate.routing import LayerLoad, Routing
from mogul.simulate.step import OperatorTime, StepModel
from mogul.simulate.train_plan import TrainPlan, stage_layers
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme

BACKWARD = {
    "gemm": 2.0,
    "moe": 2.0,
    "attention_prefill": 2.5,
    "elementwise": 2.0,
    "all_reduce": 1.5,
}
"""Backward over forward. A sequence-parallel sum is a gather and a scatter, and the backward
gathers the input once more for the weights' gradients; other collectives go once more."""

SMALL_KERNELS = 4.0
"""Kernels a layer besides norms and products: rotations, head norms, residual."""

LATENT = ("query up", "latent up")
"""Products that selective recomputation does again: cheap, and large in memory (DeepSeek-V3)."""

HOST_KERNELS = {
    "attention": 18,
    "latent": 6,
    "router": 31,
    "router, one library": 17,
    "dispatch": 8,
    "activation": 2,
    "shared": 4,
    "8-bit operand": 2,
}
"""Forward kernels of a layer, by part. The router's and its preparation's are Megatron's own
count (72, with fusion 31, with DeepEP 17: its guide to DeepSeek-V3 on GB200); the others are
counted from the layer's equations; an 8-bit operand is quantised and its scales are swizzled."""

HOST_S = 47e-6
"""Host time a kernel, forward or backward, with all that an eager framework does around it. That
guide's baseline (494 TFLOP/s, pp8, "the CPU cannot keep up with the GPU") takes 34.0 ms a layer
and micro-batch for 3 x 241 kernels: the counts above with 72 for the router and five kernels an
8-bit operand, as its text says. The run is none of those `validate` scores."""


AGAIN = {"none": 0.0, "selective": 0.15, "experts": 0.6, "full": 1.0}
"""Share of a layer's kernels the backward launches again."""


@dataclass(frozen=True)
class Work:
    """One layer's forward, priced, and what stands beside the layers."""

    operators: tuple[OperatorTime, ...]
    loads: list[tuple[int, LayerLoad]]
    host_layer_s: float
    """Host time of a layer's forward."""

    stages: int
    layers: tuple[float, float]
    """Of the fullest stage, and of the last, which has the head."""


@dataclass(frozen=True)
class MicroBatch:
    """Time of a micro-batch on the busiest stage, forward and backward."""

    seconds: float
    parts: dict[str, float]


def price(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
    quant: QuantScheme,
    routing: Routing,
    calibration: Calibration | None,
) -> Work:
    """Price a forward; layers' operators are counted once a layer."""
    engine = Engine(
        name="training",
        exchange="all_to_all",
        small_kernels=SMALL_KERNELS,
        sends_once=plan.sends_once,
    )
    layout = Layout(model, parallel, quant, engine, device.link_devices)
    steps = StepModel(layout, device, routing, calibration or shipped())
    operators, loads = step_operators(layout, _step(plan), routing)
    if plan.is_balanced:
        operators = [_evened(one, loads) for one in operators]
        loads = [
            (count, replace(load, max_rows=float(load.rows_D.mean()))) for count, load in loads
        ]
    operators = [_sequence_parallel(one, parallel.tp) for one in operators]
    operators += [*_permutes(layout, loads), *_quantised(operators), *_further(layout, plan)]
    total = model.num_layers + plan.mtp_layers
    scaled = [_a_layer(one, model.num_layers / parallel.pp, plan) for one in operators]
    return Work(
        tuple(_grouped(steps.price(one), device) for one in scaled),
        loads,
        host_kernels(model, parallel, plan, quant) * HOST_S,
        parallel.pp,
        stage_layers(total, parallel, plan.virtual_stages),
    )


def _step(plan: TrainPlan) -> Step:
    """A sequence cut over ranks in two stripes each: all have the mean's pairs of tokens."""
    tokens = plan.sequence_tokens // plan.context_parallel
    prior = (plan.sequence_tokens - tokens) / 2
    return Step(plan.micro_batch, tokens, prior, is_prefill=True, has_all_logits=True)


def _changed(one: Operator, dims: dict[str, float], count: float) -> Operator:
    return Operator(one.name, one.part, one.kind, dims, count, one.dtype)


def _a_layer(one: Operator, layers: float, plan: TrainPlan) -> Operator:
    """Counts of one layer; the head's of one stage, once more for each further token."""
    count = one.count * (1 + plan.mtp_layers) if one.part == "head" else one.count / layers
    return _changed(one, one.dims, count)


def _evened(one: Operator, loads: list[tuple[int, LayerLoad]]) -> Operator:
    """The same operator with the mean rank's rows."""
    if one.kind not in ("moe", "all_to_all") or not loads:
        return one
    rho = loads[0][1].rho
    names = ("rows",) if one.kind == "moe" else ("num_bytes", "far_bytes")
    dims = {key: value / rho if key in names else value for key, value in one.dims.items()}
    return _changed(one, dims, one.count)


def _sequence_parallel(one: Operator, tp: int) -> Operator:
    """Between the products a rank has its share of the tokens."""
    is_router = one.part == "router" and one.kind == "gemm"
    if tp == 1 or not (is_router or one.name in ("norms", "top-k")):
        return one
    name = "m" if is_router else "moved_bytes"
    return _changed(one, one.dims | {name: one.dims[name] / tp}, one.count)


def _permutes(layout: Layout, loads: list[tuple[int, LayerLoad]]) -> list[Operator]:
    """Rows are sorted by expert, and back; plain NCCL needs it on both sides of the network."""
    found = []
    times = 2 if layout.engine.sends_once else 4
    for count, load in loads:
        dims = {"moved_bytes": load.max_rows * layout.model.hidden_size * 4.0}
        layers = count / layout.parallel.pp
        found.append(Operator("permute", "experts", "elementwise", dims, times * layers))
    return found


def _quantised(operators: list[Operator]) -> list[Operator]:
    """Operands of 8-bit products are read in bf16 and written along rows and along columns."""
    found = []
    for one in operators:
        if not one.dtype.startswith("fp8") or one.kind not in ("gemm", "moe"):
            continue
        d = one.dims
        numbers = d["m"] * (d["k"] + d["n"]) if one.kind == "gemm" else (
            d["rows"] * (2 * d["hidden"] + 3 * d["width"])
        )  # fmt: skip
        dims = {"moved_bytes": numbers * 4.0 / 2}  # half of it forward, half (x 2) backward
        found.append(Operator(f"quantise {one.name}", one.part, "elementwise", dims, one.count))
    return found


def _further(layout: Layout, plan: TrainPlan) -> list[Operator]:
    """The projection in front of each layer that predicts a further token."""
    if not plan.mtp_layers:
        return []
    hidden = layout.model.hidden_size
    dims = {"m": float(plan.rank_tokens), "n": hidden / layout.parallel.tp, "k": 2.0 * hidden}
    dims |= {"weight_bytes": 2.0, "input_bytes": 2.0}
    return [Operator("further projection", "head", "gemm", dims, 0.5)]


def _grouped(one: OperatorTime, device: Hardware) -> OperatorTime:
    """Experts with many rows run at the speed of a plain product, whoever's kernel it is."""
    if one.operator.kind != "moe":
        return one
    plain_s = many_rows_s(one.operator.dims, device, one.operator.dtype)
    return replace(one, estimate=replace(one.estimate, seconds=min(one.estimate.seconds, plain_s)))


def host_kernels(
    model: ModelSpec, parallel: Parallel, plan: TrainPlan, quant: QuantScheme
) -> float:
    """Kernels the host launches in a layer's forward."""
    if plan.graphs == "full":
        return 0.0
    count = HOST_KERNELS
    moe, is_latent = model.moe, model.attention.kind == "mla"
    local = moe.grouping.num_experts / parallel.expert_ranks if moe else 1.0
    operand = count["8-bit operand"] if quant.weights.startswith("fp8") else 0
    dynamic = count["dispatch"] + count["activation"] + 2 * local * (1 + operand)
    if plan.graphs == "partial":
        return 2 + dynamic
    static = count["attention"] + (5 if is_latent else 2) * operand
    static += count["latent"] if is_latent else 0
    static += count["router, one library" if plan.sends_once else "router"]
    if moe and moe.shared_width:
        static += count["shared"] + 2 * operand
    return static + dynamic


def again(one: Operator, plan: TrainPlan) -> float:
    """How often the backward computes an operator of the forward again."""
    if plan.recompute == "full" and one.part != "head":
        return 1.0
    is_way = one.kind == "all_to_all" or one.part in ("experts", "router")
    if plan.recompute == "experts" and is_way:
        return 1.0
    is_small = one.part == "norms" or one.name in LATENT or one.name == "norms"
    return 1.0 if plan.recompute in ("selective", "experts") and is_small else 0.0


def micro_batch(work: Work, plan: TrainPlan) -> MicroBatch:
    """Forward and backward of the stage that takes longest."""
    layer = _parts(work, plan, is_head=False)
    head = _parts(work, plan, is_head=True)
    most, last = work.layers
    if plan.schedule == "dualpipe":  # both ends of the pipe hold the head, each for half
        head = {name: seconds / 2 for name, seconds in head.items()}
    layer_s, head_s = _together(layer, plan), sum(head.values())
    layers, has_head = most, work.stages == 1
    if work.stages > 1 and last * layer_s + head_s > most * layer_s:
        layers, has_head = last, True
    parts = {name: layers * seconds for name, seconds in layer.items()}
    if has_head:
        parts |= head
    device_s = layers * layer_s + (head_s if has_head else 0.0)
    host_s = layers * work.host_layer_s * (3.0 + AGAIN[plan.recompute])
    if host_s > device_s:
        parts["host"] = host_s - device_s
    return MicroBatch(max(device_s, host_s), parts)


def _parts(work: Work, plan: TrainPlan, *, is_head: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    for one in work.operators:
        if (one.operator.part == "head") != is_head:
            continue
        factor = 1.0 + BACKWARD.get(one.operator.kind, 1.0) + again(one.operator, plan)
        part = one.operator.part
        if one.operator.kind == "all_to_all":
            part = "exchange"
        scale = 1.0 if part in ("collectives", "exchange") else plan.scale
        found[part] = found.get(part, 0.0) + scale * one.seconds * factor
    return found


def _together(parts: dict[str, float], plan: TrainPlan) -> float:
    """A layer's time with its exchanges beside the arithmetic of another micro-batch.

    Unlike a batch that is cut in two to overlap with itself, that arithmetic is only slowed while
    an exchange holds some of the device.
    """
    exchange_s = parts.get("exchange", 0.0)
    arithmetic_s = sum(parts.values()) - exchange_s
    hidden_s = plan.overlap.eta * min(arithmetic_s, exchange_s)
    idle_s = max(0.0, exchange_s - arithmetic_s)
    slowed_s = max(0.0, hidden_s * (1 - 1 / plan.overlap.tax) - idle_s)
    return arithmetic_s + exchange_s - hidden_s + slowed_s
