"""Which rank runs which expert, and under which local number: the table that dispatch reads.

An expert group of `ep` ranks holds whole experts; `moe_tp` neighbouring ranks share one such rank,
each with a slice of every expert. Contiguous by default, else as a placement says, replicas
included: an expert with R replicas sends the picks of token t to replica t mod R.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.spec.grouping import divisors


@dataclass(frozen=True, eq=False)
class Owners:
    """Experts of one layer on `ep` expert ranks of `slots` experts each."""

    experts_of_rank: tuple[tuple[int, ...], ...]
    """Global expert in every local slot of every expert rank; -1 is an empty slot."""
    num_experts: int
    moe_tp: int = 1
    is_contiguous: bool = True

    @property
    def ep(self) -> int:
        """Expert ranks."""
        return len(self.experts_of_rank)

    @property
    def slots(self) -> int:
        """Local experts of a rank; this id is the sentinel of its experts."""
        return len(self.experts_of_rank[0])

    @property
    def has_replicas(self) -> bool:
        """Whether some expert stands on several ranks."""
        return sum(e >= 0 for row in self.experts_of_rank for e in row) > self.num_experts

    def tables(self, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor]:
        """(rank [R, E+1], local slot [R, E+1], replicas [E+1]) by replica and expert.

        Column E serves null picks: a rank that does not exist.
        """
        places: list[list[tuple[int, int]]] = [[] for _ in range(self.num_experts)]
        for rank, row in enumerate(self.experts_of_rank):
            for slot, expert in enumerate(row):
                if expert >= 0:
                    places[expert].append((rank, slot))
        most = max(map(len, places))
        rank_RE = np.full((most, self.num_experts + 1), self.ep)
        slot_RE = np.full((most, self.num_experts + 1), self.slots)
        count_E = np.ones(self.num_experts + 1, dtype=np.int64)
        for expert, found in enumerate(places):
            count_E[expert] = len(found)
            for turn, (rank, slot) in enumerate(found):
                rank_RE[turn, expert], slot_RE[turn, expert] = rank, slot
        rank, slot, count = (torch.as_tensor(a, device=device) for a in (rank_RE, slot_RE, count_E))
        return rank, slot, count


def contiguous(num_experts: int, ep: int, moe_tp: int = 1) -> Owners:
    """Expert e on rank e // (E / ep)."""
    if num_experts % ep:
        raise ConfigError(
            f"{num_experts} experts cannot be shared equally by ep={ep} ranks",
            fix=f"use ep = one of {divisors(num_experts)}, or a placement with empty slots",
        )
    rows = np.arange(num_experts).reshape(ep, -1)
    return Owners(tuple(map(tuple, rows.tolist())), num_experts, moe_tp)


def placed(slots_DS: np.ndarray, num_experts: int, ep: int, moe_tp: int = 1) -> Owners:
    """As one layer of a placement says (`Placement.slots_of`)."""
    if len(slots_DS) != ep:
        raise ConfigError(
            f"the placement is for {len(slots_DS)} devices, the layout has ep={ep}",
            fix=f"place for {ep} devices",
        )
    rows = tuple(map(tuple, slots_DS.tolist()))
    same = slots_DS.size == num_experts and bool((slots_DS.ravel() == np.arange(num_experts)).all())
    return Owners(rows, num_experts, moe_tp, is_contiguous=same)
