"""Bytes of one device, part by part: weights, cache, activations, reserves.

Serving counts every weight at its format, the cache at its own, the activations of one prompt
chunk and what graphs and collectives keep. Training counts gradients and optimizer state as
Megatron-LM does (18 bytes a parameter, or 6 + 12 / data-parallel copies), and activations that
know of experts: every slot's row is kept, at the busiest device's count.
"""

from __future__ import annotations

from dataclasses import dataclass

from mogul.core.errors import ConfigError
from mogul.core.units import show_bytes
from mogul.simulate.engines import Engine
from mogul.spec import parameters
from mogul.spec.hardware import Hardware
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme, bytes_of
from mogul.spec.workload import Workload

RUNTIME_BYTES = 1.5 * 2**30
"""Context, graphs and workspaces of an engine (1 to 3.5 GB seen; a guess within)."""

COLLECTIVE_BYTES = 0.4 * 2**30
"""Buffers of NCCL on 2 to 8 devices: 342 to 392 MB in AIConfigurator's system files."""

CHUNK_TOKENS = 8192
"""Tokens computed at once in a long prompt."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest device, by part."""

    parts: dict[str, float]
    capacity_bytes: float
    """What the engine may use."""

    @property
    def total_bytes(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the device holds it."""
        return self.total_bytes <= self.capacity_bytes

    def check(self, what: str, kv_tokens_bytes: float = 0.0) -> None:
        """Raise ConfigError naming the largest part and by how much it is too much."""
        if self.fits:
            return
        over = self.total_bytes - self.capacity_bytes
        largest = max(self.parts, key=lambda part: self.parts[part])
        shown = ", ".join(f"{name} {show_bytes(size)}" for name, size in self.parts.items())
        fix = "use more devices, fewer bits, or a smaller batch"
        fixed = self.total_bytes - self.parts.get("cache", 0)
        if largest == "cache" or fixed < self.capacity_bytes:
            room = max(0.0, self.capacity_bytes - fixed)
            fix = f"the cache has room for {show_bytes(room)}: lower the batch or the context"
            if kv_tokens_bytes:
                fix += f" (at most {int(room / kv_tokens_bytes)} requests a copy)"
        raise ConfigError(
            f"{what} does not fit: {show_bytes(self.total_bytes)} of "
            f"{show_bytes(self.capacity_bytes)} a device, {show_bytes(over)} too much; "
            f"the largest part is {largest} ({shown})",
            fix=fix,
        )


def weight_bytes(model: ModelSpec, parallel: Parallel, quant: QuantScheme) -> dict[str, float]:
    """Weights of one device by part; the fullest rank where experts do not divide evenly."""
    hidden, tp = model.hidden_size, parallel.tp
    fmt, stages = bytes_of(quant.weights), parallel.pp
    attention = model.num_layers * parameters.attention_params(model.attention, hidden)
    moe_layers = len(model.moe_layers)
    dense = (model.num_layers - moe_layers) * parameters.ffn_params(hidden, model.dense_width)
    table = model.vocab_size * hidden * (1 if model.tie_embeddings else 2)
    parts = {
        "attention": attention * fmt / tp / stages,
        "dense": dense * fmt / tp / stages,
        "embeddings": table * bytes_of(quant.head) / tp,
    }
    if model.moe:
        experts = model.moe.grouping.num_experts + parallel.expert_replicas
        local = -(-experts // parallel.expert_ranks) / parallel.expert_tp
        expert = parameters.expert_params(model.moe, hidden)
        routed = moe_layers * local * expert * bytes_of(quant.expert_format)
        shared = moe_layers * parameters.shared_params(model.moe, hidden) * fmt
        parts["experts"] = routed / stages
        parts["shared"] = shared / parallel.shared_ranks / stages
        parts["routers"] = moe_layers * parameters.router_params(model.moe, hidden) * 2 / stages
    return {name: size for name, size in parts.items() if size}


def cache_bytes_per_sequence(
    model: ModelSpec, parallel: Parallel, quant: QuantScheme, num_tokens: int
) -> float:
    """Cache of one sequence on one device: heads are cut over tp until none is left to cut."""
    whole = model.kv_bytes(num_tokens, bytes_of(quant.kv))
    heads = 1 if model.attention.kind == "mla" else model.attention.num_kv_heads
    return whole / min(parallel.tp, heads) / parallel.pp


def serving_memory(
    model: ModelSpec,
    parallel: Parallel,
    quant: QuantScheme,
    workload: Workload,
    device: Hardware,
    engine: Engine,
) -> Memory:
    """Memory of the fullest device while it serves."""
    sequences = -(-workload.batch // parallel.dp)
    tokens = workload.input_tokens + workload.output_tokens
    cache = sequences * cache_bytes_per_sequence(model, parallel, quant, tokens)
    chunk = min(CHUNK_TOKENS, workload.prefill_batch * workload.input_tokens)
    widest = max(model.dense_width, 0) / parallel.tp
    if model.moe:
        rows = model.moe.grouping.top_k * parallel.dp / parallel.expert_ranks
        widest = max(widest, rows * model.moe.expert_width / parallel.expert_tp)
    activations = chunk * (6 * model.hidden_size + 3 * widest) * 2.0
    logits = sequences * model.vocab_size / parallel.tp * 4.0
    weights = sum(weight_bytes(model, parallel, quant).values())
    parts = {
        "weights": weights,
        "cache": cache,
        "activations": activations + logits,
        "runtime": RUNTIME_BYTES,
    }
    if parallel.devices > 1:
        parts["collectives"] = COLLECTIVE_BYTES
    return Memory(parts, engine.memory_fraction * device.memory_bytes)


def most_sequences(
    model: ModelSpec,
    parallel: Parallel,
    quant: QuantScheme,
    workload: Workload,
    device: Hardware,
    engine: Engine,
) -> int:
    """Requests one data-parallel copy can hold at full length (0: the weights do not fit)."""
    one = workload.replace(batch=parallel.dp, prefill_batch=1)
    memory = serving_memory(model, parallel, quant, one, device, engine)
    each = memory.parts["cache"]
    free = memory.capacity_bytes - memory.total_bytes + each
    return max(0, int(free / each)) if free >= each else 0
