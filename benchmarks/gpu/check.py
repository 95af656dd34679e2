"""Correctness of the Triton expert layer on the device here: numbers, graphs, compile, determinism.

python benchmarks/gpu/check.py [--shapes A,C] [--tokens 1,8,64,456,4096]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Case, make_case, make_tokens, reference, rel, time_graph

from mogul.kernels.triton import ops

LIMIT = 5e-3
FAILED: list[str] = []


def expect(name: str, error: float, limit: float = LIMIT) -> None:
    """Print one line; remember a failure."""
    good = error <= limit
    print(("ok  " if good else "FAIL"), name, f"{error:.2e}", flush=True)
    if not good:
        FAILED.append(name)


def inputs_of(case: Case, tokens: int, kind: str):
    """Inputs: random, skewed (one expert in 90 % of tokens), half empty, or with null picks."""
    x, ids, weights = make_tokens(case, tokens)
    experts = case.dims[0]
    if kind == "skewed":
        ids[: tokens * 9 // 10, 0] = 3
        ids[:, 1:] = torch.where(ids[:, 1:] == 3, 4, ids[:, 1:])
    if kind == "empty":
        ids //= 2
    if kind == "null":
        ids[::2, -1] = experts
        ids[1::3, 0] = -1
    return x, ids, weights


def check_forward(case: Case, tokens: int, kind: str) -> None:
    """Against fp32 on a sample of tokens, twice (determinism)."""
    x, ids, weights = inputs_of(case, tokens, kind)
    pick = torch.randperm(tokens, device="cuda")[:64]
    with torch.no_grad():
        out = ops.run(x, case.gate_up, case.down, ids, weights)
        again = ops.run(x, case.gate_up, case.down, ids, weights)
    want = reference(case, x[pick].float(), ids[pick], weights[pick])
    expect(f"forward {case.name} {tokens} {kind}", rel(out[pick], want))
    expect(f"  same twice {case.name} {tokens}", float(not torch.equal(out, again)), 0)


def check_grad(case: Case, tokens: int, kind: str) -> None:
    """dx, d weights on a sample; d gate_up, d down of two experts."""
    x, ids, weights = inputs_of(case, tokens, kind)
    leaves = [t.detach().requires_grad_() for t in (x, weights, case.gate_up, case.down)]
    dout = torch.randn_like(x)
    out = ops.run(leaves[0], leaves[2], leaves[3], ids, leaves[1])
    dx, dweights, dgate_up, ddown = torch.autograd.grad(out, leaves, dout)
    pick = torch.randperm(tokens, device="cuda")[:64]
    xs = x[pick].float().requires_grad_()
    ws = weights[pick].requires_grad_()
    want_x, want_w = torch.autograd.grad(
        reference(case, xs, ids[pick], ws), [xs, ws], dout[pick].float()
    )
    expect(f"dx {case.name} {tokens} {kind}", rel(dx[pick], want_x))
    expect(f"dweights {case.name} {tokens} {kind}", rel(dweights[pick], want_w))
    for e in (3, int(ids[0, 1].clamp(0, case.dims[0] - 1))):
        token, k = (ids == e).nonzero(as_tuple=True)
        if not len(token):
            expect(f"empty expert {e}", float(dgate_up[e].abs().max() + ddown[e].abs().max()), 0)
            continue
        w1 = case.gate_up[e].float().requires_grad_()
        w2 = case.down[e].float().requires_grad_()
        g, u = (x[token].float() @ w1.T).chunk(2, -1)
        y = (torch.nn.functional.silu(g) * u) @ w2.T * weights[token, k, None]
        want = torch.autograd.grad(y, [w1, w2], dout[token].float())
        expect(f"d gate_up[{e}] {case.name} {tokens} {kind}", rel(dgate_up[e], want[0]))
        expect(f"d down[{e}] {case.name} {tokens} {kind}", rel(ddown[e], want[1]))


def check_graph_and_compile(case: Case, tokens: int) -> None:
    """A captured graph follows its inputs; a compiled function equals the eager one."""
    x, ids, weights = make_tokens(case, tokens)
    with torch.no_grad():
        want = ops.run(x, case.gate_up, case.down, ids, weights)
        out = torch.empty_like(want)
        static = x.clone()
        call = lambda: out.copy_(ops.run(static, case.gate_up, case.down, ids, weights))  # noqa: E731
        print("     graph ms", round(time_graph([call], 5), 4))
        compiled = torch.compile(lambda *a: ops.run(*a) * 1, fullgraph=True)
        got = compiled(x, case.gate_up, case.down, ids, weights)
    expect(f"graph {case.name} {tokens}", float(not torch.equal(out, want)), 0)
    expect(f"compile {case.name} {tokens}", float(not torch.equal(got, want)), 0)


def check_compiled_grad(case: Case, tokens: int) -> None:
    """Gradients through torch.compile(fullgraph=True)."""
    x, ids, weights = make_tokens(case, tokens)
    leaves = [t.detach().requires_grad_() for t in (x, weights)]
    dout = torch.randn_like(x)
    step = lambda a, w: ops.run(a, case.gate_up, case.down, ids, w)  # noqa: E731
    want = torch.autograd.grad(step(*leaves), leaves, dout)
    got = torch.autograd.grad(torch.compile(step, fullgraph=True)(*leaves), leaves, dout)
    expect(f"compiled dx {case.name} {tokens}", rel(got[0], want[0]), 1e-6)
    expect(f"compiled dweights {case.name} {tokens}", rel(got[1], want[1]), 1e-6)


def force_split(rows: int) -> None:
    """Make every plan use the kernels with split roles."""
    from mogul.kernels.triton import layer
    from mogul.kernels.triton.plans import Plan, Tile

    n = 256 if rows == 128 else 128
    tile = Tile(n=n, k=64, m=rows, stages=4, split=True, per_sm=1)
    up = replace(tile, n=n // 2, counted=True)
    grad = replace(tile, n=128)
    plan = Plan(rows, up, tile, grad, tile, tile, tile)
    layer.plan_for = lambda shape, tokens: plan


def main() -> int:
    """Run all; exit 1 on a failure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="C,A")
    parser.add_argument("--tokens", default="1,2,8,64,456,4096")
    parser.add_argument("--grad-tokens", default="1,200,4096")
    parser.add_argument(
        "--split", type=int, default=0, help="row tile: force the Hopper kernels with split roles"
    )
    args = parser.parse_args()
    if args.split:
        force_split(args.split)
    for name in args.shapes.split(","):
        case = make_case(name)
        for tokens in map(int, args.tokens.split(",")):
            for kind in (
                ("random", "skewed", "empty", "null") if tokens in (64, 4096) else ("random",)
            ):
                try:
                    check_forward(case, tokens, kind)
                except Exception as error:
                    expect(
                        f"{name} {tokens} {kind}: {type(error).__name__} {str(error)[:300]}",
                        9.0,
                    )
        for tokens in map(int, args.grad_tokens.split(",")):
            for kind in ("random", "skewed", "empty", "null") if tokens == 4096 else ("random",):
                try:
                    check_grad(case, tokens, kind)
                except Exception as error:
                    expect(
                        f"grad {name} {tokens} {kind}: {type(error).__name__} {str(error)[:300]}",
                        9.0,
                    )
        for check, tokens in (
            (check_graph_and_compile, 1),
            (check_graph_and_compile, 64),
            (check_compiled_grad, 300),
        ):
            try:
                check(case, tokens)
            except Exception as error:
                expect(
                    f"{check.__name__} {name} {tokens}: {type(error).__name__} {str(error)[:400]}",
                    9.0,
                )
        del case
        torch.cuda.empty_cache()
    print("FAILED:", FAILED)
    return bool(FAILED)


if __name__ == "__main__":
    sys.exit(main())
