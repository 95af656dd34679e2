"""The record of a routing rule: how many experts, groups and picks, which scores and weights.

Decides what a legal rule is. Sources: grouped picks arXiv 2505.21411 (Eq. 5-7), group-limited
top-k arXiv 2412.19437, null experts arXiv 2406.13233.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from mogul.core.errors import ConfigError

SCORES = ("softmax", "sigmoid")
WEIGHTINGS = ("probability", "renormalised", "renormalised_in_group")


@dataclass(frozen=True)
class RouterSpec:
    """How a token chooses `top_k` of `num_experts`: top_k / num_groups in every group."""

    num_experts: int
    top_k: int
    num_groups: int = 1
    """Contiguous groups of equal size; 1 is the plain top-k."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Over all experts (and null experts), in float32."""
    weighting: Literal["probability", "renormalised", "renormalised_in_group"] = "probability"
    scaling_factor: float = 1.0
    """Every weight is multiplied by this at last."""
    limit_groups: int | None = None
    """Plain top-k inside this many best groups (by the sum of a group's two best scores)."""
    num_null_experts: int = 0
    """Experts that compute nothing; an equal share of them stands in every group."""

    def __post_init__(self) -> None:
        _check_choice("score", self.score, SCORES)
        _check_choice("weighting", self.weighting, WEIGHTINGS)
        for name in ("num_experts", "top_k", "num_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"router {name}={getattr(self, name)} must be at least 1",
                    fix=f"pass {name}=1 or more; num_groups=1 is plain top-k",
                )
        divided = ["num_experts", "num_null_experts"]
        if self.limit_groups is None:
            divided.append("top_k")
        else:
            self._check_limit(self.limit_groups)
        for name in divided:
            if getattr(self, name) < 0 or getattr(self, name) % self.num_groups:
                raise ConfigError(
                    f"router {name}={getattr(self, name)} is not a multiple of "
                    f"num_groups={self.num_groups}",
                    fix=f"give every group the same share: change {name} or num_groups",
                )
        limit = (self.num_experts + self.num_null_experts) * (self.limit_groups or self.num_groups)
        if self.top_k * self.num_groups > limit:
            raise ConfigError(
                f"router top_k={self.top_k} is more than the {limit // self.num_groups} experts "
                "that may be picked",
                fix="lower top_k",
            )

    def _check_limit(self, limit_groups: int) -> None:
        if not 1 <= limit_groups <= self.num_groups:
            raise ConfigError(
                f"router limit_groups={limit_groups} is not in 1..num_groups={self.num_groups}",
                fix="None picks from all groups",
            )
        if self.num_null_experts or self.weighting == "renormalised_in_group":
            raise ConfigError(
                "group-limited top-k has no fixed picks in a group, so it knows neither null "
                "experts nor weighting 'renormalised_in_group'",
                fix="drop limit_groups, or use another weighting and no null experts",
            )

    @property
    def num_columns(self) -> int:
        """Logits of one token: true experts first, then null experts."""
        return self.num_experts + self.num_null_experts

    @property
    def picks_per_group(self) -> int:
        """Picks of a token in each group (grouped routing)."""
        return self.top_k // self.num_groups

    @cached_property
    def picks_one_each(self) -> bool:
        """One pick in each group whose weight is exactly 1: upcycled models."""
        plain = self.num_null_experts == 0 and self.limit_groups is None
        one = self.top_k == self.num_groups and self.scaling_factor == 1.0
        return plain and one and self.weighting == "renormalised_in_group"


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"router {name}={value!r} is unknown", fix=f"use one of {known}")
