"""The record of what a run reads: token folders, their weights, which part of them."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec

Part = Literal["train", "held_out"]


class DataSource(Spec):
    """One folder of token shards, as `mogul data build` wrote it."""

    path: str
    """The folder that holds `tokens.json`."""

    weight: float | None = Field(default=None, gt=0)
    """Share of the windows, relative to the other sources. Give it for all sources or for none;
    without weights every source has the share of its tokens."""


class DataSpec(Spec):
    """What a training run reads, without its order: seed and window length belong to the run."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    """Folders to mix; a plain string stands for a folder without a weight."""

    part: Part = "train"
    """The part of every folder that is read."""

    verify: bool = True
    """Compare every shard with its checksum when it is opened (about a second a gigabyte)."""

    @field_validator("sources", mode="before")
    @classmethod
    def _paths_are_sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            return value
        return tuple({"path": one} if isinstance(one, str) else one for one in value)

    @model_validator(mode="after")
    def _weights_for_all_or_none(self) -> Self:
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            lacking = self.sources[given.index(False)].path
            raise ConfigError(
                f"data: {lacking} has no weight, but others have one",
                fix="give every source a weight, or none",
            )
        return self
