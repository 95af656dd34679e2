"""A model's step as a list of kernels: what one device of each kind runs, and how often.

`step_operators` turns a ModelSpec, a layout, formats and a step into operators. Per-layer facts
of attention (grouped-query or latent), of experts (any router) and of dense layers meet here; what
a kernel costs is decided in `calibration.py`, what a collective costs in `collectives.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mogul.simulate.engines import Engine
from mogul.simulate.routing import LayerLoad, Routing, layer_loads
from mogul.spec.model import ModelSpec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme, bytes_of


@dataclass(frozen=True)
class Step:
    """One forward of one stage, seen from one data-parallel copy."""

    sequences: int
    """Sequences this copy works on."""

    new_tokens: int
    """New tokens of each (1 in decode, more when drafts are verified)."""

    context: float
    """Tokens already cached for each."""

    is_prefill: bool = False
    has_all_logits: bool = False
    """Every token gets logits (training), not only each sequence's last."""

    @property
    def tokens(self) -> int:
        """New tokens of the copy."""
        return self.sequences * self.new_tokens


@dataclass(frozen=True)
class Operator:
    """One kernel or collective, `count` times a step."""

    name: str
    part: str
    """attention | experts | shared | dense | router | norms | collectives | head | host."""

    kind: str
    """A kind of `physics.py`, or the name of a collective."""

    dims: dict[str, float]
    count: float
    dtype: str = "bf16"


@dataclass(frozen=True)
class Layout:
    """The inputs every operator builder shares."""

    model: ModelSpec
    parallel: Parallel
    quant: QuantScheme
    engine: Engine
    domain: int = 8
    """Devices that reach each other over the scale-up link."""


def step_operators(
    layout: Layout, step: Step, routing: Routing
) -> tuple[list[Operator], list[tuple[int, LayerLoad]]]:
    """Operators of one device in one stage, and the expert loads they assume."""
    model, parallel = layout.model, layout.parallel
    stages = parallel.pp
    operators = list(_attention(layout, step))
    operators += _norms(layout, step)
    loads: list[tuple[int, LayerLoad]] = []
    if model.moe:
        tokens = step.tokens * parallel.dp
        moe_layers = len(model.moe_layers)
        ranks, copies = parallel.expert_ranks, parallel.expert_replicas
        loads = layer_loads(routing, model.moe.grouping, tokens, ranks, moe_layers, copies)
        operators += _experts(layout, step, loads)
    dense_layers = model.num_layers - len(model.moe_layers)
    if dense_layers and model.dense_width:
        operators += _dense(layout, step, model.dense_width, dense_layers, "dense", parallel.tp)
    operators = [_scaled(one, 1 / stages) for one in operators]
    operators += _ends(layout, step)
    return operators, loads


def _scaled(one: Operator, factor: float) -> Operator:
    return Operator(one.name, one.part, one.kind, one.dims, one.count * factor, one.dtype)


def _gemm(
    layout: Layout, name: str, part: str, m: float, n: float, k: float, count: float, fmt: str
) -> Operator:
    arithmetic = layout.quant.arithmetic(fmt)
    dims = {"m": m, "n": max(1.0, n), "k": max(1.0, k)}
    dims |= {"weight_bytes": bytes_of(fmt), "input_bytes": bytes_of(arithmetic)}
    dtype = fmt if fmt.startswith("fp8") else arithmetic
    return Operator(name, part, "gemm", dims, count, dtype)


def _attention(layout: Layout, step: Step) -> Iterator[Operator]:
    model, tp = layout.model, layout.parallel.tp
    shape, layers, hidden = model.attention, model.num_layers, model.hidden_size
    fmt = layout.quant.weights
    tokens = step.tokens
    if shape.kind == "mla":
        yield from _latent_projections(layout, step)
    else:
        heads, kv_heads = shape.num_heads / tp, max(1.0, shape.num_kv_heads / tp)
        width = heads * shape.key_dim + kv_heads * (shape.key_dim + shape.value_dim)
        yield _gemm(layout, "qkv", "attention", tokens, width, hidden, layers, fmt)
    windowed = shape.num_windowed_layers
    window = shape.sliding_window or 0
    if layers - windowed:
        yield _attention_core(layout, step, step.context, layers - windowed)
    if windowed:
        yield _attention_core(layout, step, min(step.context, window), windowed, window)
    width = shape.num_heads * shape.value_dim / tp
    yield _gemm(layout, "attention out", "attention", tokens, hidden, width, layers, fmt)
    if tp > 1:
        yield _reduce(layout, "attention all-reduce", tp, tokens, layers)


def _attention_core(
    layout: Layout, step: Step, context: float, count: int, window: int = 0
) -> Operator:
    shape, tp = layout.model.attention, layout.parallel.tp
    heads = max(1.0, shape.num_heads / tp)
    if step.is_prefill:
        tokens = step.new_tokens
        prior = context
        if window and window < tokens:  # a band instead of a triangle
            tokens, prior = window, window / 2
        repeat = step.new_tokens / tokens
        dims = {"batch": step.sequences * repeat, "tokens": tokens, "prior": prior, "heads": heads}
        kv_heads = heads if shape.kind == "mla" else max(1.0, shape.num_kv_heads / tp)
        dims |= {"kv_heads": kv_heads, "key_dim": shape.key_dim, "value_dim": shape.value_dim}
        return Operator("attention", "attention", "attention_prefill", dims, count)
    kv = layout.quant.kv
    dims = {"batch": float(step.sequences), "context": context + 1}
    heads *= step.new_tokens  # drafts under verification share one read of the cache
    if shape.kind == "mla":
        dims |= {"heads": heads, "latent": shape.kv_lora_rank, "rope": shape.rope_dim}
        dims["kv_bytes"] = bytes_of(kv)
        return Operator("attention", "attention", "mla_decode", dims, count, _cache_type(kv))
    kv_heads = max(1.0, shape.num_kv_heads / tp)
    dims |= {"heads": heads, "kv_heads": kv_heads, "key_dim": shape.key_dim}
    dims |= {"value_dim": shape.value_dim, "kv_bytes": bytes_of(kv)}
    return Operator("attention", "attention", "attention_decode", dims, count, _cache_type(kv))


def _cache_type(kv: str) -> str:
    return "bf16" if kv in ("bf16", "fp16", "fp32") else "fp8"


def _latent_projections(layout: Layout, step: Step) -> Iterator[Operator]:
    model, tp, fmt = layout.model, layout.parallel.tp, layout.quant.weights
    shape, layers, hidden = model.attention, model.num_layers, model.hidden_size
    heads, tokens = shape.num_heads / tp, step.tokens
    latent, rope = shape.kv_lora_rank, shape.rope_dim
    down = latent + rope + (shape.q_lora_rank or 0)
    yield _gemm(layout, "latent down", "attention", tokens, down, hidden, layers, fmt)
    q_in = shape.q_lora_rank or hidden
    yield _gemm(layout, "query up", "attention", tokens, heads * shape.key_dim, q_in, layers, fmt)
    nope = shape.key_dim - rope
    if step.is_prefill:
        width = heads * (nope + shape.value_dim)
        yield _gemm(layout, "latent up", "attention", tokens, width, latent, layers, fmt)
        return
    # Absorbed: the up-projections act on queries and outputs, head by head.
    width = heads * nope
    yield _gemm(layout, "absorb key", "attention", tokens, latent, width, layers, "bf16")
    width = heads * shape.value_dim
    yield _gemm(layout, "absorb value", "attention", tokens, width, latent, layers, "bf16")


def _is_joined(layout: Layout, step: Step) -> bool:
    return layout.engine.joins and not step.is_prefill


def _norms(layout: Layout, step: Step) -> Iterator[Operator]:
    model = layout.model
    moved = step.tokens * model.hidden_size * 2.0
    heads = (model.attention.num_heads + model.attention.num_kv_heads) / layout.parallel.tp
    rotated = step.tokens * heads * model.attention.key_dim * 4.0
    per_layer = layout.engine.small_kernels
    if _is_joined(layout, step):
        return
    dims = {"moved_bytes": 4 * moved}
    yield Operator("norms", "norms", "elementwise", dims, 2.0 * model.num_layers)
    dims = {"moved_bytes": rotated}
    yield Operator("rotation, cache", "norms", "elementwise", dims, per_layer * model.num_layers)


def _dense(
    layout: Layout, step: Step, width: float, layers: float, part: str, shards: int
) -> Iterator[Operator]:
    hidden, fmt, tokens = layout.model.hidden_size, layout.quant.weights, step.tokens
    if part == "shared" and shards > layout.parallel.tp:  # cut over more copies: all their tokens
        tokens = tokens * shards // layout.parallel.tp
    local = width / shards
    yield _gemm(layout, f"{part} gate, up", part, tokens, 2 * local, hidden, layers, fmt)
    if not _is_joined(layout, step):
        dims = {"moved_bytes": tokens * local * 6.0}
        yield Operator(f"{part} activation", part, "elementwise", dims, layers)
    yield _gemm(layout, f"{part} down", part, tokens, hidden, local, layers, fmt)
    if part == "dense" and shards > 1:
        yield _reduce(layout, "dense all-reduce", shards, tokens, layers)


def _runs_beside(layout: Layout, step: Step) -> bool:
    """Whether one call picks, runs the routed experts and the shared one beside them."""
    quant, moe = layout.quant, layout.model.moe
    is_fp8 = quant.expert_format == quant.weights == "fp8"
    is_alone = layout.parallel.stage_devices == 1
    return bool(_is_joined(layout, step) and moe and moe.shared_width and is_fp8 and is_alone)


def _router(layout: Layout, step: Step) -> Iterator[Operator]:
    model, layers = layout.model, len(layout.model.moe_layers)
    assert model.moe is not None
    outputs = model.moe.grouping.num_experts + model.moe.router.num_null_experts
    yield _gemm(layout, "router", "router", step.tokens, outputs, model.hidden_size, layers, "bf16")
    if not _is_joined(layout, step):
        dims = {"moved_bytes": step.tokens * outputs * 6.0}
        yield Operator("top-k", "router", "elementwise", dims, layers)


def _experts(layout: Layout, step: Step, loads: list[tuple[int, LayerLoad]]) -> Iterator[Operator]:
    model, parallel = layout.model, layout.parallel
    moe = model.moe
    assert moe is not None
    beside = _runs_beside(layout, step)
    if not beside:
        yield from _router(layout, step)
    always = moe.shared_width / moe.expert_width if beside else 0.0  # picked by every token
    fmt = layout.quant.expert_format
    arithmetic = layout.quant.arithmetic(fmt)
    for count, load in loads:
        dims = {"rows": load.max_rows + always * step.tokens}
        dims["distinct"] = load.max_distinct + always
        dims |= {"hidden": model.hidden_size, "width": moe.expert_width / parallel.expert_tp}
        dims |= {"weight_bytes": bytes_of(fmt), "input_bytes": bytes_of(arithmetic)}
        yield Operator("experts", "experts", "moe", dims, count, fmt)
        yield from _exchange(layout, step, load, count)
    if moe.shared_width and not beside:
        layers, shards = len(model.moe_layers), parallel.shared_ranks
        yield from _dense(layout, step, moe.shared_width, layers, "shared", shards)


def _exchange(layout: Layout, step: Step, load: LayerLoad, count: int) -> Iterator[Operator]:
    """Bring rows to their experts and back."""
    model, parallel, engine = layout.model, layout.parallel, layout.engine
    stage = parallel.stage_devices
    if stage == 1:
        return
    if parallel.dp == 1:  # every device has every token: one sum over all of them
        yield _reduce(layout, "experts all-reduce", stage, step.tokens, count)
        return
    tokens = step.tokens * parallel.dp
    sent = model.hidden_size * bytes_of(layout.quant.dispatch)
    back = model.hidden_size * 2.0
    gathers = engine.exchange == "all_gather" or (
        engine.exchange == "auto" and load.ranks_per_token >= parallel.expert_ranks - 0.5
    )
    if gathers:
        dims = {"ranks": stage, "num_bytes": tokens * sent}
        yield Operator("experts all-gather", "collectives", "all_gather", dims, count)
        dims = {"ranks": stage, "num_bytes": tokens * back}
        yield Operator("experts reduce-scatter", "collectives", "reduce_scatter", dims, count)
        return
    grouping = model.grouping
    assert grouping is not None
    copies = load.ranks_per_token if engine.sends_once else float(grouping.top_k)
    own = step.tokens / parallel.tp
    far = _far_copies(copies, stage, layout) if engine.sends_once else None
    # A domain's ranks share its network: their skews average out.
    far_rho = 1 + (load.rho - 1) / math.sqrt(min(stage, layout.domain))
    for name, row_bytes in (("dispatch", sent), ("combine", back)):
        dims = {"ranks": stage, "num_bytes": own * load.rho * copies * row_bytes}
        if far is not None:
            dims["far_bytes"] = own * far_rho * far * row_bytes
        yield Operator(name, "collectives", "all_to_all", dims, count)


def _far_copies(copies: float, ranks: int, layout: Layout) -> float:
    """Other domains a token reaches when it crosses the network once for each.

    Group-limited routing (DeepSeek) caps the domains a token may use.
    """
    domains = -(-ranks // layout.domain)
    reached = domains * (1 - (1 - 1 / domains) ** copies)
    moe = layout.model.moe
    if moe and moe.router.limit_groups and domains > 1:
        reached = min(reached, float(moe.router.limit_groups))
    return reached * (domains - 1) / domains


def _reduce(layout: Layout, name: str, ranks: int, tokens: float, count: float) -> Operator:
    dims = {"ranks": float(ranks), "num_bytes": tokens * layout.model.hidden_size * 2.0}
    return Operator(name, "collectives", "all_reduce", dims, count)


def _ends(layout: Layout, step: Step) -> Iterator[Operator]:
    """Embedding, last norm, head and sampling: once a step."""
    model, tp, head = layout.model, layout.parallel.tp, layout.quant.head
    has_few = step.is_prefill and not step.has_all_logits
    outputs = step.sequences if has_few else step.tokens
    vocab = model.vocab_size / tp
    yield _gemm(layout, "head", "head", outputs, vocab, model.hidden_size, 1, head)
    dims = {"moved_bytes": outputs * vocab * 4.0}
    yield Operator("sampling", "head", "elementwise", dims, 4)
