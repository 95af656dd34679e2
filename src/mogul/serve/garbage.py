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
from collections.abc import Callable

import torch


def set_aside(device: torch.device, owner: object) -> Callable[[], object]:
    """Collect once, then keep all that is left out of later collections.

    Returns:
        What lets everything be collected again, once; an owner that goes without it does so, too.
    """
    if device.type == "cpu":
        return lambda: None
    gc.collect()
    gc.freeze()
    collect_again = weakref.finalize(owner, gc.unfreeze)
    collect_again.atexit = False
    return collect_again
