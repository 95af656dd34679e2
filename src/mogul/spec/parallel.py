"""How a model is spread over devices: the layout of attention, experts and stages.

A stage has `tp * dp` devices. Attention (and dense layers) is sharded over `tp` and replicated
`dp` times; routed experts stand on the same devices as `ep` ranks of whole experts, each cut over
`moe_tp`; the shared expert is cut over `shared_tp`. `PRESETS["h2p"]` is the hybrid layout of
arXiv 2505.21411, section 5.1. `check` says what any engine needs, `check_runs` what the room
`parallel` can run.
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

    expert_replicas: int = Field(default=0, ge=0)
    """Copies of busy experts beyond one each; with E experts, ep ranks hold (E + copies) / ep."""

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
        experts += self.expert_replicas
        if self.expert_replicas and experts % self.expert_ranks:
            raise ConfigError(
                f"{experts} experts and copies do not fill ep={self.expert_ranks} ranks equally",
                fix=f"use {-experts % self.expert_ranks + self.expert_replicas} expert_replicas",
            )
        if self.expert_ranks > experts:
            raise ConfigError(
                f"ep={self.expert_ranks} ranks for {experts} experts: some would hold none",
                fix=f"lower ep to {experts} or less, or give it expert_replicas",
            )
        if width % self.expert_tp:
            raise ConfigError(
                f"moe_tp={self.expert_tp} does not divide the expert width {width}",
                fix=f"use one of {tuple(n for n in divisors(width) if n <= 64)}",
            )

    def check_runs(self, model: ModelSpec, dispatch: str = "auto") -> None:
        """Raise ConfigError if mogul itself cannot run `model` like this; names what it can."""
        self.check(model)
        if self.pp > 1:
            raise ConfigError(
                f"pp={self.pp}: mogul runs no pipeline stages", fix="use pp=1 and more tp or dp"
            )
        kv_heads = model.attention.num_kv_heads
        if kv_heads % self.tp:
            raise ConfigError(
                f"tp={self.tp} does not divide the {kv_heads} key-value heads",
                fix=f"use tp = one of {divisors(kv_heads)}",
            )
        legal = tuple(sorted({1, self.tp, self.stage_devices}))
        if self.shared_ranks not in legal:
            raise ConfigError(
                f"shared_tp={self.shared_ranks} is neither 1, tp nor all devices of the stage",
                fix=f"use one of {legal}",
            )
        if model.moe and model.moe.shared_width % self.shared_ranks:
            raise ConfigError(
                f"shared_tp={self.shared_ranks} does not divide the shared expert's width "
                f"{model.moe.shared_width}",
                fix=f"use one of {legal}",
            )
        if model.moe and dispatch == "static":
            model.moe.grouping.check_devices(self.expert_ranks)

    def describe(self) -> str:
        """Short text such as "tp4 dp2 ep8"."""
        parts = [("tp", self.tp), ("dp", self.dp), ("pp", self.pp), ("ep", self.expert_ranks)]
        parts.append(("moe_tp", self.expert_tp))
        told = [f"{name}{count}" for name, count in parts if count > 1]
        return " ".join(told) or "one device"


PRESETS: dict[str, Parallel] = {
    "h2p": Parallel(tp=4, dp=2, ep=4, moe_tp=2, shared_tp=8),
}
"""Layouts with a name; "h2p": attention DP2 x TP4, experts EP4 x TP2, shared expert TP8."""


def h2p(devices: int) -> Parallel:
    """The hybrid layout scaled to a power of two of devices: two halves of attention.

    2 devices are DP2 x EP2; from 4 on each expert is cut in two, as in the preset of 8.
    """
    if devices < 2 or devices & (devices - 1):
        raise ConfigError(
            f"the hybrid layout has no form for {devices} devices", fix="use 2, 4, 8, 16, ..."
        )
    moe_tp = 2 if devices >= 4 else 1
    return Parallel(tp=devices // 2, dp=2, ep=devices // moe_tp, moe_tp=moe_tp, shared_tp=devices)
