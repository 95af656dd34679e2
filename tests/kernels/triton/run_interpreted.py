"""Runs one case of the Triton kernels in Triton's interpreter on the CPU and prints its errors.

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from mogul.kernels import moe_forward
from mogul.kernels.triton import layer, ops, plans, sorter

TILE = plans.Tile(n=32, k=32, warps=4, stages=2)
SMALL = plans.Plan(
    rows=16,
    up=TILE,
    down=TILE,
    down_grad=TILE,
    up_grad=TILE,
    gate_up_weight=plans.Tile(n=32, k=16, m=32),
    down_weight=plans.Tile(n=32, k=16, m=32),
)
SWAPPED = plans.Plan(
    rows=16,
    up=plans.Tile(n=32, k=64, swap=True, stream=True, group=2, per_sm=1),
    down=plans.Tile(n=32, k=64, swap=True, flatten=True, per_sm=1),
)


def make(tokens: int, width: int, inner: int, experts: int, picks: int, kind: str) -> list[Tensor]:
    """x, gate_up, down, ids, weights; `kind` shapes the routing."""
    torch.manual_seed(tokens)
    score = torch.rand(tokens, experts)
    if kind == "skewed":
        score[:, 1] += 2
    if kind == "empty":
        score[:, : experts // 2] = -1
    weights, ids = score.topk(picks, -1)
    weights = weights.softmax(-1)
    if kind == "null":
        ids[::2, -1] = experts
        ids[:1, 0] = -1
        weights[ids == experts] = float("nan")  # ignored
    gate_up = torch.randn(experts, 2 * inner, width) * 0.2
    down = torch.randn(experts, width, inner) * 0.2
    return [torch.randn(tokens, width), gate_up, down, ids, weights]


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||, infinite for NaN."""
    error = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def errors(tensors: list[Tensor], *, grad: bool) -> dict[str, float]:
    """Relative errors of the output and, with grad, of every gradient against the reference."""
    x, gate_up, down, ids, weights = tensors
    live = (ids >= 0) & (ids < down.shape[0])
    clean = weights.where(live, torch.zeros(()))
    want_in = [t.clone().requires_grad_() for t in (x, gate_up, down, clean)]
    want = moe_forward(*want_in[:3], ids, want_in[3], backend="reference")
    with torch.no_grad():
        found = {"out": relative(ops.run(x, gate_up, down, ids, weights), want)}
    if not grad:
        return found
    dout = torch.randn_like(want)
    want_grads = torch.autograd.grad(want, want_in, dout)
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    out = ops.run(*leaves[:3], ids, leaves[3])
    found["out_train"] = relative(out, want)
    for name, got, ref in zip(
        ("dx", "dgate_up", "ddown", "dweights"),
        torch.autograd.grad(out, leaves, dout),
        want_grads,
        strict=True,
    ):
        found[name] = relative(got, ref)
    return found


def main() -> None:
    """Case names from the command line; one JSON object a line."""
    for name in sys.argv[1:]:
        plan, kind, grad = {
            "small_random": (SMALL, "random", True),
            "small_null": (SMALL, "null", True),
            "small_skewed": (SMALL, "skewed", False),
            "small_empty": (SMALL, "empty", True),
            "three_launch_sort": (SMALL, "null", False),
            "swapped": (SWAPPED, "random", False),
            "few": (SMALL, "null", False),
        }[name]
        layer.plan_for = lambda shape, tokens, plan=plan: plan
        sorter._ONE_LAUNCH_SLOTS = 0 if name == "three_launch_sort" else 4096
        sorter._BLOCKS = ((1 << 62, 32),)  # several blocks
        tokens, experts = (2, 16) if name == "few" else (21, 4)
        print(
            json.dumps({"case": name, **errors(make(tokens, 64, 40, experts, 2, kind), grad=grad)})
        )


if __name__ == "__main__":
    main()
