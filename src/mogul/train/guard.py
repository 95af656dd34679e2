"""Skip a step that spikes, and give its batch back later (arXiv 2503.05139).

A loss is a spike when it lies `factor` standard deviations above its running mean, or when it or
the gradient is no number. The weights and the optimizer are not touched; the batch returns after
a while, `retries` times at most. Many skips in a row are an error: then it is no outlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import MogulError

MEMORY = 0.98
"""Decay of the running mean and variance."""
SETTLING_STEPS = 20
RETURN_AFTER_STEPS = 10
MOST_IN_A_ROW = 5


class SpikeGuard:
    """Decides which steps count; off when `factor` is 0."""

    def __init__(self, factor: float, retries: int) -> None:
        self.factor, self.retries = factor, retries
        self.mean = self.square = 0.0
        self.seen = self.skipped = self.in_a_row = 0
        self._waiting: list[tuple[int, int, list[Tensor]]] = []  # due step, tries left, batches

    @property
    def is_on(self) -> bool:
        """Whether anything is ever skipped."""
        return self.factor > 0

    def due(self, step: int) -> tuple[list[Tensor], int] | None:
        """A skipped batch whose time has come, and how often it may come back again."""
        if self._waiting and self._waiting[0][0] <= step:
            _, tries, batches = self._waiting.pop(0)
            return batches, tries
        return None

    def accepts(self, loss: float, *, is_finite: bool) -> bool:
        """Whether a step with this loss is to be taken; if so it enters the running mean."""
        deviation = max(self.square - self.mean**2, 0.0) ** 0.5
        if not is_finite or (
            self.is_on
            and self.seen >= SETTLING_STEPS
            and loss > self.mean + self.factor * max(deviation, 1e-3)
        ):
            return False
        decay = min(MEMORY, self.seen / (self.seen + 1))
        self.mean = decay * self.mean + (1 - decay) * loss
        self.square = decay * self.square + (1 - decay) * loss * loss
        self.seen += 1
        self.in_a_row = 0
        return True

    def skip(self, step: int, batches: list[Tensor], tries: int | None = None) -> None:
        """Put the batches of a spike aside; MogulError when spikes do not end."""
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= MOST_IN_A_ROW:
            raise MogulError(
                f"{MOST_IN_A_ROW} steps in a row were skipped, the last is step {step}; "
                "the weights before them are kept",
                fix="lower the learning rate, or raise run.spike_factor",
            )
        left = self.retries if tries is None else tries
        if left > 0:
            self._waiting.append((step + RETURN_AFTER_STEPS, left - 1, batches))

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """For a checkpoint: numbers for JSON, and the waiting batches."""
        numbers = {
            name: getattr(self, name) for name in ("mean", "square", "seen", "skipped", "in_a_row")
        }
        waiting = [[due, tries, len(batches)] for due, tries, batches in self._waiting]
        tensors = {
            f"waiting_{i}_{j}": batch
            for i, (_, _, batches) in enumerate(self._waiting)
            for j, batch in enumerate(batches)
        }
        return {**numbers, "waiting": waiting}, tensors

    def restore(self, numbers: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from a state."""
        for name in ("mean", "square", "seen", "skipped", "in_a_row"):
            setattr(self, name, numbers[name])
        self._waiting = [
            (due, tries, [torch.as_tensor(tensors[f"waiting_{i}_{j}"]) for j in range(count)])
            for i, (due, tries, count) in enumerate(numbers["waiting"])
        ]
