"""How long does routing take in one launch, against the same rule in torch operators?

Checks ids, weights, counts and offsets against the reference on the device, then times both in a
CUDA graph and the kernel's operator call on the host. Floor: logits and results at the copy speed.

    python benchmarks/bench_route.py --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from common import ceilings, time_graph

from mogul.bench import ledger
from mogul.kernels import RouterSpec
from mogul.kernels.reference.route import route_reference
from mogul.kernels.triton.routing import route_counted

RULES = {
    "Pangu Pro": RouterSpec(64, 8, num_groups=8, weighting="renormalised_in_group"),
    "Qwen3-30B-A3B": RouterSpec(128, 8, weighting="renormalised"),
    "DeepSeek-V3": RouterSpec(
        256, 8, num_groups=8, limit_groups=4, score="sigmoid", weighting="renormalised"
    ),
}


def check(logits: torch.Tensor, spec: RouterSpec) -> float:
    """Largest error of the weights; picks and counts must be equal."""
    ids, weights, _, count, offset = route_counted(logits, spec)
    want_ids, want, _ = route_reference(logits, spec, None, None)
    differ = (ids != want_ids).any(1)
    # scores that round to the same number in one and not in the other may swap a pick
    assert differ.float().mean() < 1e-3, f"{int(differ.sum())} tokens differ"
    rows = torch.bincount(ids.flatten(), minlength=spec.num_experts)
    assert torch.equal(count, rows.int())
    assert torch.equal(offset[1:], rows.cumsum(0).int())
    return float((weights - want)[~differ].abs().max())


def host_us(logits: torch.Tensor, spec: RouterSpec) -> float:
    for _ in range(10):
        route_counted(logits, spec)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        route_counted(logits, spec)
    return (time.perf_counter() - start) / 50 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    peak = ceilings()
    for name, spec in RULES.items():
        for tokens in (1, 64, 4096, 32768):
            logits = torch.randn(tokens, spec.num_experts, device="cuda")
            error = check(logits, spec)
            calls = {
                "triton": lambda x=logits, s=spec: route_counted(x, s),
                "reference": lambda x=logits, s=spec: route_reference(x, s, None, None),
            }
            times = {k: [time_graph([c], 9) for _ in range(3)] for k, c in calls.items()}
            ms = {k: statistics.median(v) for k, v in times.items()}
            size = tokens * (8 * spec.num_experts + 12 * spec.top_k)
            floor = size / peak["tb_per_s"] / 1e9
            host = host_us(logits, spec)
            print(name, tokens, {k: f"{v * 1e3:.2f} us" for k, v in ms.items()},
                  f"floor {floor * 1e3:.2f} us, host {host:.0f} us, error {error:.1e}",
                  flush=True)  # fmt: skip
            row = ledger.row(
                torch.cuda.get_device_name(), bench="route", case=f"{name} {tokens}",
                metric="time", unit="ms", value=round(ms["triton"], 6), runs=3,
                spread=round(max(times["triton"]) - min(times["triton"]), 6),
                floor=round(floor, 6), ratio=round(ms["triton"] / max(floor, 1e-9), 3),
                peers={"reference": round(ms["reference"], 6)}, host_us=round(host, 1),
            )  # fmt: skip
            ledger.append([row], args.out / "ledger.jsonl")


if __name__ == "__main__":
    main()
