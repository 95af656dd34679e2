"""Runs the up product in a few variants, for a profiler around it (bytes, cache hits, unit use).

ncu --clock-control none --metrics ... python benchmarks/gpu/profile_product.py --cell A:16384
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import make_case
from tune import Parts, cells

from mogul.kernels.triton.plans import Tile

VARIANTS = {
    "plain": Tile(n=128, k=64, group=8, warps=8, stages=3, tma=True, per_sm=1),
    "plain4": Tile(n=128, k=64, group=8, warps=8, stages=4, tma=True, per_sm=1),
    "split": Tile(n=128, k=64, group=16, stages=4, split=True, per_sm=1),
    "sync": Tile(n=128, k=64, group=16, stages=4, split=True, per_sm=1, sync=True),
    "counted": Tile(n=128, k=64, group=16, stages=4, split=True, per_sm=1, counted=True),
}


def main() -> None:
    """One launch a variant and cell."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", default="A:16384,C:16384")
    args = parser.parse_args()
    for name, tokens in cells(args.cells):
        parts = Parts(make_case(name), tokens, 1)
        parts.fill()
        for variant, tile in VARIANTS.items():
            print(name, tokens, variant, flush=True)
            parts.calls("up", 128, tile)[0]()
            torch.cuda.synchronize()
        del parts
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
