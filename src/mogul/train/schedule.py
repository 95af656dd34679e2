"""The learning rate over a training: warm-up, then constant, cosine or stable-then-decay."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from mogul.spec.base import Spec

Kind = Literal["constant", "cosine", "wsd"]


class ScheduleSpec(Spec):
    """Factors of the peak learning rate."""

    kind: Kind = "wsd"
    """After the warm-up: stay; fall along a cosine to the end; or stay and fall linearly in the
    last part (warm-up, stable, decay)."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises linearly to its peak."""

    decay_share: float = Field(default=0.2, ge=0, le=1)
    """Share of all steps in which `wsd` falls."""

    final_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where it ends, as a share of the peak."""

    def factor(self, step: int, num_steps: int | None) -> float:
        """Share of the peak rate at `step`, counted from 0; `num_steps` is needed to fall."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant" or num_steps is None:
            return 1.0
        if self.kind == "cosine":
            done = (step - self.warmup_steps) / max(1, num_steps - self.warmup_steps)
            fallen = 0.5 - 0.5 * math.cos(math.pi * min(1.0, done))
        else:
            length = max(1, round(self.decay_share * num_steps))
            fallen = min(1.0, max(0.0, (step - (num_steps - length)) / length))
        return 1.0 - (1.0 - self.final_ratio) * fallen
