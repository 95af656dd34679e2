"""Which tile sizes the quantised products run with: a measured table, and a rule for the others.

The table is `quant_plans.json` beside this file: rows of (format, E, K, D, F) with a token bound;
the smallest bound that holds wins. Nothing is tuned inside a request.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from mogul.kernels.triton.plans import FewPlan, Plan, Shape, Tile


def rule(shape: Shape, tokens: int, group: int) -> Plan:
    """Plan from the mean rows an expert gets; `group` is 0 for fp8."""
    mean = tokens * shape.picks / shape.experts
    stages = 4 if shape.capability in (90, 100) else 2
    rows = next((rows for rows, most in ((16, 12), (32, 28), (64, 96)) if mean <= most), 128)
    if group:
        k = 128 if rows <= 32 else 64
        deep = min(stages, 3)
        tile = Tile(n=64, k=k, group=1, warps=4, stages=deep, swap=True, stream=True)
        return Plan(rows=min(rows, 64), up=tile, down=tile)
    if rows <= 64:
        wide = rows == 16 and stages == 4
        tile = Tile(n=64, k=128, group=1, warps=4, stages=min(stages, 3), swap=True, stream=True)
        up = replace(tile, k=256, stages=5) if wide else tile
        return Plan(rows=rows, up=up, down=up if shape.inner > 1024 else tile)
    if shape.capability != 90:
        tile = Tile(n=64, k=64, warps=4, stages=stages)
        return Plan(rows=64, up=tile, down=replace(tile, n=128))
    tile = Tile(n=128, k=128, group=8, warps=8, stages=4, tma=True, per_sm=1)
    return Plan(rows=rows, up=tile, down=replace(tile, n=256))


INT4_FEW = FewPlan(up_n=8, up_k=512, down_n=8, down_k=256, stages=1)
"""Block sizes of int4's sort-free path."""


@cache
def table() -> dict[tuple[int, ...], list[tuple[int, Plan]]]:
    """Measured plans by (group, experts, picks, width, inner), by rising token bound."""
    path = Path(__file__).with_name("quant_plans.json")
    found: dict[tuple[int, ...], list[tuple[int, Plan]]] = {}
    for row in json.loads(path.read_text()) if path.exists() else []:
        key = tuple(row[name] for name in ("group", "experts", "picks", "width", "inner"))
        found.setdefault(key, []).append((row["tokens"], _plan(row)))
    return {key: sorted(plans, key=lambda pair: pair[0]) for key, plans in found.items()}


def _plan(row: dict[str, Any]) -> Plan:
    return Plan(rows=row["rows"], up=Tile(**row["up"]), down=Tile(**row["down"]))


@lru_cache(maxsize=4096)
def quant_plan_for(shape: Shape, tokens: int, group: int, *, split: bool = False) -> Plan:
    """Table row whose bound holds (Hopper), else the rule; `split` rows take twice the room."""
    plan = _plan_for(shape, tokens, group)
    if split and plan.rows == 128:
        sides = (plan.up, plan.down)
        up, down = (replace(side, stages=min(side.stages, 3)) for side in sides)
        plan = replace(plan, up=up, down=down)
    return plan


def _plan_for(shape: Shape, tokens: int, group: int) -> Plan:
    if shape.capability == 90:
        key = (group, shape.experts, shape.picks, shape.width, shape.inner)
        for bound, plan in table().get(key, []):
            if tokens <= bound:
                return plan
    return rule(shape, tokens, group)
