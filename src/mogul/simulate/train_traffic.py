"""What stages and copies send each other in a training step, and how much of it shows.

Gradients are reduced in fp32 and weights gathered in bf16, over the ranks that hold the same
weights. Those ranks stand apart by the layout's inner ranks: with eight expert ranks a node, each
copy of an expert stands on a node of its own and its traffic has one network adapter.
"""

from __future__ import annotations

from mogul.simulate.collectives import collective
from mogul.simulate.engines import Overlap
from mogul.simulate.memory import weight_bytes
from mogul.simulate.train_plan import TrainPlan
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme

OPTIMIZER_BYTES = 28.0
"""Read and written a parameter by Adam: 4 moments, master weight twice, gradient, weight."""

BEHIND_THE_PASSES = Overlap(kind="fine")
"""Gathers and reductions layer by layer run beside the passes (`--overlap-grad-reduce` and
`--overlap-param-gather` of Megatron, FSDP's prefetch)."""


def hops_s(model: ModelSpec, device: Hardware, parallel: Parallel, plan: TrainPlan) -> float:
    """Activations to the next stage and gradients back, for one micro-batch.

    Interleaved stages send while they compute: only the start-up of each hop shows.
    """
    if parallel.pp == 1:
        return 0.0
    network = device.network_bytes_per_s or device.link_bytes_per_s
    rows = plan.rank_tokens / parallel.tp
    sent_s = rows * model.hidden_size * 2.0 / network if plan.virtual_stages == 1 else 0.0
    return 2 * plan.virtual_stages * (device.network_latency_s + sent_s)


def gradients_s(
    model: ModelSpec,
    device: Hardware,
    parallel: Parallel,
    plan: TrainPlan,
) -> float:
    """Reduce gradients and gather weights over the ranks that share them, for a step."""
    weights = weight_bytes(model, parallel, QuantScheme())
    experts = weights.pop("experts", 0.0)
    groups = (
        (sum(weights.values()), plan.copies(parallel), parallel.tp),
        (experts, expert_copies(parallel, plan), parallel.stage_devices),
    )
    # FSDP gathers for every forward and backward, and reduces after every backward.
    gathers, reductions = 1, 1
    if plan.shards_weights:
        reductions = plan.micro_batches(parallel)
        gathers = 2 * reductions
    seconds = 0.0
    for num_bytes, ranks, inner in groups:
        apart = device.model_copy(update={"link_devices": max(1, device.link_devices // inner)})
        width = 1.0 if plan.shards_weights else 2.0
        seconds += (
            reductions * collective("reduce_scatter", ranks, width * num_bytes, apart).seconds
        )
        seconds += gathers * collective("all_gather", ranks, num_bytes, apart).seconds
    return seconds


def expert_copies(parallel: Parallel, plan: TrainPlan) -> int:
    """Ranks that hold the same experts."""
    return max(1, plan.devices // (parallel.pp * parallel.stage_devices))


def exposed_s(traffic_s: float, busy_s: float, micro_batches: int, plan: TrainPlan) -> float:
    """What of the copies' traffic the passes do not hide.

    Weights held whole are gathered during the first forward and reduced during the last backward;
    FSDP has all of the step.
    """
    beside_s = busy_s if plan.shards_weights else busy_s / micro_batches
    return BEHIND_THE_PASSES.seconds(beside_s, traffic_s) - beside_s


def optimizer_s(model: ModelSpec, device: Hardware, parallel: Parallel, plan: TrainPlan) -> float:
    """Adam over the share of the parameters a device keeps the state of."""
    weights = weight_bytes(model, parallel, QuantScheme())
    experts = weights.pop("experts", 0.0) / 2 / expert_copies(parallel, plan)
    own = sum(weights.values()) / 2 / plan.copies(parallel) + experts
    return own * OPTIMIZER_BYTES / (0.8 * device.memory_bytes_per_s)
