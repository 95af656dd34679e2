"""Replays recorded forwards in Triton's interpreter on the CPU; prints whether they are the same.

The launcher of a compiled kernel is played by one that makes tensors of the addresses it gets. A
process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from run_interpreted import SMALL, SWAPPED, TILE, make
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from mogul.kernels.triton import launch, layer, ops, sorter, tape
from mogul.kernels.triton.plans import Plan

TMA = replace(TILE, tma=True, n=16, k=16)
CASES: dict[str, tuple[Plan, int, int]] = {
    "few": (SMALL, 2, 16),
    "swapped": (SWAPPED, 13, 4),
    "three_launch_sort": (SMALL, 17, 4),
    "descriptors": (replace(SMALL, up=TMA, down=TMA), 9, 4),
}
real_call = launch.Launch.__call__
samples: dict[int, tuple[Any, ...]] = {}
entered: list[str] = []


def seen(self: Any, grid: tuple[int, int], device: int, *args: Any) -> None:
    """A launch that remembers what kind of arguments its kernel takes."""
    samples[id(self)] = args
    with _disable_current_modes():  # the interpreter copies tensors, a device's launch does not
        real_call(self, grid, device, *args)


def tensor_at(address: int, like: Tensor) -> Tensor:
    """A tensor at an address, as long as the storage behind `like`."""
    left = like.untyped_storage().nbytes() - like.storage_offset() * like.element_size()
    memory = (ctypes.c_char * left).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype)


def entry(self: Any) -> launch.Entry:
    """Plays the compiled kernel's launcher: plain addresses, descriptors as the driver's lists."""
    wanted = samples[id(self)]

    def call(gx: int, gy: int, gz: int, _stream: int, *given: Any) -> None:
        assert gz == 1
        assert given[:2] == ("function", "packed")
        left, args = list(given[2:]), []
        for sample in wanted:
            if isinstance(sample, Tensor):
                args.append(tensor_at(left.pop(0), sample))
            elif isinstance(sample, int):
                args.append(left.pop(0))
            else:
                base = tensor_at(left[0].data_ptr(), sample.base).view(sample.base.shape)
                args.append(launch.descriptor(base, sample.block_shape))
                del left[:10]
        assert left == ["tail"]
        entered.append(self.kernel.__name__)
        self.kernel[gx, gy](*args, **self.constants)

    described = [None for arg in wanted if not isinstance(arg, (Tensor, int))]
    return launch.Entry(call, ("function", "packed"), described, ("tail",))


def held(plan: Plan, tokens: int, experts: int) -> bool:
    """Whether a replay on tensors that the tape was not made with equals the plain forward."""
    recorded, other = (lambda shape, tokens: plan), (lambda shape, tokens: plan)
    first, second = (make(tokens, 64, 40, experts, 2, kind) for kind in ("null", "skewed"))
    layer.plan_for = recorded
    ops.moe(*first)
    layer.plan_for = other
    entered.clear()
    want = ops.moe(*second)
    layer.plan_for = recorded
    was_plain = not entered
    got = ops.moe(*second)
    return was_plain and len(entered) >= 2 and torch.equal(got, want)


def own_residual() -> bool:
    """Rows that are their own residual leave no tape for rows that have another."""
    plan = lambda shape, tokens: SMALL  # noqa: E731
    first, second = (make(9, 64, 40, 4, 2, kind) for kind in ("null", "skewed"))
    residual = torch.randn_like(second[0])
    layer.plan_for = plan
    want = ops.moe(*first).float() + first[0].float()
    entered.clear()
    is_right = torch.allclose(ops.moe_added(*first, first[0]).float(), want, rtol=2e-2, atol=2e-2)
    plain = ops.moe_added(*second, residual)
    was_plain = not entered
    again = ops.moe_added(*second, residual)
    return is_right and was_plain and len(entered) > 0 and torch.equal(plain, again)


def refused() -> bool:
    """A forward that does more than launch has no tape, and runs as written."""
    out, kept = tape.record(lambda x: x + 1, (torch.ones(3),))
    return kept is None and bool((out == 2).all())


def main() -> None:
    """One JSON object: case -> whether it held."""
    launch.Launch.__call__, launch.Launch.entry = seen, entry
    tape.current_stream = lambda device: 0
    sorter._BLOCKS = ((1 << 62, 32),)
    answers = {"refused": refused()}
    for name, case in CASES.items():
        sorter._ONE_LAUNCH_SLOTS = 0 if name == "three_launch_sort" else 4096
        with torch.no_grad():
            answers[name] = held(*case)
    sorter._ONE_LAUNCH_SLOTS = 4096
    answers["own_residual"] = own_residual()
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
