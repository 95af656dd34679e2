"""How fast and how close to the bound are placements? CPU seconds and busiest device / bound.

python benchmarks/bench_place.py [--record]

Loads: shuffled Zipf (exponent 0.4) x lognormal (0.3), 58 layers a case, one thread. Times are
user + system CPU seconds, the least of five runs; `greedy` without replicas is EPLB's packing.
"""

from __future__ import annotations

import sys
import time

import numpy as np

from mogul.bench import ledger
from mogul.core.table import Table
from mogul.place.greedy import greedy
from mogul.place.ilp import certify
from mogul.place.problem import Problem, contiguous, device_load, lower_bound
from mogul.place.search import solve_for_load

CASES = [(64, 8, 8), (128, 16, 8), (256, 32, 8), (256, 64, 4), (256, 64, 5), (256, 32, 9)]
LAYERS = 58


def problems(experts: int, devices: int, slots: int) -> list[Problem]:
    rng = np.random.default_rng(0)
    zipf = np.arange(1, experts + 1) ** -0.4
    return [
        Problem(1000 * rng.permutation(zipf * rng.lognormal(0, 0.3, experts)), devices, slots)
        for _ in range(LAYERS)
    ]


def ratio(slots_DS: np.ndarray, problem: Problem) -> float:
    return float(device_load(slots_DS, problem.load_E).max()) / lower_bound(problem)


def measure(experts: int, devices: int, slots: int) -> dict[str, float]:
    cases = problems(experts, devices, slots)
    cpu_s = []
    for _ in range(5):
        start_s = time.process_time()
        found = [solve_for_load(problem) for problem in cases]
        cpu_s.append(time.process_time() - start_s)
    ours = [ratio(s, p) for s, p in zip(found, cases, strict=True)]
    start_s = time.process_time()
    proofs = [certify(s, p, limit_s=2.0) for s, p in zip(found, cases, strict=True)]
    proof_s = time.process_time() - start_s
    return {
        "cpu_s": min(cpu_s),
        "mean_over_bound": float(np.mean(ours)),
        "max_over_bound": max(ours),
        "greedy_over_bound": float(np.mean([ratio(greedy(p), p) for p in cases])),
        "contiguous_over_bound": float(np.mean([ratio(contiguous(p), p) for p in cases])),
        "certificate_cpu_s_per_layer": proof_s / LAYERS,
        "certified_gap_max": max(c.gap(p) for c, p in zip(proofs, cases, strict=True)),
    }


def main() -> int:
    """Measure every case; `--record` adds rows to the ledger."""
    rows = []
    for experts, devices, slots in CASES:
        result = measure(experts, devices, slots)
        case = f"{experts} experts, {devices} devices x {slots} slots, {LAYERS} layers"
        rows.append((case, *(round(value, 5) for value in result.values())))
        if "--record" in sys.argv:
            ledger.append(
                ledger.row(
                    bench="place",
                    case=case,
                    metric=metric,
                    unit="s" if "cpu_s" in metric else "ratio",
                    value=round(value, 6),
                    runs=5 if metric == "cpu_s" else 1,
                )
                for metric, value in result.items()
            )
    Table("placement", ("case", *result), rows).show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
