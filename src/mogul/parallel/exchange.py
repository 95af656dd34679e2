"""Dispatch for any router and any placement: every token goes once to each rank that has its picks.

A token travels once to a rank however many of its experts stand there; the rank sums them with
their weights, so one row comes back. Sizes are exchanged (one wait for the host a layer), or fixed
by a capacity: then shapes are static, a graph can be captured, and rows beyond it are dropped and
counted. Replicas share the picks of an expert by token number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from mogul.parallel.dispatch import DISPATCH, Dispatcher, Experts, Plan
from mogul.parallel.move import Begun, Exchange, begin
from mogul.parallel.owners import contiguous
from mogul.parallel.parcel import Parcel, is_worth_packing
from mogul.spec.grouping import Grouping


@dataclass
class _Routed:
    """Where the picks of one chunk go."""

    slots: Tensor
    """Local id of every pick on its expert rank [T, K]."""
    rank: Tensor
    """Expert rank of every pick [T, K]."""
    wanted: Tensor
    """Whether a token goes to a rank of the group [ranks, T]."""


@dataclass
class _Sent:
    """One chunk on its way, and how to bring it back."""

    parcel: Parcel
    back: Exchange
    place: Tensor
    """Row that comes back for (rank, token) [ranks, T]."""
    kept: Tensor
    """Whether there is one [ranks, T]."""


class AllToAll(Dispatcher):
    """Exchange of tokens by destination rank."""

    packs = True
    """Whether small batches may move as one message; all ranks must have equally many tokens."""
    reads = frozenset({"capacity"})

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._tables: dict[torch.device, tuple[Tensor, ...]] = {}
        self.dropped: Tensor | None = None
        """Rows lost to the capacity so far (a number on the device); None without capacity."""

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, chunks: int) -> Tensor:
        """Exchange sizes of all chunks at once, then move and compute chunk by chunk."""
        pieces = list(zip(x.chunk(chunks), ids.chunk(chunks), weights.chunk(chunks), strict=True))
        routed = [self._route(piece[1]) for piece in pieces]
        if self.plan.capacity is None:
            counts = self._exchange_sizes(routed)
            sent = [
                self._send_exact(one, piece, *count)
                for one, piece, count in zip(routed, pieces, counts, strict=True)
            ]
        else:
            sent = [
                self._send_capped(one, piece) for one, piece in zip(routed, pieces, strict=True)
            ]
        returning: list[tuple[Begun, _Sent]] = []
        for one in sent:
            x_RD, slots_RK, weights_RK = one.parcel.end()
            y_RD = experts(x_RD, slots_RK.long(), weights_RK)
            returning.append((begin(y_RD, one.back), one))
        out = [self._combine(begun.end(), one) for begun, one in returning]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _route(self, ids: Tensor) -> _Routed:
        """Rank and slot of each pick; which ranks each token goes to."""
        ep, experts = self.owners.ep, self.owners.num_experts
        rank_RE, slot_RE, count_E = self._tables_on(ids.device)
        ids = ids.long()
        ids = ids.masked_fill((ids < 0) | (ids > experts), experts)
        if rank_RE.shape[0] == 1:
            rank, slots = rank_RE[0][ids], slot_RE[0][ids]
        else:
            turn = torch.arange(ids.shape[0], device=ids.device)[:, None] % count_E[ids]
            rank, slots = rank_RE[turn, ids], slot_RE[turn, ids]
        wanted = (rank[None] == torch.arange(ep, device=ids.device)[:, None, None]).any(2)
        return _Routed(slots, rank, wanted.repeat_interleave(self.owners.moe_tp, 0))

    def _tables_on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._tables:
            self._tables[device] = self.owners.tables(device)
        return self._tables[device]

    def _exchange_sizes(self, routed: list[_Routed]) -> list[tuple[list[int], list[int]]]:
        """(sent, received) rows by rank for every chunk: the one wait for the host."""
        sent_RC = torch.stack([one.wanted.sum(1) for one in routed], dim=1)
        received_RC = torch.empty_like(sent_RC)
        dist.all_to_all_single(received_RC, sent_RC, group=self.group)
        sent, received = torch.stack([sent_RC, received_RC]).transpose(1, 2).tolist()
        return list(zip(sent, received, strict=True))

    def _send_exact(
        self, one: _Routed, piece: tuple[Tensor, ...], sent: list[int], received: list[int]
    ) -> _Sent:
        total, tokens = sum(sent), one.wanted.shape[1]
        flat = one.wanted.flatten()
        place = flat.cumsum(0) - 1
        source = torch.zeros(total + 1, dtype=torch.long, device=flat.device)
        everyone = torch.arange(flat.numel(), device=flat.device)
        source.scatter_(0, place.masked_fill(~flat, total), everyone)
        source = source[:total]
        move = Exchange(self.group, sent, received)
        token = source % max(tokens, 1)
        rank = source.div(max(tokens, 1), rounding_mode="floor")
        place = place.clamp(min=0).view_as(one.wanted)
        return self._send(one, piece, token, rank, move, place, one.wanted, None)

    def _send_capped(self, one: _Routed, piece: tuple[Tensor, ...]) -> _Sent:
        ranks, tokens = one.wanted.shape
        assert self.plan.capacity is not None
        room = max(1, min(tokens, math.ceil(self.plan.capacity * tokens)))
        place = one.wanted.cumsum(1) - 1
        kept = one.wanted & (place < room)
        lost = (one.wanted & ~kept).sum()
        self.dropped = lost if self.dropped is None else self.dropped.add_(lost)
        source = torch.zeros((ranks, room + 1), dtype=torch.long, device=place.device)
        everyone = torch.arange(tokens, device=place.device).expand(ranks, -1)
        source.scatter_(1, place.masked_fill(~kept, room), everyone)
        token = source[:, :room].flatten()
        filled = torch.arange(room, device=place.device) < kept.sum(1, keepdim=True)
        rank = torch.arange(ranks, device=place.device).repeat_interleave(room)
        base = torch.arange(ranks, device=place.device)[:, None] * room
        place = (place.clamp(0, room - 1) + base).masked_fill(~kept, 0)
        move = Exchange(self.group)
        return self._send(one, piece, token, rank, move, place, kept, filled.flatten())

    def _send(
        self,
        one: _Routed,
        piece: tuple[Tensor, ...],
        token: Tensor,
        rank: Tensor,
        move: Exchange,
        place: Tensor,
        kept: Tensor,
        filled: Tensor | None,
    ) -> _Sent:
        """Start the moves of the rows (token, rank)."""
        x, _, weights = piece
        here = one.rank[token] == rank.div(self.owners.moe_tp, rounding_mode="floor")[:, None]
        if filled is not None:
            here = here & filled[:, None]
        slots = one.slots[token].masked_fill(~here, self.owners.slots)
        parcel = Parcel(
            x.index_select(0, token),
            slots,
            weights.index_select(0, token),
            move,
            packed=self.packs and is_worth_packing(x, weights),
            payload=self.plan.payload,
        )
        return _Sent(parcel, move.mirror(), place, kept)

    def _combine(self, y: Tensor, one: _Sent) -> Tensor:
        """Sum over the ranks of what came back for each token, in the order of the ranks."""
        if y.shape[0] == 0:  # keeps the way back for gradients, which the other ranks wait on
            return y.sum(0, keepdim=True).expand(one.kept.shape[1], -1) * 0
        out = None
        for place_T, kept_T in zip(one.place, one.kept, strict=True):
            part = y.index_select(0, place_T) * kept_T[:, None].to(y.dtype)
            out = part if out is None else out + part
        assert out is not None
        return out


class TwoLevel(Dispatcher):
    """All-to-all in two stages: to the node first, one row a node; then to the rank inside it.

    For many nodes: messages between nodes are fewer and larger (arXiv 2206.03382), and a token
    crosses the network once for all of a node's experts. The second stage is a dispatcher again,
    which runs as the experts of the first.
    """

    reads = frozenset({"levels"})

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.levels is not None
        inside, across = plan.levels
        experts, top_k = plan.owners.num_experts, plan.grouping.top_k
        share = experts // across.size()
        outer = contiguous(experts, across.size())
        inner = contiguous(share, inside.size() // plan.owners.moe_tp, plan.owners.moe_tp)
        common = {"capacity": None, "chunks": 1, "levels": None}
        self._outer = AllToAll(replace(plan, group=across, owners=outer, **common))
        grouping = Grouping(num_experts=share, top_k=min(top_k, share))
        self._inner = AllToAll(
            replace(plan, group=inside, owners=inner, grouping=grouping, **common)
        )
        self._inner.packs = False  # ranks of a node have unequal numbers of rows by then

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, chunks: int) -> Tensor:
        """Both stages, out and back."""

        def on_node(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            return self._inner.run(x, ids, weights, experts, 1)

        return self._outer.run(x, ids, weights, on_node, chunks)


def why_not_two_level(*, plan: Plan, **_facts: object) -> str | None:
    """Two levels need nodes, whole nodes of experts, and exchanged sizes."""
    if plan.levels is None:
        return "no nodes are named (ExpertSpread.node_ranks)"
    if not plan.owners.is_contiguous or plan.capacity is not None:
        return "it runs contiguous experts and exchanged sizes only"
    return None


DISPATCH.add("all_to_all", AllToAll)
DISPATCH.add("two_level", TwoLevel, why_not=why_not_two_level)
