"""plan.json: one deployment that the simulator chose, with what it expects of it."""

from __future__ import annotations

from pathlib import Path

from mogul.core.files import atomic_write, read_json
from mogul.spec.base import Spec
from mogul.spec.parallel import Parallel
from mogul.spec.quant import QuantScheme
from mogul.spec.workload import Workload


class Plan(Spec):
    """Model, device, layout, formats, load, and the prediction they were chosen for."""

    version: int = 1
    model: str
    device: str
    parallel: Parallel
    quant: QuantScheme
    workload: Workload
    expected: dict[str, float]
    """ttft_s, tpot_s, tokens_per_s_per_device, memory_bytes."""

    def write(self, path: Path) -> None:
        """Write the plan as JSON."""
        atomic_write(path, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read a plan; ArtifactError if it is missing or broken."""
        return cls.parse(read_json(path), where=path.name)
