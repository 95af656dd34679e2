"""What ranks compute in the tests on several GPUs; importable, so that they find it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from mogul.bench.devices import WAYS, Request, check_exact, prepare
from mogul.bench.devices_cases import Way, dispatcher_of, make_inputs
from mogul.bench.devices_clock import Clock, host_waits
from mogul.bench.kernels import LayerShape
from mogul.parallel import World, static
from mogul.parallel import window as windows

SHAPE = LayerShape(16, 4, 256, 128, 4)


def errors_by_way(world: World) -> dict[str, float]:
    """Relative error of every way against all experts on one device, forward and backward."""
    setup = prepare(world, Request(shape=SHAPE, budget_s=0.01))
    ways = [way for way in WAYS if way.dispatch != "transformers"]
    found = {way.name: check_exact(setup, way, 96) for way in ways}
    static.EARLY_BYTES = 0  # picks before their tokens, as for long moves
    early = {f"{way.name}, picks first": check_exact(setup, way, 96) for way in ways if way.wire}
    return found | early


@torch.no_grad()
def replay(world: World, wire: str | None) -> dict[str, object]:
    """Thirty layers in one graph, replayed on new tokens; waits for the host of a plain call."""
    setup = prepare(world, Request(shape=SHAPE, budget_s=0.01))
    way = Way("grouped", "static", wire=wire)  # type: ignore[arg-type]
    dispatcher = dispatcher_of(world, SHAPE, way, 32)
    plain = dispatcher_of(world, SHAPE, Way("grouped", "static"), 32)
    inputs = make_inputs(world, SHAPE, way, "skewed", 32, torch.bfloat16)
    x = inputs.x.clone()

    def layers(run) -> torch.Tensor:
        y = x
        for _ in range(30):
            y = y + run(y, inputs.ids, inputs.weights, setup.weights.run)
        return y

    out = torch.empty_like(x)
    errors = []
    with Clock(world.device).captured(lambda: out.copy_(layers(dispatcher))) as again:
        for seed in range(20):
            torch.manual_seed(100 * world.rank + seed)
            x.copy_(torch.randn_like(x))
            again()
            wanted = layers(plain)
            errors.append(float((out - wanted).float().norm() / wanted.float().norm()))
    call = lambda: dispatcher(x, inputs.ids, inputs.weights, setup.weights.run)  # noqa: E731
    return {"error": max(errors), **host_waits(call)}


def dies(world: World, through: str) -> None:
    """Rank 1 vanishes while the other waits for it, in a collective or at a window's barrier."""
    move = _move(world, through)
    move()
    torch.accelerator.synchronize()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    move()
    torch.accelerator.synchronize()


def comes_late(world: World) -> None:
    """Rank 1 lives, but does something else, while the other waits at a window's barrier."""
    windows.WAIT_LIMIT_S = 3.0
    move = _move(world, "window")
    move()
    torch.accelerator.synchronize()
    if world.rank == 1:
        time.sleep(30)
    move()
    torch.accelerator.synchronize()


def _move(world: World, through: str) -> Callable[[], object]:
    x = torch.ones(2, 8, device=world.device)
    if through == "collective":
        return lambda: dist.all_reduce(x)
    group = dist.group.WORLD
    assert group is not None
    window = windows.open_window(group)
    assert window is not None
    return lambda: window.gather((x,), "rows").end()
