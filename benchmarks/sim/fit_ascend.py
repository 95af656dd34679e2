"""Fit the Ascend curves on four published rows of the 800I A2; everything else stays blind.

Question: which start-up time, arithmetic efficiency and memory efficiency (of plain products, and
of the rest) explain the MoGE's prefill and its decode at batch 1 and 456, and the dense 72B at
batch 1 (arXiv 2505.21411, tables 5 and 6)? The other dense rows, the 300I Duo and drafts are not
used. Prints the TOML of `[ascend.*]` and `[ascend-310p.*]`: the chips of the 300I Duo are of the
same family and run the same software, so they borrow start-up and arithmetic; their memory is
another kind (LPDDR4X beside HBM) and stays the generic guess.

    python benchmarks/sim/fit_ascend.py
"""

from __future__ import annotations

import numpy as np

from mogul.simulate import calibration, curves
from mogul.simulate.validate.published import pangu_rows, predict_row

FITTED = ("moge-prefill", "moge-decode-1", "moge-decode-456", "72b-decode-1")
FIT = f"fitted on arXiv 2505.21411: {', '.join(FITTED)}"
BORROWED = f"start-up and arithmetic of the 800I A2 ({FIT}); memory: guess"
KINDS = ("gemm", "moe", "attention_decode", "attention_prefill", "mla_decode", "elementwise")


def table(floor_s: float, compute: float, memory: float, plain: float) -> dict[str, dict]:
    """The constants by kind; `plain` is the memory efficiency of plain products."""
    found = {kind: {"floor_s": floor_s, "compute": compute, "memory": memory} for kind in KINDS}
    found["gemm"]["memory"] = plain
    found["elementwise"] = {"floor_s": floor_s / 2, "compute": 1.0, "memory": memory}
    return found


def main() -> None:
    """Search the four constants."""
    rows = {row.name: row for row in pangu_rows() if row.name in FITTED}
    constants = curves._constants()

    def error(values: tuple[float, ...]) -> float:
        constants["ascend"] = {
            kind: {**one, "sigma": 0.2, "source": "fit"} for kind, one in table(*values).items()
        }
        curves.curve.cache_clear()
        calibration.shipped.cache_clear()
        return sum(abs(np.log(predict_row(rows[name]) / rows[name].measured_s)) for name in FITTED)

    rng = np.random.default_rng(0)
    best, loss = (1e-5, 0.4, 0.5, 0.5), np.inf
    for scale in (0.5, 0.2, 0.05):
        for _ in range(120):
            trial = tuple(np.minimum(np.array(best) * np.exp(rng.normal(0, scale, 4)), 1))
            if (new := error(trial)) < loss:
                best, loss = trial, new
    print(f"# sum of |log error| on the fitted rows: {loss:.4f}")
    show("ascend", table(*best), 0.2, FIT)
    guess = {kind: {"memory": constants["generic"][kind]["memory"]} for kind in KINDS}
    kin = {kind: one | guess[kind] for kind, one in table(*best).items()}
    show("ascend-310p", kin, 0.35, BORROWED)


def show(place: str, found: dict[str, dict], sigma: float, source: str) -> None:
    """Print the sections of one architecture."""
    for kind, one in found.items():
        print(f"[{place}.{kind}]\nfloor_s = {one['floor_s']:.2e}\ncompute = {one['compute']:.2f}")
        print(f'memory = {one["memory"]:.2f}\nsigma = {sigma}\nsource = "{source}"')


if __name__ == "__main__":
    main()
