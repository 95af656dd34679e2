"""Python's garbage collector beside a running engine.

A full collection looks at every object of the process, half a million with compiled layers: 0.3 to
0.5 s, twelve decode steps, in which the device waits. What is there when an engine on an
accelerator is ready is set aside: collections then see only what requests leave behind.

Where one of several engines ends, all is collected again, with the pauses: what it leaves must go,
and Python cannot tell whose an object is.
"""

from __future__ import annotations

import gc
import weakref

import torch


def set_aside(device: torch.device, owner: object) -> None:
    """Collect once, then keep all that is left out of later collections, while the owner lives."""
    if device.type != "cpu":
        gc.collect()
        gc.freeze()
        weakref.finalize(owner, gc.unfreeze).atexit = False  # of one that nobody closes


def collect_again(device: torch.device) -> None:
    """Let everything be collected again."""
    if device.type != "cpu":
        gc.unfreeze()
