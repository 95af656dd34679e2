"""A placement: which device holds which expert, layer by layer, with what it predicts.

Every device has the same number of slots; slot s stands on device s // slots_per_device and holds
one expert, or none (-1). An expert in several slots has replicas, which share its rows evenly.
Written by `place`, read by `permute`, the exports and the server.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

import numpy as np
from jaxtyping import Int
from pydantic import Field, model_validator

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_write, read_json
from mogul.spec.base import Spec
from mogul.spec.trace import ModelStamp

SCHEMA_VERSION = 1


class LayerPlacement(Spec):
    """The experts of one layer, and the balance this placement predicts."""

    layer: int = Field(ge=0)
    expert_of_slot: tuple[int, ...]
    method: str
    rho: float
    """Rows on the busiest device over the mean, over the whole trace."""

    rho_before: float
    """The same for the contiguous placement without replicas."""

    rho_bound: float
    """No placement of these experts on these devices has a lower rho."""

    gap: float
    """rho / rho_bound - 1."""

    delta: float | None = None
    """Distinct experts on the busiest device over the mean, mean over batches of the trace."""

    delta_before: float | None = None


class Placement(Spec):
    """Expert -> device for every layer with experts."""

    schema_version: Literal[1] = 1
    kind: Literal["mogul.placement"] = "mogul.placement"
    model: ModelStamp
    num_devices: int = Field(ge=1)
    slots_per_device: int = Field(ge=1)
    num_nodes: int = Field(default=1, ge=1)
    method: str
    batch_tokens: int | None = None
    """Tokens of the batches that delta is predicted for."""

    layers: tuple[LayerPlacement, ...]

    @model_validator(mode="after")
    def _every_expert_has_a_slot(self) -> Self:
        num_slots = self.num_devices * self.slots_per_device
        experts = set(range(self.model.num_experts))
        for one in self.layers:
            given = set(one.expert_of_slot) - {-1}
            if len(one.expert_of_slot) != num_slots or not given <= experts:
                raise ConfigError(
                    f"layer {one.layer} fills {len(one.expert_of_slot)} slots with experts up to "
                    f"{max(given, default=-1)}; there are {num_slots} slots and "
                    f"{self.model.num_experts} experts",
                    fix="make the placement again with `mogul place`",
                )
            if missing := sorted(experts - given):
                raise ConfigError(
                    f"layer {one.layer} has no slot for the experts {missing[:8]}",
                    fix="make the placement again with `mogul place`",
                )
        return self

    @property
    def has_replicas(self) -> bool:
        """Whether some expert stands in more than one slot."""
        experts = self.model.num_experts
        return any(sum(e >= 0 for e in one.expert_of_slot) > experts for one in self.layers)

    @property
    def has_empty_slots(self) -> bool:
        """Whether some slot holds no expert."""
        return any(-1 in one.expert_of_slot for one in self.layers)

    def slots_of(self, layer: int) -> Int[np.ndarray, "D S"]:
        """Expert of every slot of every device in one layer."""
        for one in self.layers:
            if one.layer == layer:
                return np.array(one.expert_of_slot).reshape(self.num_devices, -1)
        known = [one.layer for one in self.layers]
        raise ConfigError(f"the placement has no layer {layer}", fix=f"its layers are {known}")

    def device_of_expert(self, layer: int) -> Int[np.ndarray, " E"]:
        """Device of every expert; ConfigError where experts have replicas."""
        if self.has_replicas:
            raise ConfigError("with replicas an expert has no single device", fix="read slots_of")
        slots_DS = self.slots_of(layer)
        device_E = np.empty(self.model.num_experts, dtype=np.int64)
        device_D1 = np.arange(self.num_devices)[:, None]
        is_filled = slots_DS >= 0
        device_E[slots_DS[is_filled]] = np.broadcast_to(device_D1, slots_DS.shape)[is_filled]
        return device_E

    def save(self, file: str | Path) -> None:
        """Write the JSON file, whole or not at all."""
        atomic_write(file, self.model_dump_json(indent=1) + "\n")


def load_placement(file: str | Path) -> Placement:
    """Read a placement; ArtifactError when the file is no placement or of another schema."""
    values = read_json(file)
    if not isinstance(values, dict) or values.get("kind") != "mogul.placement":
        raise ArtifactError(f"{file} is no placement", fix="make one with `mogul place`")
    if values.get("schema_version") != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file} has schema version {values.get('schema_version')!r}; this mogul reads "
            f"{SCHEMA_VERSION}",
            fix="place again with this version",
        )
    return Placement.parse(values, where=str(file))
