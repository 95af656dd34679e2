"""The one interface between a model and ranks that hold its experts: rows out, rows back.

A dispatcher takes the tokens of this rank with their picks, brings them to the experts, and returns
the weighted sum for each token, whatever rank its experts stand on. Training and serving use the
same one. Decides here: which dispatcher is legal for a router and a layout, and how rows are padded
so that all ranks hand in equally many.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.log import log
from mogul.core.registry import Registry
from mogul.parallel.owners import Owners
from mogul.parallel.parcel import Payload
from mogul.spec.grouping import Grouping

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(rows [R, D], local ids [R, K], weights [R, K]) -> [R, D]; the local count is no expert."""

Rows = int | Literal["equal", "agree"]
"""Rows each rank hands in: a number known to all, the own one ("equal": all have the same), or the
largest, asked for at every call on the host ("agree": for ranks with unequal batches)."""

Wire = Literal["collective", "window", "auto"]
"""What moves rows: NCCL's (or Gloo's) collectives, or, without gradients, stores into the memory of
the other GPUs of a node (`mogul.parallel.window`); "auto" takes the latter where it works."""

DEBUG = os.environ.get("MOGUL_DEBUG", "0") not in ("", "0")


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """What a dispatcher is made from."""

    group: dist.ProcessGroup
    """The ranks that share the experts: expert rank = rank // moe_tp."""
    owners: Owners
    grouping: Grouping
    """Groups of a router whose picks stand group by group; one group for any other router."""
    chunks: int = 1
    """Pieces of the batch whose moves and experts overlap; 0 chooses by the number of rows. On GPUs
    that reach each other's memory pieces were never faster: each reads the experts anew."""
    rows: Rows = "equal"
    capacity: float | None = None
    """all_to_all only: rows kept per pair of ranks, as a share of the tokens, in place of
    exchanged sizes; 1.0 loses nothing. None exchanges sizes."""

    payload: Payload = "same"
    """How tokens travel to the experts: in their dtype, or (inference) as "int8" or "fp8"."""
    wire: Wire | None = None
    """static and gather only; None means collectives."""
    levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
    """two_level only: the ranks of this node, and those of its place on every node."""

    @property
    def expert_rank(self) -> int:
        """Which experts this rank holds."""
        return self.group.rank() // self.owners.moe_tp


class Dispatcher(ABC):
    """Brings tokens to experts and sums back."""

    min_chunk_rows = 1024
    """Fewer rows of a rank than this are never cut: experts would be read once a chunk."""

    reads: frozenset[str] = frozenset()
    """Which of `OPTIONS` it heeds; the others must be left out."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.group, self.owners = plan.group, plan.owners
        if self.group.size() != self.owners.ep * self.owners.moe_tp:
            raise ConfigError(
                f"{self.owners.ep} x {self.owners.moe_tp} expert ranks do not fill a group of "
                f"{self.group.size()}"
            )

    def __call__(
        self,
        x: Float[Tensor, "T D"],
        ids: Int[Tensor, "T K"],
        weights: Float[Tensor, "T K"],
        experts: Experts,
        *,
        rows: Rows | None = None,
    ) -> Float[Tensor, "T D"]:
        """Sum over the picks of each token; every rank of the group must call."""
        tokens = x.shape[0]
        wanted = self.rows_of(tokens, x.device, rows)
        if wanted != tokens:
            pad = wanted - tokens
            x, weights = F.pad(x, (0, 0, 0, pad)), F.pad(weights, (0, 0, 0, pad))
            ids = F.pad(ids, (0, 0, 0, pad), value=self.owners.num_experts)
        chunks = self._chunks(wanted)
        return self.run(x, ids, weights, experts, chunks)[:tokens]

    @abstractmethod
    def run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, chunks: int) -> Tensor:
        """The same for equally many rows on every rank."""

    def _chunks(self, rows: int) -> int:
        chunks = self.plan.chunks or min(4, rows // self.min_chunk_rows)
        return max(1, min(chunks, rows))

    def rows_of(self, tokens: int, device: torch.device, rows: Rows | None = None) -> int:
        """Rows that every rank hands in, for a rank with so many tokens."""
        rows = self.plan.rows if rows is None else rows
        if rows == "agree":
            return agree(tokens, self.group, device)
        if rows == "equal":
            if DEBUG and (most := agree(tokens, self.group, device)) != tokens:
                raise ConfigError(
                    f"this rank has {tokens} tokens, another {most}, but rows='equal'",
                    fix="use rows='agree', or the number of rows that all ranks pad to",
                )
            return tokens
        if tokens > rows:
            raise ConfigError(
                f"{tokens} tokens do not fit the {rows} rows of a rank", fix="raise rows"
            )
        return rows


def agree(number: int, group: dist.ProcessGroup, device: torch.device) -> int:
    """The largest of all ranks' numbers; reads it on the host."""
    most = torch.tensor(number, device=device)
    dist.all_reduce(most, dist.ReduceOp.MAX, group=group)
    return int(most)


OPTIONS = {"capacity": "capacity", "levels": "node_ranks", "wire": "wire"}
"""Fields of `Plan` that only some dispatchers read -> as users name them."""

DISPATCH: Registry[Callable[[Plan], Dispatcher]] = Registry("dispatch")


def why_not_static(*, plan: Plan, **_facts: object) -> str | None:
    """Static needs whole groups on every expert rank."""
    owners, grouping = plan.owners, plan.grouping
    if grouping.num_groups % owners.ep:
        legal = ", ".join(map(str, grouping.legal_devices()))
        return (
            f"ep={owners.ep} does not divide the router's {grouping.num_groups} groups; "
            f"legal is ep = {legal}"
        )
    if not owners.is_contiguous:
        return "the placement moves experts between groups of ranks"
    return None


def why_not_gather(*, plan: Plan, **_facts: object) -> str | None:
    """Masking by range needs contiguous experts."""
    return None if plan.owners.is_contiguous else "the placement is not contiguous"


def make_dispatcher(name: str, plan: Plan) -> Dispatcher:
    """The dispatcher of a name; "auto" is static where legal, else all_to_all, and says so.

    Raises:
        BackendError: the layout is illegal for it, with the legal ones.
        ConfigError: the plan sets an option that it does not read.
    """
    if name == "auto":
        reason = DISPATCH.reasons(plan=plan)["static"]
        name = "all_to_all" if reason else "static"
        if reason and plan.group.rank() == 0:
            log.warning(f"dispatch all_to_all, whose load is what the router makes it ({reason})")
    dispatcher = DISPATCH.get(name, plan=plan)(plan)
    unread = [
        word
        for field, word in OPTIONS.items()
        if getattr(plan, field) not in (None, "auto") and field not in dispatcher.reads
    ]
    if unread:
        raise ConfigError(
            f"dispatch {name} does not read {' and '.join(unread)}",
            fix="leave it out; all_to_all reads capacity, two_level node_ranks, static wire",
        )
    return dispatcher
