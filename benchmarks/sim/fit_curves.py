"""Fit the few constants of `simulate/constants.toml` on AIConfigurator's installed tables.

Question: what are floor, compute and memory efficiency of each kind of kernel, by architecture,
and how far do measurements scatter around them? Prints TOML. Only medians of whole tables leave
this script: three constants and a scatter a table.

    python benchmarks/sim/fit_curves.py > src/mogul/simulate/constants.toml
"""

from __future__ import annotations

import numpy as np

from mogul.simulate import aiconfigurator, physics
from mogul.simulate.curves import Curve
from mogul.simulate.measurements import KernelTable, load_shipped
from mogul.spec.hardware import Hardware, hardware

PLACES = {"hopper": ("h100", "h200"), "blackwell": ("b200",), "ampere": ("a100",), "ada": ("l40s",)}
ROWS = 4000


def sample(table: KernelTable, rng: np.random.Generator) -> KernelTable:
    """At most ROWS rows, those that take longer than a launch more likely."""
    if len(table) <= ROWS:
        return table
    chosen = np.zeros(len(table), dtype=bool)
    chosen[rng.choice(len(table), ROWS, replace=False)] = True
    return table.only(chosen)


def fit(tables: list[tuple[KernelTable, Hardware]]) -> tuple[float, float, float, float]:
    """Coordinate search for the least median |log(measured / curve)|."""
    rng = np.random.default_rng(0)
    parts = [
        (physics.demand(t.kind, t.dims), t, h) for t, h in ((sample(t, rng), h) for t, h in tables)
    ]

    def error(floor_s: float, compute: float, memory: float) -> np.ndarray:
        curve = Curve(floor_s, compute, memory, "", 0.0)
        return np.concatenate(
            [np.log(t.seconds / curve.seconds(d, h, t.dtype)) for d, t, h in parts]
        )

    smallest = min(float(np.quantile(t.seconds, 0.02)) for _, t, _ in parts)
    best = (smallest, 0.6, 0.7)
    loss = float(np.mean(np.abs(error(*best))))
    for scale in (0.5, 0.25, 0.1, 0.05):
        for _ in range(60):
            trial = tuple(v * np.exp(rng.normal(0, scale)) for v in best)
            trial = (trial[0], min(trial[1], 1.0), min(trial[2], 1.0))
            if (new := float(np.mean(np.abs(error(*trial))))) < loss:
                best, loss = trial, new
    scatter = error(*best)
    return best[0], best[1], best[2], float(np.median(np.abs(scatter)) * 1.48)


def fastest(tables: list[tuple[KernelTable, Hardware]]) -> list[tuple[KernelTable, Hardware]]:
    """The tables of the engine whose kernels stay nearest to their roofline."""

    def excess(engine: str) -> float:
        ratios = []
        for table, device in tables:
            if table.engine == engine:
                demand = physics.demand(table.kind, table.dims)
                roof = Curve(0.0, 1.0, 1.0, "", 0.0).seconds(demand, device, table.dtype)
                ratios.append(table.seconds / roof)
        return float(np.median(np.concatenate(ratios)))

    best = min({table.engine for table, _ in tables}, key=excess)
    return [pair for pair in tables if pair[0].engine == best]


def show(place: str, name: str, tables: list[tuple[KernelTable, Hardware]]) -> None:
    """Print one table of constants."""
    floor_s, compute, memory, sigma = fit(tables)
    rows = sum(len(t) for t, _ in tables)
    sources = " + ".join(sorted({t.source for t, _ in tables}))
    print(f"[{place}.{name}]")
    print(f"floor_s = {floor_s:.2e}\ncompute = {compute:.2f}\nmemory = {memory:.2f}")
    print(f"sigma = {max(sigma, 0.08):.2f}")
    print(f'source = "fitted on {rows} rows: {sources}"')


def main() -> None:
    """Fit every architecture and kind."""
    own = [(t, hardware(t.device)) for t in load_shipped()]
    for place, devices in PLACES.items():
        found: dict[str, list[tuple[KernelTable, Hardware]]] = {}
        for device in devices:
            for engine in aiconfigurator.ENGINES:
                for table in aiconfigurator.tables(device, engine):
                    if table.kind == "gemm" and table.dtype == "fp8_block" and engine == "vllm":
                        continue  # launched one by one: the host's time, not the kernel's
                    found.setdefault(f"{table.kind}-{table.dtype}", []).append(
                        (table, hardware(device))
                    )
        mine = [pair for pair in own if pair[1].architecture == place]
        for kind in {t.kind for t, _ in mine}:
            found[f"{kind}-bf16"] = [pair for pair in mine if pair[0].kind == kind]
        for name, tables in sorted(found.items()):
            show(place, name, fastest(tables))


if __name__ == "__main__":
    main()
