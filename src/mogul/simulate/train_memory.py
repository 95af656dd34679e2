"""Bytes of the fullest device in training, and what is recomputed so that they fit."""

from __future__ import annotations

from mogul.simulate.memory import RUNTIME_BYTES, Memory, weight_bytes
from mogul.simulate.routing import LayerLoad
from mogul.simulate.train_plan import TrainPlan, stage_layers
from mogul.simulate.train_traffic import expert_copies
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme

Loads = list[tuple[int, LayerLoad]]

KEPT_BYTES = {"none": 34.0, "selective": 22.0, "experts": 22.0, "full": 2.0}
"""Kept a token and hidden unit of a layer, experts' rows apart; selective drops what norms and
activations give."""


def with_recompute(
    model: ModelSpec, device: Hardware, parallel: Parallel, plan: TrainPlan, loads: Loads
) -> tuple[TrainPlan, Memory]:
    """Settle what is recomputed (the least that fits), and the memory that leaves."""
    kinds = [plan.recompute]
    if plan.recompute == "auto":
        kinds = ["none", "selective", "experts", "full"]
    found = []
    for kind in kinds:
        chosen = plan.replace(recompute=kind)
        found.append((chosen, training_memory(model, device, parallel, chosen, loads)))
    return next((one for one in found if one[1].fits), found[-1])


def training_memory(
    model: ModelSpec, device: Hardware, parallel: Parallel, plan: TrainPlan, loads: Loads
) -> Memory:
    """Weights, gradients, optimizer state and kept activations of the fullest device.

    Optimizer state is spread over the copies (6 + 12 / copies bytes a parameter), experts over
    their own. For each row of an expert its input and three inner activations are kept; selective
    recomputation drops one of these.
    """
    weights = weight_bytes(model, parallel, QuantScheme())
    experts = weights.pop("experts", 0.0) / 2
    plain = sum(weights.values()) / 2
    copies = plan.copies(parallel)
    held = 6.0 / copies if plan.shards_weights else 6.0
    held_experts = 6.0 / expert_copies(parallel, plan) if plan.shards_weights else 6.0
    tokens = plan.rank_tokens
    layers, _ = stage_layers(model.num_layers, parallel, plan.virtual_stages)
    rows = max((load.max_rows for _, load in loads), default=0.0)
    width = model.moe.expert_width / parallel.expert_tp if model.moe else 0
    kept = tokens * model.hidden_size * KEPT_BYTES[plan.recompute] / parallel.tp
    inner_widths = {"none": 3, "selective": 2}.get(plan.recompute, 0)
    inner = rows * (model.hidden_size + inner_widths * width) * 2.0 if inner_widths else 0.0
    in_flight = min(parallel.pp, plan.global_batch) * (1 + 1 / max(1, plan.virtual_stages))
    flying = in_flight if parallel.pp > 1 else 1
    parts = {
        "weights and gradients": held * plain + held_experts * experts,
        "optimizer": 12.0 * (plain / copies + experts / expert_copies(parallel, plan)),
        "activations": layers * (kept + inner) * flying,
        "logits": tokens * model.vocab_size / parallel.tp * 6.0,
        "runtime": RUNTIME_BYTES,
    }
    return Memory(parts, 0.95 * device.memory_bytes)
