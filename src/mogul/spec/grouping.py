"""How the experts of a layer stand in groups: the type that makes balance a fact.

With M groups and K picks a token, every token picks K/M experts in each group. D devices that
hold M/D whole groups each therefore get exactly T*K/D slots for T tokens, whatever the router
says (arXiv 2505.21411, section 2.2). One record is used by router, kernels, placement and
simulator. Ungrouped top-k routing is the case M = 1.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec


class Grouping(Spec):
    """E experts in M contiguous groups of equal size, K picks a token, K/M in every group."""

    num_experts: int = Field(ge=1)
    """Routed experts in one layer (E)."""

    num_groups: int = Field(default=1, ge=1)
    """Groups the experts are split into (M); expert e stands in group e // (E/M)."""

    top_k: int = Field(ge=1)
    """Picks a token, over all groups (K)."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        experts, groups, picks = self.num_experts, self.num_groups, self.top_k
        if experts % groups:
            raise ConfigError(
                f"{experts} experts cannot stand in {groups} equal groups",
                fix=f"use a number of groups that divides {experts}: {_some(divisors(experts))}",
            )
        if picks % groups:
            raise ConfigError(
                f"{picks} picks a token cannot be shared equally by {groups} groups",
                fix=f"make the picks a multiple of {groups}, or use one of "
                f"{_some(legal_groups(experts, picks))} groups",
            )
        if picks > experts:
            raise ConfigError(
                f"a token cannot pick {picks} of {experts} experts", fix="lower the picks"
            )
        return self

    @property
    def group_size(self) -> int:
        """Experts in one group (E/M)."""
        return self.num_experts // self.num_groups

    @property
    def picks_per_group(self) -> int:
        """Picks every token makes in every group (K/M)."""
        return self.top_k // self.num_groups

    def legal_devices(self) -> tuple[int, ...]:
        """Device counts that are balanced by construction: the divisors of M."""
        return divisors(self.num_groups)

    def check_devices(self, num_devices: int) -> None:
        """Raise ConfigError unless `num_devices` devices get whole groups each."""
        if num_devices < 1 or self.num_groups % num_devices:
            raise ConfigError(
                f"{num_devices} devices cannot hold whole groups of {self.num_groups}",
                fix=f"use {_some(self.legal_devices())} devices",
            )

    def device_of_expert(self, num_devices: int) -> np.ndarray:
        """Contiguous placement of whole groups, int64 of shape [E]."""
        self.check_devices(num_devices)
        return np.arange(self.num_experts) // (self.num_experts // num_devices)

    def slots_per_device(self, num_tokens: int, num_devices: int) -> int:
        """Slots every device gets for `num_tokens` tokens: T*K/D, known before routing."""
        self.check_devices(num_devices)
        return num_tokens * self.top_k // num_devices


def divisors(number: int) -> tuple[int, ...]:
    """All divisors of a positive number, ascending."""
    return tuple(n for n in range(1, number + 1) if number % n == 0)


def legal_groups(num_experts: int, top_k: int) -> tuple[int, ...]:
    """Group counts that divide both the experts and the picks."""
    return tuple(n for n in divisors(num_experts) if top_k % n == 0)


def _some(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers[:-1])) + " or " * (len(numbers) > 1) + str(numbers[-1])
