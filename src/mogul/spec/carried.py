"""The two small models that mogul carries: `nano` (grouped routing, MTP layer) and `nano-topk`.

Checkpoints like any other, under 5 MB each, trained by `mogul train recipes/nano.toml` on English
documentation; their folders (`models/nano/`) hold the recipe, the log and a card. They serve where
a real model is needed without a network: first steps, tests, speculation.
"""

from __future__ import annotations

from pathlib import Path

NAMES = ("nano", "nano-topk")
_ROOT = Path(__file__).parent.parent / "models" / "nano"


def carried_folder(name: str | Path) -> Path | None:
    """The folder of a carried model; None for any other name."""
    return _ROOT / str(name) if str(name) in NAMES else None
