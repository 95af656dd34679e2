"""Moving rows between ranks, begun now and ended later, with gradients that move back the same way.

A move is one collective and its mirror: gather and reduce-scatter, or an exchange and its reverse.
`begin` starts it beside the computation (on the communicator's own stream, or its thread) and
`Begun.end` waits; in the backward pass `end` starts the mirror and `begin` waits for it, so what
overlaps forward overlaps backward. Nothing here reads a value on the host.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.parallel.window import WORD, Window

# The first names are those of torch 2.13, which warns of the second ones.
gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
scatter_into = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Move(Protocol):
    """A collective on rows; returns the (still unfilled) result and what to wait for."""

    def forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Start it."""
        ...

    def backward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Start its mirror."""
        ...


@dataclass(frozen=True)
class Gather:
    """Rows [T, ...] of every rank, one after another: [ranks * T, ...]."""

    group: dist.ProcessGroup

    def forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """All-gather."""
        out = rows.new_empty((rows.shape[0] * self.group.size(), *rows.shape[1:]))
        return out, gather_into(out, rows.contiguous(), group=self.group, async_op=True)

    def backward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Reduce-scatter."""
        size = self.group.size()
        if rows.shape[0] % size:
            raise ConfigError(f"{rows.shape[0]} rows cannot be shared by {size} ranks")
        out = rows.new_empty((rows.shape[0] // size, *rows.shape[1:]))
        return out, scatter_into(out, rows.contiguous(), group=self.group, async_op=True)


@dataclass(frozen=True)
class Scatter:
    """Sums over the ranks of rows [ranks * T, ...], each rank its own part [T, ...]."""

    group: dist.ProcessGroup

    def forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """Reduce-scatter."""
        return Gather(self.group).backward(rows)

    def backward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """All-gather."""
        return Gather(self.group).forward(rows)


@dataclass(frozen=True)
class Exchange:
    """`sent[r]` rows to rank r, `received[r]` rows from it; equal parts where both are None."""

    group: dist.ProcessGroup
    sent: list[int] | None = None
    received: list[int] | None = None

    def forward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """All-to-all."""
        return self._swap(rows, self.sent, self.received)

    def backward(self, rows: Tensor) -> tuple[Tensor, Any]:
        """All-to-all the other way."""
        return self._swap(rows, self.received, self.sent)

    def mirror(self) -> Exchange:
        """The way back."""
        return Exchange(self.group, self.received, self.sent)

    def _swap(
        self, rows: Tensor, sent: list[int] | None, received: list[int] | None
    ) -> tuple[Tensor, Any]:
        size = rows.shape[0] if received is None else sum(received)
        out = rows.new_empty((size, *rows.shape[1:]))
        work = dist.all_to_all_single(
            out, rows.contiguous(), received, sent, group=self.group, async_op=True
        )
        return out, work


@dataclass
class _Flight:
    """What a begun move has to wait for, forward and backward."""

    work: Any = None
    back: Tensor | None = None
    back_work: Any = None

    def land(self) -> None:
        self.work.wait()
        self.work = None


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, move: Move, flight: _Flight) -> Tensor:
        ctx.flight = flight
        out, flight.work = move.forward(rows)
        return out

    @staticmethod
    def backward(ctx: Any, *_passed: Tensor) -> tuple[Tensor | None, None, None]:
        flight: _Flight = ctx.flight
        flight.back_work.wait()
        back, flight.back = flight.back, None
        return back, None, None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, move: Move, flight: _Flight) -> Tensor:
        ctx.move, ctx.flight = move, flight
        flight.land()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        flight: _Flight = ctx.flight
        flight.back, flight.back_work = ctx.move.backward(grads[0])
        return grads[0], None, None  # of the right shape; `_Begin` returns what has moved


@dataclass
class Begun:
    """A move on its way."""

    arriving: Tensor
    move: Move
    flight: _Flight = field(default_factory=_Flight)

    def end(self) -> Tensor:
        """Wait (on a GPU the stream waits, not the host) and return the rows."""
        if self.arriving.requires_grad:
            return _End.apply(self.arriving, self.move, self.flight)  # type: ignore[return-value]
        self.flight.land()
        return self.arriving


def begin(rows: Tensor, move: Move) -> Begun:
    """Start a move; differentiable where `rows` asks for a gradient."""
    flight = _Flight()
    if rows.requires_grad and torch.is_grad_enabled():
        return Begun(_Begin.apply(rows, move, flight), move, flight)  # type: ignore[arg-type]
    arriving, flight.work = move.forward(rows)
    return Begun(arriving, move, flight)


def gather(
    rows: Tensor, group: dist.ProcessGroup, window: Window | None = None, kind: str = "rows"
) -> Tensor:
    """All-gather rows now; the gradient is reduce-scattered.

    Through a window (of the group) the result is valid until the next move but one; `kind` names
    gathers that do not alternate with scatters.
    """
    if group.size() == 1:
        return rows
    if window is not None and may_push(rows):
        return window.gather((rows,), kind).end()[0]
    return begin(rows, Gather(group)).end()


def scatter(rows: Tensor, group: dist.ProcessGroup, window: Window | None = None) -> Tensor:
    """Reduce-scatter rows now; the gradient is all-gathered."""
    if group.size() == 1:
        return rows
    if window is not None and may_push(rows):
        return window.scatter(rows, "sums").end()[0]
    return begin(rows, Scatter(group)).end()


def may_push(rows: Tensor) -> bool:
    """Whether rows like these can go through a window; reads what all ranks have alike.

    Never where gradients could be wanted: what is saved for them must not be overwritten.
    """
    whole_words = rows.shape[-1] * rows.element_size() % WORD.itemsize == 0
    return whole_words and not torch.is_grad_enabled()


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return rows.chunk(group.size())[group.rank()].contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return gather(grads[0], ctx.group), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return gather(rows, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].chunk(ctx.group.size())[ctx.group.rank()].contiguous(), None


def split(rows: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of rows that all ranks hold alike; the gradient is gathered."""
    return rows if group.size() == 1 else _Split.apply(rows, group)  # type: ignore[return-value]


def join(rows: Tensor, group: dist.ProcessGroup, window: Window | None = None) -> Tensor:
    """The rows of all ranks for a computation all do alike; the gradient is this rank's part."""
    if group.size() == 1:
        return rows
    if window is not None and may_push(rows):
        return gather(rows, group, window, "joined")
    return _Join.apply(rows, group)  # type: ignore[return-value]
