"""Fast experts and attention on the processor, from torch operators alone."""

from __future__ import annotations

import torch

from mogul.kernels.checks import TRANSFORMED


def why_not_cpu(
    *, device: torch.device, is_transformed: bool = False, **_facts: object
) -> str | None:
    """The processor only; every shape, layout and dtype."""
    if device.type != "cpu":
        return f"the tensors are on {device}, not on the processor"
    return TRANSFORMED if is_transformed else None
