"""Slots to sort and what a sort of them must say, for the interpreter and for devices."""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.kernels.triton.sorting import Sorted

KINDS = ("random", "skewed", "half", "null", "nothing", "same")


def make_ids(experts: int, picks: int, tokens: int, kind: str, dtype: torch.dtype) -> Tensor:
    """Picks [tokens, picks]; `kind` shapes them."""
    generator = torch.Generator().manual_seed(tokens + experts)
    score = torch.rand(tokens, experts, generator=generator)
    if kind == "skewed":
        score[: tokens * 9 // 10, experts // 2] += 2
    if kind == "half":
        score[:, : experts // 2] -= 2
    ids = score.topk(picks, -1).indices
    if kind == "null":
        ids[::3, -1] = experts
        ids[1::5, 0] = -1
        ids[tokens // 2 :: 7] = experts + 5
    if kind == "nothing":
        ids[:] = experts
    if kind == "same":
        ids[:] = experts - 1
    return ids.to(dtype)


def faults(found: Sorted, ids: Tensor, experts: int, rows: int) -> list[str]:
    """Which tables differ from those of a stable sort by torch."""
    flat = ids.flatten().cpu().long()
    bins = flat.where((flat >= 0) & (flat < experts), torch.tensor(experts))
    count = bins.bincount(minlength=experts + 1)[:experts]
    live = int(count.sum())
    order = bins.argsort(stable=True)[:live]
    start = count.cumsum(0) - count
    tiles = (count + rows - 1) // rows
    e = torch.arange(experts).repeat_interleave(tiles)
    nth = torch.arange(len(e)) - (tiles.cumsum(0) - tiles)[e]
    wanted = {
        "order": order,
        "head": torch.cat([start, torch.tensor([live, len(e)]), torch.zeros(8).long()]),
        "tiles": torch.stack([e, start[e] + nth * rows, start[e] + count[e]], 1),
    }
    got = {
        "order": found.order[:live],
        "head": found.head[: experts + 10],
        "tiles": found.tiles[: 4 * len(e)].view(-1, 4)[:, :3],
    }
    return [name for name in wanted if not torch.equal(got[name].cpu().long(), wanted[name])]
