"""What every cost answers with: a time, its spread, and how it is known."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """Time of one call and how it is known."""

    seconds: float
    sigma: float
    """Standard deviation of the logarithm."""

    tier: str
    """measured | interpolated | transferred | curve | guess."""

    sources: tuple[str, ...] = ()
