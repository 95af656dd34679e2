"""How long does the first call of an experts layer wait, with nothing compiled on this machine?

One process, an empty Triton cache: a shape with measured tiles and one without, at one token, 64
and 4,096 tokens and in training, in this order. Seconds of the first call of each; the second call
beside it.

    python benchmarks/gpu/first_call.py --shapes C,unknown --out DIR
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
sys.path.insert(0, str(Path(__file__).parent))

import torch
from common import SHAPES, make_case, make_tokens

from mogul.bench import ledger
from mogul.kernels import moe_forward

SHAPES["unknown"] = (1280, 640, 48, 6, 1)


def seconds(name: str, tokens: int, *, train: bool) -> list[float]:
    """Of two calls; a training call with its backward."""
    case = make_case(name)
    x, ids, weights = make_tokens(case, tokens)
    if train:
        for tensor in (x, case.gate_up, case.down, weights):
            tensor.requires_grad_()
    found = []
    for _ in range(2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        out = moe_forward(x, case.gate_up, case.down, ids, weights, backend="triton")
        if train:
            out.sum().backward()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    """Every case; one ledger row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="C,unknown")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    torch.zeros(1, device="cuda").sin()
    for name in args.shapes.split(","):
        for tokens, train in ((1, False), (64, False), (4096, False), (4096, True)):
            first, second = seconds(name, tokens, train=train)
            case = f"{name} {'training' if train else 'forward'} {tokens}"
            print(f"{case}: {first:.2f} s, then {second * 1e3:.2f} ms", flush=True)
            row = ledger.row(
                torch.cuda.get_device_name(), bench="first_call", case=case, metric="time",
                unit="s", value=round(first, 3), runs=1, second_call_s=round(second, 5),
            )  # fmt: skip
            ledger.append([row], args.out / "ledger.jsonl")


if __name__ == "__main__":
    main()
