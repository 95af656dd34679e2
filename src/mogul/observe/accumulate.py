"""Count picks on the device they are made on: every routing array of a trace, all layers at once.

No per-token Python and no wait for the device: a forward adds some fifty kernels, whatever the
number of layers. Integers are exact (one-hot products in float32 stay below 2^24 a chunk).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from mogul.spec.trace import NUM_BUSIEST_BINS

_CHUNK_ELEMENTS = 2**24
"""Most one-hot elements alive at once (64 MiB in float32)."""


class RoutingCounts:
    """The routing arrays of a trace while they grow; L layers, E experts, K picks."""

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        *,
        device: torch.device,
        batch_sizes: Sequence[int],
        num_tasks: int,
        score: str = "softmax",
    ) -> None:
        self.num_layers, self.num_experts = num_layers, num_experts
        self.batch_sizes = tuple(batch_sizes)
        self.score = score
        self.num_tokens = 0
        self.has_logits = False
        # The CPU counts in 64 bits throughout; so does any device that can.
        self.float_type = torch.float32 if device.type == "mps" else torch.float64

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        layers, experts, real = num_layers, num_experts, self.float_type
        self.count = zeros(layers, experts)
        self.coactivation = zeros(layers, experts, experts)
        self.transition = zeros(max(layers - 1, 0), experts, experts)
        self.task_count = zeros(num_tasks, layers, experts)
        self.distinct_hist = zeros(len(self.batch_sizes), layers, experts + 1)
        self.busiest_hist = zeros(len(self.batch_sizes), layers, NUM_BUSIEST_BINS)
        self.weight_sum = zeros(layers, experts + 1, dtype=real)
        self.weight_sqsum = zeros(layers, experts + 1, dtype=real)
        self.score_sum = zeros(layers, experts, dtype=real)
        self.entropy_sum = zeros(layers, dtype=real)

    def add(
        self,
        ids: Int[Tensor, "L T K"],
        weights: Float[Tensor, "L T K"] | None,
        logits: Float[Tensor, "L T E"] | None,
        task: Int[Tensor, " T"] | None = None,
    ) -> None:
        """Count tokens; histograms take consecutive tokens as batches."""
        num_tokens, largest = ids.shape[1], max(self.batch_sizes, default=1)
        per_chunk = _CHUNK_ELEMENTS // (self.num_layers * (self.num_experts + 1))
        per_chunk = max(largest, per_chunk // largest * largest)
        for first in range(0, num_tokens, per_chunk):
            part = slice(first, first + per_chunk)
            ids_LTK = self._null_is_last(ids[:, part])
            hot_LTE = self._count(ids_LTK, None if task is None else task[part])
            self._batches(hot_LTE)
            if weights is not None:
                self._weights(ids_LTK, weights[:, part])
            if logits is not None:
                self._scores(logits[:, part, : self.num_experts])
        self.num_tokens += num_tokens

    def _null_is_last(self, ids: Tensor) -> Tensor:
        ids_LTK = ids.to(torch.int64)
        is_real = (ids_LTK >= 0) & (ids_LTK < self.num_experts)
        return torch.where(is_real, ids_LTK, self.num_experts)

    def _count(self, ids_LTK: Tensor, task_T: Tensor | None) -> Tensor:
        layers, tokens, _ = ids_LTK.shape
        hot = torch.zeros(layers, tokens, self.num_experts + 1, device=ids_LTK.device)
        hot_LTE = hot.scatter_(2, ids_LTK, 1.0)[..., : self.num_experts]
        pairs_LEE = torch.bmm(hot_LTE.mT, hot_LTE)
        self.coactivation += pairs_LEE.long()
        self.count += pairs_LEE.diagonal(dim1=1, dim2=2).long()
        if layers > 1:
            self.transition += torch.bmm(hot_LTE[:-1].mT, hot_LTE[1:]).long()
        if task_T is None:
            self.task_count[0] += pairs_LEE.diagonal(dim1=1, dim2=2).long()
        else:
            task_UT = F.one_hot(task_T, len(self.task_count)).T.to(hot_LTE)
            self.task_count += torch.matmul(task_UT, hot_LTE).transpose(0, 1).long()
        return hot_LTE

    def _batches(self, hot_LTE: Tensor) -> None:
        rows_LNE, joined = hot_LTE, 1
        for index, size in enumerate(self.batch_sizes):
            if rows_LNE.shape[1] * joined < size:
                break
            if size % joined:
                rows_LNE, joined = hot_LTE, 1
            step, num = size // joined, rows_LNE.shape[1] * joined // size
            rows_LNE = rows_LNE[:, : num * step].unflatten(1, (num, step)).sum(2)
            joined = size
            distinct_LN = (rows_LNE > 0).sum(2)
            self._tally(self.distinct_hist[index], distinct_LN)
            width = max(size, NUM_BUSIEST_BINS)
            busiest_LN = rows_LNE.amax(2).long().sub(1).clamp_min(0) * NUM_BUSIEST_BINS // width
            self._tally(self.busiest_hist[index], busiest_LN)

    @staticmethod
    def _tally(hist_LB: Tensor, bin_LN: Tensor) -> None:
        hist_LB.scatter_add_(1, bin_LN, torch.ones_like(bin_LN))

    def _weights(self, ids_LTK: Tensor, weights: Tensor) -> None:
        flat = ids_LTK.flatten(1)
        weight = weights.flatten(1).to(self.float_type)
        self.weight_sum.scatter_add_(1, flat, weight)
        self.weight_sqsum.scatter_add_(1, flat, weight.square())

    def _scores(self, logits_LTE: Tensor, layers: slice = slice(None)) -> None:
        self.has_logits = True
        if self.score == "softmax":
            log_LTE = logits_LTE.float().log_softmax(-1)
            share_LTE = log_LTE.exp()
        else:
            share_LTE = logits_LTE.float().sigmoid()
            share_LTE = share_LTE / share_LTE.sum(-1, keepdim=True).clamp_min(1e-30)
            log_LTE = share_LTE.clamp_min(1e-30).log()
        self.score_sum[layers] += share_LTE.sum(1, dtype=self.float_type)
        self.entropy_sum[layers] -= (share_LTE * log_LTE).sum((1, 2), dtype=self.float_type)

    def add_scores(self, position: int, logits: Float[Tensor, "T E"]) -> None:
        """Count the scores of one layer alone."""
        part = slice(position, position + 1)
        for piece_TE in logits[:, : self.num_experts].split(2**22 // self.num_experts):
            self._scores(piece_TE[None], part)

    def bad_layers(self) -> list[int]:
        """Positions of the layers whose scores or weights are not finite (waits for the device)."""
        sums_L = self.entropy_sum + self.weight_sum.sum(1).to(self.entropy_sum)
        return torch.nonzero(~torch.isfinite(sums_L)).flatten().tolist()

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays so far, on the host (waits for the device)."""
        names = ["count", "coactivation", "transition", "task_count"]
        names += ["distinct_hist", "busiest_hist"]
        if self.has_logits:
            names += ["score_sum", "entropy_sum"]
        arrays = {name: getattr(self, name).cpu().numpy() for name in names}
        for name in ("weight_sum", "weight_sqsum"):
            arrays[name] = getattr(self, name)[:, : self.num_experts].cpu().numpy()
        return {
            name: a.astype(np.float64) if a.dtype.kind == "f" else a for name, a in arrays.items()
        }
