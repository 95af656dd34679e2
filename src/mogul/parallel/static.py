"""Dispatch with shapes known before routing: gather the tokens, run local groups, scatter the sums.

With D | M every token picks K/D experts on each of D expert ranks, so a rank computes exactly T*K/D
slots of the gathered T tokens: no sizes are exchanged, nothing waits for the host, and the whole
layer is captured in a graph. `Masked` is the same road for any router: shapes are as static, the
work is not, because each rank masks the picks of the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.parallel.dispatch import (
    DISPATCH,
    Dispatcher,
    Experts,
    Plan,
    why_not_gather,
    why_not_static,
)
from mogul.parallel.local import LocalExperts, Matrices
from mogul.parallel.move import Gather, Scatter, begin, may_push
from mogul.parallel.parcel import Parcel, is_worth_packing
from mogul.parallel.window import Window, open_window

EARLY_BYTES = 1 << 23
"""Tokens of a rank that travel so long that their picks go first."""


class Static(Dispatcher):
    """All-gather, the rank's own groups, reduce-scatter."""

    reads = frozenset({"wire"})

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        if plan.wire == "window" and plan.payload != "same":
            raise ConfigError(
                f"a window carries tokens as they are, not as {plan.payload}",
                fix="leave out wire or payload",
            )
        self.window = open_window(plan.group, plan.wire) if plan.payload == "same" else None
        self.first = plan.expert_rank * self.owners.slots
        self.picks = self._columns()
        """Columns of the picks that stand on this rank."""

    def _columns(self) -> slice:
        share = self.plan.grouping.top_k // self.owners.ep
        return slice(self.plan.expert_rank * share, (self.plan.expert_rank + 1) * share)

    def run(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts, chunks: int) -> Tensor:
        """One gather a chunk first, then experts and scatter chunk by chunk."""
        parts = list(zip(x.chunk(chunks), ids.chunk(chunks), weights.chunk(chunks), strict=True))
        if self.window is not None and may_push(x):
            return self._push(self.window, parts, experts)
        move, payload = Gather(self.group), self.plan.payload
        packed = is_worth_packing(x, weights)
        gathered = [Parcel(*part, move, packed=packed, payload=payload) for part in parts]
        scattered = []
        for one in gathered:
            x_RD, ids_RK, weights_RK = one.end()
            local_RA = self._local(ids_RK[:, self.picks])
            y_RD = experts(x_RD, local_RA, weights_RK[:, self.picks].contiguous())
            scattered.append(begin(y_RD, Scatter(self.group)))
        out = [one.end() for one in scattered]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _push(
        self, window: Window, parts: list[tuple[Tensor, Tensor, Tensor]], experts: Experts
    ) -> Tensor:
        """The same through the memory of the other ranks."""
        if len(parts) == 1 and isinstance(experts, LocalExperts):
            x, ids, weights = parts[0]
            share = len(range(ids.shape[1])[self.picks])
            matrices = experts.in_steps(x, share)
            if matrices is not None:
                return self._in_steps(window, x, (ids, weights.float()), experts, matrices)
        aside = len(parts) > 1
        gathered = [
            window.gather((x, ids, weights.float()), f"tokens {number}", aside=aside)
            for number, (x, ids, weights) in enumerate(parts)
        ]
        scattered = []
        for number, one in enumerate(gathered):
            x_RD, ids_RK, weights_RK = one.end()
            local_RA = self._local(ids_RK[:, self.picks])
            y_RD = experts(x_RD, local_RA, weights_RK[:, self.picks].contiguous())
            scattered.append(window.scatter(y_RD, f"sums {number}", aside=aside))
        out = [one.end()[0] for one in scattered]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _in_steps(
        self,
        window: Window,
        x: Tensor,
        picks: tuple[Tensor, Tensor],
        experts: LocalExperts,
        matrices: Matrices,
    ) -> Tensor:
        """Sums go to their ranks as they are made."""
        from mogul.kernels.triton import steps

        gate_up, down = matrices
        if x.nbytes >= EARLY_BYTES:  # picks are sorted while tokens travel
            rows = window.gather((x,), "tokens 0", aside=True)
            ids_RK, weights_RK = window.gather(picks, "picks").end()
            taken = steps.take(ids_RK, weights_RK, self.picks, self.first, gate_up)
            (x_RD,) = rows.end()
        else:
            x_RD, ids_RK, weights_RK = window.gather((x, *picks), "tokens 0").end()
            taken = steps.take(ids_RK, weights_RK, self.picks, self.first, gate_up)
        more = None if experts.beside is None else experts.beside(x_RD)
        if taken.sort is None:
            y_RD = steps.few(taken, x_RD, gate_up, down)
            return window.scatter(y_RD if more is None else y_RD + more, "sums 0").end()[0]
        y = steps.products(taken, x_RD, gate_up, down)

        def write(addresses: Tensor, own: Tensor) -> None:
            steps.push(taken, y, more, addresses, own, window.rank)

        return window.scatter_made(write, x, "sums 0")

    def _local(self, ids: Tensor) -> Tensor:
        """Global ids of this rank's columns to local ones; a null pick is the sentinel."""
        return (ids.long() - self.first).clamp_(max=self.owners.slots)


class Masked(Static):
    """The same for any router: all picks, those of other ranks masked."""

    def _columns(self) -> slice:
        return slice(None)

    def _local(self, ids: Tensor) -> Tensor:
        local = ids.long() - self.first
        return local.masked_fill(local < 0, self.owners.slots).clamp_(max=self.owners.slots)


DISPATCH.add("static", Static, why_not=why_not_static)
DISPATCH.add("gather", Masked, why_not=why_not_gather)
