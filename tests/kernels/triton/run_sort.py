"""Sorts slots in Triton's interpreter on the CPU and prints which tables are wrong."""

from __future__ import annotations

import json
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from sort_cases import KINDS, faults, make_ids

from mogul.kernels.triton import sorter

CASES = [("three", 64, 6, 2, 65, kind, 16) for kind in KINDS]
CASES += [("three", 32, 31, 4, 16, "null", 32), ("three", 32, 32, 4, 15, "null", 32)]
CASES += [("three", 256, 1, 1, 257, "null", 64), ("one", 64, 5, 2, 33, "null", 16)]
CASES += [("one", 64, 32, 1, 40, "null", 16), ("one", 64, 3, 1, 64, "nothing", 16)]
"""Launches, slots of a block, experts, picks, tokens, kind, rows of a tile: full and short last
blocks, as many bins as experts with null picks and twice as many."""


def main() -> None:
    """One JSON object a case."""
    for i, (launches, block, experts, picks, tokens, kind, rows) in enumerate(CASES):
        sorter._ONE_LAUNCH_SLOTS = 0 if launches == "three" else 4096
        sorter._BLOCKS = ((1 << 62, block),)
        ids = make_ids(experts, picks, tokens, kind, (torch.int64, torch.int32)[i % 2])
        found = sorter.Sorter(experts, -1, pdl=False)(ids, rows)
        case = f"{launches} {experts} {kind}"
        print(json.dumps({"case": case, "wrong": faults(found, ids, experts, rows)}))


if __name__ == "__main__":
    main()
