"""Where the time of the experts layer goes: device microseconds of every kernel, by cell.

python benchmarks/gpu/profile_layer.py --cells A:4096,C:16384 --train A:16384 --out DIR
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
from common import make_case, make_tokens
from tune import cells, precompile

from mogul.kernels import moe_forward


def kernel_times(call: Callable[[], object], repeats: int = 5) -> list[tuple[str, float, int]]:
    """(kernel, microseconds a call, launches a call), in order of time."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    rows = [(e.key[:60], e.self_device_time_total / repeats, e.count // repeats) for e in
            prof.key_averages() if e.self_device_time_total > 0]  # fmt: skip
    return sorted(rows, key=lambda row: -row[1])


def train_step(case: Any, tokens: int) -> Callable[[], object]:
    """One forward + backward as a call."""
    x, ids, weights = make_tokens(case, tokens)
    leaves = [x, weights, case.gate_up, case.down]
    for leaf in leaves:
        leaf.requires_grad_()
    dout = torch.randn_like(x)

    def step() -> object:
        out = moe_forward(x, case.gate_up, case.down, ids, weights, backend="triton")
        return torch.autograd.grad(out, leaves, dout)

    return step


def main() -> None:
    """Profile the cells asked for; print and write profile.json."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", default="A:4096,C:4096,D:4096")
    parser.add_argument("--train", default="")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    precompile(cells(args.cells), cells(args.train))
    found = []
    for kind, name, tokens in [("forward", *c) for c in cells(args.cells)] + [
        ("train", *c) for c in cells(args.train)
    ]:
        case = make_case(name)
        if kind == "train":
            call = train_step(case, tokens)
        else:
            x, ids, weights = make_tokens(case, tokens)
            call = lambda c=case, q=(x, ids, weights): moe_forward(  # noqa: E731
                q[0], c.gate_up, c.down, q[1], q[2], backend="triton"
            )
        rows = kernel_times(call)
        print(f"{name} {kind} {tokens}: {sum(r[1] for r in rows):.1f} us", flush=True)
        for key, us, count in rows[:12]:
            print(f"    {us:10.1f} us  x{count}  {key}", flush=True)
        found.append({"shape": name, "kind": kind, "tokens": tokens, "kernels": rows})
        (args.out / "profile.json").write_text(json.dumps(found))
        del case, call
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
