"""Fast experts and attention on the processor, from torch operators alone."""

from __future__ import annotations

import torch


def why_not_cpu(*, device: torch.device, **_facts: object) -> str | None:
    """The processor only; every shape, layout and dtype."""
    return None if device.type == "cpu" else f"the tensors are on {device}, not on the processor"
