"""The kernels `calibrate` measures: products, experts, attention, each as a call on rotated inputs.

Experts in bf16 (or fp32) and fp8 are mogul's own kernels. Two tables are for reference, since no
server calls them so: 8-bit products take operands that are quantised already, and PyTorch's decode
has each sequence's cache in one piece. Decode runs on mogul's pages too: the table says whose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from torch.nn import functional

from mogul.kernels import (
    QuantisedExperts,
    expert_format,
    moe_forward,
    moe_forward_quantised,
    paged_attention,
)
from mogul.kernels.quant import QuantisedWeight

FP8 = torch.float8_e4m3fn
COPIES_BYTES = 200 * 2**20
"""Inputs rotate through at least this much memory, or `MOST_COPIES` of them."""

MOST_COPIES = 64

HEAD_WIDTH = 128
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Case:
    """One kernel call to measure."""

    kind: str
    engine: str
    dtype: str
    dims: dict[str, float]
    call: Callable[[int], object]
    """Runs on input copy i."""

    copies: int = 1


@dataclass(frozen=True)
class Grid:
    """What to measure; `SMALL` is for tests and a first look."""

    tokens: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096, 16384)
    products: tuple[tuple[int, int], ...] = (
        (1024, 5120), (5120, 5120), (6144, 4096), (2048, 7168), (16384, 4096), (4096, 12288),
        (51200, 5120),
    )  # fmt: skip
    experts: tuple[tuple[int, int, int, int], ...] = (
        (5120, 1344, 64, 8), (2048, 768, 128, 8), (1536, 256, 128, 8), (7168, 2048, 32, 8),
    )  # fmt: skip
    """Hidden, width, experts, picks."""

    contexts: tuple[int, ...] = (128, 1024, 4096, 16384)
    batches: tuple[int, ...] = (1, 8, 64, 256)
    heads: tuple[tuple[int, int], ...] = ((8, 1), (32, 4), (40, 8))
    budget_s: float = 540.0
    """After this nothing new is measured."""


SMALL = Grid(
    tokens=(1, 16),
    products=((64, 64),),
    experts=((64, 32, 8, 2),),
    contexts=(32,),
    batches=(1, 4),
    heads=((4, 2),),
)


def builders(grid: Grid, device: torch.device, dtype: str) -> Iterator[Callable[[], Case]]:
    """Builders of every case; inputs are made only when a case is measured."""
    has_fp8 = device.type == "cuda" and dtype == "bf16"
    for tokens in grid.tokens:
        for n, k in grid.products:
            yield lambda m=tokens, n=n, k=k: product(m, n, k, device, dtype)
            if has_fp8:
                yield lambda m=tokens, n=n, k=k: product_fp8(m, n, k, device)
        for shape in grid.experts:
            yield lambda m=tokens, shape=shape: experts(m, shape, device, dtype)
            if has_fp8:
                yield lambda m=tokens, shape=shape: experts_fp8(m, shape, device)
    for context in grid.contexts:
        for heads, kv_heads in grid.heads:
            yield lambda c=context, h=heads, n=kv_heads: prefill(c, h, n, device, dtype)
            for batch in grid.batches:
                if batch * context <= 2**20:
                    where = (batch, context, heads, kv_heads)
                    yield lambda where=where: decode(*where, device, dtype)
                    yield lambda where=where: decode_on_pages(*where, device, dtype)
                    if has_fp8:
                        yield lambda where=where: decode_on_pages(*where, device, dtype, True)


def torch_type(dtype: str) -> torch.dtype:
    """PyTorch's type of a name of the tables."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]


def _backend(device: torch.device) -> str:
    """On a GPU only the fast kernels are worth a row: a call they refuse is named, not replaced."""
    return "auto" if device.type == "cpu" else "triton"


def _copies(num_bytes: float) -> int:
    return int(max(1, min(MOST_COPIES, COPIES_BYTES // max(1, num_bytes))))


def product(m: int, n: int, k: int, device: torch.device, dtype: str) -> Case:
    """A plain matrix product."""
    kind = torch_type(dtype)
    copies = _copies(n * k * kind.itemsize)
    x = torch.randn(m, k, device=device, dtype=kind)
    weights = [torch.randn(n, k, device=device, dtype=kind) for _ in range(copies)]
    dims: dict[str, float] = {"m": m, "n": n, "k": k}
    return Case("gemm", "torch", dtype, dims, lambda i: functional.linear(x, weights[i]), copies)


def product_fp8(m: int, n: int, k: int, device: torch.device) -> Case:
    """An 8-bit product of quantised operands with one scale a tensor, 16 rows at least."""
    copies = _copies(n * k)
    rows = -(-m // 16) * 16
    x = torch.randn(rows, k, device=device).to(FP8)
    weights = [torch.randn(n, k, device=device).to(FP8).t() for _ in range(copies)]
    one = torch.ones((), device=device)

    def call(i: int) -> Tensor:
        return torch.ops.aten._scaled_mm(
            x, weights[i], one, one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return Case("gemm", "torch", "fp8", {"m": m, "n": n, "k": k}, call, copies)


@dataclass(frozen=True)
class _Routed:
    """Picks that rotate: every call touches other experts, so none waits in the device's cache."""

    sets: list[Tensor]
    weights: Tensor
    dims: dict[str, float]

    @classmethod
    def of(
        cls, tokens: int, shape: tuple[int, int, int, int], item_bytes: int, device: torch.device
    ) -> _Routed:
        """Uniform picks; `distinct` is the mean of the sets."""
        hidden, width, num_experts, picks = shape
        touched = min(num_experts, tokens * picks) * 3 * hidden * width * item_bytes
        sets = [
            torch.rand(tokens, num_experts, device=device).topk(picks).indices
            for _ in range(_copies(touched))
        ]
        weights = torch.full((tokens, picks), 1 / picks, device=device)
        distinct = sum(ids.unique().numel() for ids in sets) / len(sets)
        dims = {"rows": tokens * picks, "distinct": distinct, "hidden": hidden, "width": width}
        return cls(sets, weights, dims)

    def ids(self, index: int) -> Tensor:
        """The picks of one call."""
        return self.sets[index % len(self.sets)]


def experts(
    tokens: int, shape: tuple[int, int, int, int], device: torch.device, dtype: str
) -> Case:
    """Routed experts by mogul's kernels."""
    hidden, width, num_experts, _ = shape
    kind = torch_type(dtype)
    copies = _copies(3 * hidden * width * num_experts * kind.itemsize)
    x = torch.randn(tokens, hidden, device=device, dtype=kind)

    def made(*sizes: int) -> list[Tensor]:
        return [torch.randn(*sizes, device=device, dtype=kind) * 0.02 for _ in range(copies)]

    up, down = made(num_experts, 2 * width, hidden), made(num_experts, hidden, width)
    routed, backend = _Routed.of(tokens, shape, kind.itemsize, device), _backend(device)

    def call(i: int) -> Tensor:
        matrices = up[i % copies], down[i % copies]
        return moe_forward(x, *matrices, routed.ids(i), routed.weights, backend=backend)

    return Case("moe", "mogul", dtype, routed.dims, call, max(copies, len(routed.sets)))


def experts_fp8(tokens: int, shape: tuple[int, int, int, int], device: torch.device) -> Case:
    """Routed experts by mogul's fp8 kernels, which quantise the rows too."""
    hidden, width, num_experts, _ = shape
    copies = _copies(3 * hidden * width * num_experts)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)

    def made(rows: int, columns: int) -> QuantisedWeight:
        value = torch.randn(num_experts, rows, columns, device=device, dtype=torch.bfloat16)
        scale = torch.full((num_experts, rows), 0.02, device=device)
        return QuantisedWeight(value.to(FP8), scale)

    fp8 = expert_format("fp8")
    backend = _backend(device)
    layers = [
        QuantisedExperts(fp8, made(2 * width, hidden), made(hidden, width)) for _ in range(copies)
    ]
    routed = _Routed.of(tokens, shape, 1, device)

    def call(i: int) -> Tensor:
        layer, ids = layers[i % copies], routed.ids(i)
        return moe_forward_quantised(x, layer, ids, routed.weights, backend=backend)

    return Case("moe", "mogul", "fp8", routed.dims, call, max(copies, len(routed.sets)))


def _attention_dims(heads: int, kv_heads: int) -> dict[str, float]:
    dims: dict[str, float] = {"heads": heads, "kv_heads": kv_heads, "key_dim": HEAD_WIDTH}
    return dims | {"value_dim": HEAD_WIDTH}


def decode(
    batch: int, context: int, heads: int, kv_heads: int, device: torch.device, dtype: str
) -> Case:
    """One query a sequence by PyTorch's attention."""
    kind = torch_type(dtype)
    size = (batch, kv_heads, context, HEAD_WIDTH)
    copies = _copies(2 * prod(size) * kind.itemsize)
    query = torch.randn(batch, heads, 1, HEAD_WIDTH, device=device, dtype=kind)
    caches = [_cache(size, device, kind) for _ in range(copies)]
    dims = {"batch": batch, "context": context, **_attention_dims(heads, kv_heads)}
    dims |= {"kv_bytes": kind.itemsize}
    return Case(
        "attention_decode", "torch", dtype, dims,
        lambda i: _attend(query, *caches[i], is_causal=False), copies,
    )  # fmt: skip


def _cache(size: tuple[int, ...], device: torch.device, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values."""
    keys = torch.randn(size, device=device, dtype=kind)
    return keys, torch.randn(size, device=device, dtype=kind)


def decode_on_pages(
    batch: int,
    context: int,
    heads: int,
    kv_heads: int,
    device: torch.device,
    dtype: str,
    is_fp8: bool = False,
) -> Case:
    """One query a sequence by mogul's paged attention, the new key and value written too."""
    kind = torch_type(dtype)
    stored = FP8 if is_fp8 else kind
    pages = -(-context // PAGE_TOKENS)
    size = (batch * pages, PAGE_TOKENS, kv_heads, HEAD_WIDTH)
    copies = _copies(2 * prod(size) * stored.itemsize)
    caches = [[x.to(stored) for x in _cache(size, device, kind)] for _ in range(copies)]
    scale = torch.ones((), device=device) if is_fp8 else None
    query = torch.randn(batch, heads, HEAD_WIDTH, device=device, dtype=kind)
    new = torch.randn(batch, kv_heads, HEAD_WIDTH, device=device, dtype=kind)
    tables = torch.arange(batch * pages, device=device, dtype=torch.int32).view(batch, pages)
    slots = tables[:, -1].long() * PAGE_TOKENS + (context - 1) % PAGE_TOKENS
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32)
    lengths = torch.full((batch,), context, device=device, dtype=torch.int32)
    dims = {"batch": batch, "context": context, **_attention_dims(heads, kv_heads)}
    dims |= {"kv_bytes": stored.itemsize}

    def call(i: int) -> Tensor:
        return paged_attention(
            query, new, new, *caches[i], slots_T=slots, tables_SB=tables, query_starts=starts,
            lengths_S=lengths, max_query_len=1, scaling=HEAD_WIDTH**-0.5,
            key_scale=scale, value_scale=scale,
        )  # fmt: skip

    return Case("attention_decode", "mogul", "fp8" if is_fp8 else dtype, dims, call, copies)


def prefill(tokens: int, heads: int, kv_heads: int, device: torch.device, dtype: str) -> Case:
    """A causal prompt by PyTorch's attention."""
    kind = torch_type(dtype)
    query = torch.randn(1, heads, tokens, HEAD_WIDTH, device=device, dtype=kind)
    keys, values = _cache((1, kv_heads, tokens, HEAD_WIDTH), device, kind)
    dims = {"batch": 1, "tokens": tokens, **_attention_dims(heads, kv_heads)}
    return Case(
        "attention_prefill", "torch", dtype, dims,
        lambda _: _attend(query, keys, values, is_causal=True),
    )  # fmt: skip


def _attend(query: Tensor, keys: Tensor, values: Tensor, *, is_causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, keys, values, is_causal=is_causal, enable_gqa=True
    )
