"""How a model is spread over devices: the layout of attention, experts and stages.

A stage has `tp * dp` devices. Attention (and dense layers) is sharded over `tp` and replicated
`dp` times; routed experts stand on the same devices as `ep` ranks of whole experts, each cut over
`moe_tp`; the shared expert is cut over `shared_tp`. The hybrid layout of arXiv 2505.21411,
section 5.1, is `Parallel(tp=4, dp=2, ep=4, moe_tp=2, shared_tp=8)`.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec
from mogul.spec.grouping import divisors
from mogul.spec.model import ModelSpec


class Parallel(Spec):
    """Ranks by kind; unnamed ones follow from the named."""

    tp: int = Field(default=1, ge=1)
    """Devices one copy of the attention is cut over."""

    dp: int = Field(default=1, ge=1)
    """Copies of the attention, each with its own requests."""

    pp: int = Field(default=1, ge=1)
    """Pipeline stages."""

    ep: int | None = Field(default=None, ge=1)
    """Ranks the routed experts are spread over; None means all devices of a stage."""

    moe_tp: int | None = Field(default=None, ge=1)
    """Devices one expert is cut over; None means what is left of a stage."""

    shared_tp: int | None = Field(default=None, ge=1)
    """Devices the shared expert is cut over; None means `tp`."""

    @model_validator(mode="after")
    def _fits_the_stage(self) -> Self:
        stage = self.stage_devices
        if self.expert_ranks * self.expert_tp != stage:
            raise ConfigError(
                f"ep={self.expert_ranks} x moe_tp={self.expert_tp} experts ranks do not fill the "
                f"tp={self.tp} x dp={self.dp} = {stage} devices of a stage",
                fix=f"make ep x moe_tp = {stage}; ep may be one of {divisors(stage)}",
            )
        if self.shared_tp and stage % self.shared_tp:
            raise ConfigError(
                f"shared_tp={self.shared_tp} does not divide the {stage} devices of a stage",
                fix=f"use one of {divisors(stage)}",
            )
        return self

    @property
    def stage_devices(self) -> int:
        """Devices of one pipeline stage."""
        return self.tp * self.dp

    @property
    def devices(self) -> int:
        """All devices of one copy of the model."""
        return self.stage_devices * self.pp

    @property
    def expert_ranks(self) -> int:
        """Ranks of whole experts."""
        if self.ep is not None:
            return self.ep
        return max(1, self.stage_devices // (self.moe_tp or 1))

    @property
    def expert_tp(self) -> int:
        """Devices one expert is cut over."""
        if self.moe_tp is not None:
            return self.moe_tp
        return max(1, self.stage_devices // self.expert_ranks)

    @property
    def shared_ranks(self) -> int:
        """Devices the shared expert is cut over."""
        return self.shared_tp or self.tp

    def check(self, model: ModelSpec) -> None:
        """Raise ConfigError if `model` cannot be laid out like this."""
        heads = model.attention.num_heads
        if heads % self.tp:
            raise ConfigError(
                f"tp={self.tp} does not divide the {heads} query heads",
                fix=f"use one of {divisors(heads)}",
            )
        if self.pp > model.num_layers:
            raise ConfigError(f"pp={self.pp} stages for {model.num_layers} layers", fix="lower pp")
        if model.moe:
            self._check_experts(model)

    def _check_experts(self, model: ModelSpec) -> None:
        assert model.moe is not None
        experts, width = model.moe.grouping.num_experts, model.moe.expert_width
        if self.expert_ranks > experts:
            raise ConfigError(
                f"ep={self.expert_ranks} ranks for {experts} experts: some would hold none",
                fix=f"lower ep to {experts} or less",
            )
        if width % self.expert_tp:
            raise ConfigError(
                f"moe_tp={self.expert_tp} does not divide the expert width {width}",
                fix=f"use one of {tuple(n for n in divisors(width) if n <= 64)}",
            )

    def describe(self) -> str:
        """Short text such as "tp4 dp2 ep8"."""
        parts = [("tp", self.tp), ("dp", self.dp), ("pp", self.pp), ("ep", self.expert_ranks)]
        parts.append(("moe_tp", self.expert_tp))
        told = [f"{name}{count}" for name, count in parts if count > 1]
        return " ".join(told) or "one device"
