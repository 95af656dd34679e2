"""Two computations on the same tokens at once: routed experts and a shared one.

Decides when a second stream pays: in captured graphs, and where the work outlasts its launches.
Elsewhere one after the other: while tracing, with gradients, on a processor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

LAUNCH_BOUND_TOKENS = 256
"""Below this a GPU waits for plain launches, and a second stream only adds some."""


def side_by_side(
    first: Callable[[], Tensor], second: Callable[[], Tensor], on: Tensor
) -> tuple[Tensor, Tensor]:
    """Results of both, which read `on`; on a GPU `second` runs on a stream of its own.

    The same bits as one after the other. Can be captured.
    """
    if torch.compiler.is_compiling() or not on.is_cuda or torch.is_grad_enabled():
        return first(), second()
    module = torch.get_device_module(on.device)
    if on.shape[0] < LAUNCH_BOUND_TOKENS and not module.is_current_stream_capturing():
        return first(), second()
    main = module.current_stream(on.device)
    side = _side_of(on.device, main.cuda_stream)
    side.wait_stream(main)
    with module.stream(side):
        beside = second()
    result = first()
    main.wait_stream(side)  # all that side allocates is reused behind its next wait for main
    return result, beside


@cache
def _side_of(device: torch.device, _main: int) -> Any:
    """The stream beside a stream."""
    return torch.get_device_module(device).Stream(device)
