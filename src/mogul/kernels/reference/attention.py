"""Paged attention in plain words: every sequence on its own, in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.paged_call import PagedCall

FP8 = torch.float8_e4m3fn


def write_cache(
    new_TNC: Tensor, cache_PZNC: Tensor, slots_T: Tensor, scale: Tensor | None, count: int
) -> None:
    """Put the keys or values of the first `count` tokens into their slots; -1 writes nothing."""
    slots, rows = slots_T[:count], new_TNC[:count]
    if bool((slots < 0).any()):
        is_real = slots >= 0
        slots, rows = slots[is_real], rows[is_real]
    if cache_PZNC.dtype == FP8:
        rows = rows.float() / (1.0 if scale is None else scale[:, None])
        limit = torch.finfo(FP8).max
        rows = rows.clamp(-limit, limit).to(FP8).view(torch.uint8)
        cache_PZNC = cache_PZNC.view(torch.uint8)
    cache_PZNC.flatten(0, 1).index_copy_(0, slots, rows.to(cache_PZNC.dtype))


def read_cache(cache_PZNC: Tensor, pages: Tensor, length: int, scale: Tensor | None) -> Tensor:
    """The first `length` keys or values of one sequence, in fp32: [L, N, C]."""
    found = cache_PZNC.view(torch.uint8) if cache_PZNC.dtype == FP8 else cache_PZNC
    rows = found[pages.long()].flatten(0, 1)[:length].view(cache_PZNC.dtype).float()
    return rows if scale is None else rows * scale[:, None]


def paged_attention_reference(given: PagedCall) -> Tensor:
    """See `mogul.kernels.paged_attention`."""
    starts, query_THC, slots_T = given.query_starts.tolist(), given.query_THC, given.slots_T
    write_cache(given.key_TNC, given.key_cache, slots_T, given.key_scale, starts[-1])
    write_cache(given.value_TNC, given.value_cache, slots_T, given.value_scale, starts[-1])
    out_THC = torch.zeros_like(query_THC, memory_format=torch.contiguous_format)
    page_size = given.key_cache.shape[1]
    for s, length in enumerate(given.lengths_S.tolist()):
        start, stop = starts[s], starts[s + 1]
        if start == stop:
            continue
        pages = given.tables_SB[s, : -(-length // page_size)]
        key_LNC = read_cache(given.key_cache, pages, length, given.key_scale)
        value_LNC = read_cache(given.value_cache, pages, length, given.value_scale)
        query_QHC = query_THC[start:stop].float()
        rest = (given.scaling, given.sliding_window, given.sinks)
        out_THC[start:stop] = attend(query_QHC, key_LNC, value_LNC, *rest).to(out_THC.dtype)
    return out_THC


def attend(
    query_QHC: Tensor,
    key_LNC: Tensor,
    value_LNC: Tensor,
    scaling: float,
    sliding_window: int | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention of a sequence's last Q positions over all L: [Q, H, C]."""
    num_queries, num_heads = query_QHC.shape[:2]
    length, repeats = key_LNC.shape[0], num_heads // key_LNC.shape[1]
    key_LHC = key_LNC.repeat_interleave(repeats, 1)
    value_LHC = value_LNC.repeat_interleave(repeats, 1)
    score_HQL = torch.einsum("qhc,lhc->hql", query_QHC, key_LHC) * scaling
    at_Q = torch.arange(length - num_queries, length, device=query_QHC.device)
    at_L = torch.arange(length, device=query_QHC.device)
    is_seen_QL = at_L <= at_Q[:, None]
    if sliding_window is not None:
        is_seen_QL &= at_L > at_Q[:, None] - sliding_window
    score_HQL = score_HQL.masked_fill(~is_seen_QL, float("-inf"))
    if sinks_H is not None:
        sink_HQ1 = sinks_H.float()[:, None, None].expand(-1, num_queries, 1)
        score_HQL = torch.cat([score_HQL, sink_HQ1], -1)
    weight_HQL = score_HQL.softmax(-1)[..., :length]
    return torch.einsum("hql,lhc->qhc", weight_HQL, value_LHC)
