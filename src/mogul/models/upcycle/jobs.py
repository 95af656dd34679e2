"""What is written, in which order, and how each tensor comes to be from one dense tensor.

All tensors cut from one dense matrix follow each other, so that matrix is read once and is the
only one held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from torch import Tensor

from mogul.models.tensor_file import NewTensor, StoredTensor, write_tensor
from mogul.models.upcycle.algebra import Part, expert_matrix, ffn_part, router_name, router_weight
from mogul.models.upcycle.plan import UpcyclePlan


@dataclass(frozen=True, slots=True)
class Job:
    """One output tensor and what it is made from."""

    entry: NewTensor
    source: str
    """Dense tensor it is cut from or copied from."""
    layer: int = 0
    part: Part | None = None
    """None: the dense tensor as it is."""
    expert: int = 0

    @property
    def is_routed(self) -> bool:
        """Whether it belongs to a routed expert."""
        return self.part in (Part.GATE, Part.UP, Part.DOWN)


def list_jobs(places: Mapping[str, StoredTensor], plan: UpcyclePlan) -> Iterator[Job]:
    """List the output tensors; those of one dense matrix follow each other."""
    for name, place in places.items():
        found = ffn_part(name)
        if found is None:
            yield Job(NewTensor(name, place.shape, place.dtype), name)
            continue
        layer, part = found
        if part is Part.GATE:
            shape = (plan.num_experts, place.shape[1])
            entry = NewTensor(router_name(layer), shape, place.dtype)
            yield Job(entry, name, layer, Part.ROUTER)
        shape = _expert_shape(place.shape, part, plan)
        for expert in range(plan.num_experts):
            expert_name = name.replace(".mlp.", f".mlp.experts.{expert}.")
            yield Job(NewTensor(expert_name, shape, place.dtype), name, layer, part, expert)


def _expert_shape(shape: tuple[int, ...], part: Part, plan: UpcyclePlan) -> tuple[int, int]:
    rows, columns = shape
    if part is Part.DOWN:
        return rows, plan.expert_width(columns)
    return plan.expert_width(rows), columns


class Maker:
    """Writes output tensors and holds the one dense matrix they are cut from."""

    def __init__(self, places: Mapping[str, StoredTensor], plan: UpcyclePlan, router_std: float):
        self.places = places
        self.plan = plan
        self.router_std = router_std
        self.held: tuple[str, Tensor] | None = None

    def write(self, file: BinaryIO, job: Job) -> None:
        """Append the bytes of one output tensor."""
        if job.part is None:
            for chunk in self.places[job.source].chunks():
                file.write(chunk)
        elif job.part is Part.ROUTER:
            hidden_size = job.entry.shape[1]
            weight = router_weight(hidden_size, self.router_std, layer=job.layer, plan=self.plan)
            write_tensor(file, weight.to(job.entry.dtype))
        else:
            dense, where = self._dense(job.source), {"layer": job.layer, "expert": job.expert}
            write_tensor(file, expert_matrix(dense, job.part, plan=self.plan, **where))

    def _dense(self, name: str) -> Tensor:
        if self.held is None or self.held[0] != name:
            self.held = None  # free the old one before the new one is read
            self.held = (name, self.places[name].read())
        return self.held[1]
