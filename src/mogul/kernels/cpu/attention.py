"""Paged attention on the processor: one call of PyTorch's attention a sequence, on views.

Decides how a sequence's keys are found and how its queries are laid out. Consecutive pages are read
where they lie, others are gathered. Few queries stand beside the query heads of their key head, so
that every key is read once; many go through the causal path.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mogul.kernels.paged_call import PagedCall
from mogul.kernels.reference.attention import FP8, attend, write_cache

PACKED_QUERIES = 16
"""Up to this many queries share one reading of the keys between all heads of a key head."""


def paged_attention_cpu(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`."""
    starts, query_THC, window = given.query_starts.tolist(), given.query_THC, given.sliding_window
    key_cache, value_cache = given.key_cache, given.value_cache
    write_cache(given.key_TNC, key_cache, given.slots_T, given.key_scale, starts[-1])
    write_cache(given.value_TNC, value_cache, given.slots_T, given.value_scale, starts[-1])
    out_THC = torch.empty_like(query_THC, memory_format=torch.contiguous_format)
    out_THC[starts[-1] :] = 0
    page_size, dtype = key_cache.shape[1], query_THC.dtype
    where = (given.lengths_S.tolist(), given.tables_SB.tolist())
    for start, stop, length, table in zip(starts[:-1], starts[1:], *where, strict=True):
        num_queries = stop - start
        if num_queries == 0:
            continue
        first = 0 if window is None else max(0, length - num_queries + 1 - window)
        skipped = first // page_size
        pages = table[skipped : -(-length // page_size)]
        inside = slice(first - skipped * page_size, length - skipped * page_size)
        key_LNC = _read(key_cache, pages, inside, given.key_scale, dtype)
        value_LNC = _read(value_cache, pages, inside, given.value_scale, dtype)
        query_QHC = query_THC[start:stop]
        if given.sinks is not None:
            rows = (query_QHC.float(), key_LNC.float(), value_LNC.float())
            found = attend(*rows, given.scaling, window, given.sinks)
        else:
            found = _attend(query_QHC, key_LNC, value_LNC, given.scaling, window)
        out_THC[start:stop] = found
    return out_THC


def _read(
    cache_PZNC: Tensor, pages: list[int], inside: slice, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The keys or values of one sequence that its queries may see: [L, N, C]."""
    is_fp8 = cache_PZNC.dtype == FP8
    plain = cache_PZNC.view(torch.uint8) if is_fp8 else cache_PZNC
    if pages == list(range(pages[0], pages[0] + len(pages))):
        found = plain[pages[0] : pages[0] + len(pages)]
    else:
        found = plain.index_select(0, torch.tensor(pages, device="cpu"))
    rows_LNC = found.flatten(0, 1)[inside]
    if not is_fp8:
        return rows_LNC
    rows_LNC = rows_LNC.view(FP8).float()
    return (rows_LNC if scale is None else rows_LNC * scale[:, None]).to(dtype)


def _attend(
    query_QHC: Tensor,
    key_LNC: Tensor,
    value_LNC: Tensor,
    scaling: float,
    sliding_window: int | None,
) -> Tensor:
    """Causal attention of the last Q positions: [Q, H, C]."""
    num_queries, num_heads, width = query_QHC.shape
    length, num_kv_heads = key_LNC.shape[:2]
    key_1NLC, value_1NLC = key_LNC.transpose(0, 1)[None], value_LNC.transpose(0, 1)[None]
    is_whole = num_queries == length and (sliding_window is None or length <= sliding_window)
    if num_queries > PACKED_QUERIES:
        out_1HQC = scaled_dot_product_attention(
            query_QHC.transpose(0, 1)[None],
            key_1NLC,
            value_1NLC,
            attn_mask=None if is_whole else _seen(num_queries, length, sliding_window),
            is_causal=is_whole,
            scale=scaling,
            enable_gqa=True,
        )
        return out_1HQC[0].transpose(0, 1)
    group = num_heads // num_kv_heads
    # [N, Q * G, C]: the queries of all heads that share a key head stand in one block.
    packed = query_QHC.view(num_queries, num_kv_heads, group, width).transpose(0, 1)
    mask = None
    if num_queries > 1:
        mask = _seen(num_queries, length, sliding_window).repeat_interleave(group, 0)
    out_1NRC = scaled_dot_product_attention(
        packed.reshape(1, num_kv_heads, num_queries * group, width),
        key_1NLC,
        value_1NLC,
        attn_mask=mask,
        scale=scaling,
    )
    out_NQGC = out_1NRC.view(num_kv_heads, num_queries, group, width)
    return out_NQGC.transpose(0, 1).reshape(num_queries, num_heads, width)


def _seen(num_queries: int, length: int, sliding_window: int | None) -> Tensor:
    """Which of L keys each of the last Q positions sees."""
    at_Q1 = torch.arange(length - num_queries, length, device="cpu")[:, None]
    at_L = torch.arange(length, device="cpu")
    is_seen_QL = at_L <= at_Q1
    return is_seen_QL if sliding_window is None else is_seen_QL & (at_L > at_Q1 - sliding_window)
