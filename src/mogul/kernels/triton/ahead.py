"""Compiles all kernels of a layer's first call together, in threads, before the first is needed.

Decides how long a first call waits: as long as its slowest kernel, not as all of them in turn. The
call is rehearsed on tensors without memory; what its launches would need is then compiled.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.triton.launch import INTERPRETED, Launch, listening, next_power_of_2
from mogul.kernels.triton.plans import few_plan, plan_for

_MOST_SLOTS = 1 << 14
"""From here on a call's launches do not depend on its slots."""


def compile_ahead(layer: Any, inputs: tuple[Tensor, ...], *, train: bool) -> None:
    """Compile what a call of this kind launches, forward and, with `train`, backward, once."""
    tokens, slots = inputs[0].shape[0], inputs[3].numel()
    few = not train and layer.shape.uses_few(tokens)
    plan = few_plan(layer.shape) if few else plan_for(layer.shape, tokens)
    key = (id(plan), few, train, next_power_of_2(min(slots, _MOST_SLOTS)))
    if key in layer.ready or INTERPRETED:
        return
    layer.ready[key] = plan  # its id stays taken
    waiting = rehearse(layer, inputs, train=train)
    if len(waiting) > 1:
        compile_together(waiting, layer.device)


Waiting = list[tuple[Launch, tuple[Any, ...]]]
"""Launches that are not compiled yet, with arguments of the kinds they will get."""


def rehearse(layer: Any, inputs: tuple[Tensor, ...], *, train: bool) -> Waiting:
    """What a call would launch and nobody compiled yet, found without memory or a launch."""
    on_paper = [torch.empty_like(tensor, device="meta") for tensor in inputs]
    with listening(launch=False) as heard:
        if not train and layer.shape.uses_few(inputs[0].shape[0]):
            layer.few(*on_paper)
        else:
            out, pre, sort = layer.forward(*on_paper, save=train)
            if train:
                layer.backward(out, *on_paper, pre, sort)
    return list({id(one): (one, args) for one, _, args in heard if one.is_new}.values())


def compile_together(waiting: Waiting, device: int) -> None:
    """Compile and load in threads; errors are left to the launch itself, which meets them again."""
    try:
        from triton.runtime._async_compile import AsyncCompileMode
    except ImportError:  # another Triton: each launch compiles as it comes
        return

    def load(kernel: Any) -> None:
        torch.cuda.set_device(device)
        try:
            _ = kernel.run  # makes the launcher and loads the program
        except Exception:
            return

    with ThreadPoolExecutor(min(len(waiting), os.cpu_count() or 1)) as pool:
        with AsyncCompileMode(pool, ignore_errors=True):
            found = [launch.compiled(args) for launch, args in waiting]
        kernels = [getattr(kernel, "kernel", kernel) for kernel in found]
        list(pool.map(load, [kernel for kernel in kernels if kernel is not None]))
