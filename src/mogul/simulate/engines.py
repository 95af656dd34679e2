"""What the software around the kernels costs: launches, the step's host work, overlap.

An engine is a handful of constants with a source each. `scale` is the one constant a person may
fit on measured steps of his own; everything else is fixed here.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mogul.core.errors import ConfigError, nearest
from mogul.spec.base import Spec


class Overlap(Spec):
    """How communication hides behind arithmetic.

    t = max(a * tax, c) + (1 - eta) * min(a * tax, c): none has eta 0, `chunked` in n parts
    1 - 1/n, `fine` (tile by tile, arXiv 2502.19811) 0.9.
    """

    kind: Literal["none", "chunked", "fine"] = "none"
    chunks: int = Field(default=2, ge=2)
    tax: float = Field(default=1.0, ge=1.0)
    """Slow-down of arithmetic that shares the device with communication (20 of 132 units: 1.18)."""

    @property
    def eta(self) -> float:
        """Share of the shorter part that hides."""
        return {"none": 0.0, "chunked": 1 - 1 / self.chunks, "fine": 0.9}[self.kind]

    def seconds(self, arithmetic_s: float, exchange_s: float) -> float:
        """Time of both together."""
        if self.kind == "none" or not exchange_s:
            return arithmetic_s + exchange_s
        taxed = arithmetic_s * self.tax
        return max(taxed, exchange_s) + (1 - self.eta) * min(taxed, exchange_s)


class Engine(Spec):
    """One serving engine (or training framework) as the simulator sees it."""

    name: str = "mogul"
    has_graphs: bool = True
    """Steps are replayed from a captured graph; otherwise every kernel is launched by the host."""

    small_kernels: float = 3.0
    """Kernels a layer besides norms and matrix products (rotation, cache write, quantise...)."""

    joins: bool = False
    """In decode steps norms, rotations, activations, picks and sums are done by the kernels beside
    them: no launches of their own, and no bytes that these do not move anyway."""

    step_host_s: float = 5e-4
    """Host time between two decode steps that nothing hides: schedule, sample, detokenise."""

    exchange: Literal["auto", "all_gather", "all_to_all"] = "auto"
    """How tokens reach experts on other ranks when attention is data-parallel."""

    uses_nccl: bool = True
    """Ranks talk by NCCL, so its measured times count; others have kernels of their own for small
    sums, which the formula is nearer to."""

    sends_once: bool = True
    """A token goes once to every rank that needs it, not once a pick."""

    overlap: Overlap = Overlap()
    mixes_prefill: bool = True
    """Prompts are computed in between (or together with) decode steps of the same device."""

    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    """Share of the device's memory the engine takes."""

    scale: float = Field(default=1.0, gt=0)
    """The fitted constant: measured over predicted time of a step."""

    kernels: str = ""
    """Whose measured kernels to prefer (an engine name of the tables)."""


_ENGINES = {
    # Its host prepares a step while the last one runs: 3.85 ms a step, 3.78 of kernels (H100).
    "mogul": Engine(kernels="mogul", step_host_s=1e-4, joins=True),
    "vllm": Engine(name="vllm", kernels="vllm", step_host_s=1.0e-3, uses_nccl=False),
    "sglang": Engine(name="sglang", kernels="sglang", step_host_s=5e-4, uses_nccl=False),
    "trtllm": Engine(name="trtllm", kernels="trtllm", step_host_s=5e-4, uses_nccl=False),
    "transformers": Engine(
        name="transformers",
        has_graphs=False,
        small_kernels=25.0,
        step_host_s=1e-2,
        kernels="transformers",
    ),
    "ascend": Engine(name="ascend", small_kernels=6.0, step_host_s=1e-3),
}


def engine(name: str) -> Engine:
    """Return an engine by name; ConfigError with the nearest name."""
    if name not in _ENGINES:
        raise ConfigError(f"unknown engine {name!r}", fix=nearest(name, _ENGINES))
    return _ENGINES[name]
