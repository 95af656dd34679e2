"""Find tile sizes for an experts layer on this GPU, and write them where kernels look.

Decides the search: for each number of tokens and each row tile that suits it, the up product's
tile with the rule's own down product, then the down product's; of a few tokens the blocks of the
sort-free path. Candidates compile in threads; each is timed as a whole forward in a CUDA graph.
`plans.json` is read again through MOGUL_PLANS; `vllm/` holds the same sizes as
vLLM's VLLM_TUNED_CONFIG_FOLDER names them, for its kernel of the same kind.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Protocol

import torch

from mogul.bench.calibrate_timing import seconds_of
from mogul.bench.kernels import DTYPES, Request, device_name
from mogul.bench.kernels_layer import Layer
from mogul.core.errors import HardwareError
from mogul.core.files import atomic_write
from mogul.core.log import progress, say
from mogul.kernels.moe import forget_calls, moe_forward
from mogul.kernels.triton.plans import (
    USER_PLANS,
    FewPlan,
    Plan,
    Shape,
    Tile,
    few_plan,
    few_rule,
    plan_for,
    rule,
    table,
)

SHARED_BYTES = 200_000
"""Shared memory that a candidate may fill; those that don't fit fail and are left out anyway."""
ROW_TILES = ((16, 14), (32, 40), (64, 120), (128, float("inf")))
"""Row tiles, and the mean rows an expert up to which each is tried; the one below is tried too."""


class Timer(Protocol):
    """What a plan takes; may be told beforehand which plans it will be asked for."""

    def __call__(self, plan: Plan | FewPlan, tokens: int, /) -> float:
        """Seconds of a forward."""
        ...

    def prepare(self, plans: Sequence[Plan | FewPlan], tokens: int, /) -> None:
        """Compile plans together."""
        ...


def tune(request: Request, folder: Path | None) -> list[dict[str, Any]]:
    """Measure, write `folder`/plans.json and `folder`/vllm/, use them here, and return the rows."""
    device, dtype, token_counts = request.resolved()
    if device.type != "cuda":
        raise HardwareError(
            f"tile sizes belong to GPU kernels, and this machine has {device_name(device)}",
            fix="run without --tune, or on an NVIDIA GPU",
        )
    sizes = request.shape
    major, minor = torch.cuda.get_device_capability(device)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    shape = Shape(
        sizes.experts, sizes.picks, sizes.width, sizes.inner, 10 * major + minor, processors
    )
    timer = _ForwardTimer(Layer.random(sizes, DTYPES[dtype], device))
    rows = []
    for tokens in token_counts:
        find = search_few if shape.uses_few(tokens) else search
        rows.append(plan_row(shape, tokens, find(shape, tokens, timer)))
    use(write(rows, folder or Path(mkdtemp()), device_name(device)))
    return rows


def use(path: Path) -> None:
    """Let the layers of this process look into a file of plans, those made already too."""
    from mogul.kernels.triton.layer import layer_of

    os.environ[USER_PLANS] = str(path)
    for known in (table, few_plan, plan_for, layer_of):
        known.cache_clear()
    forget_calls()


def search(shape: Shape, tokens: int, timer: Timer) -> Plan:
    """The fastest plan found; at worst the rule's own."""
    start = rule(shape, tokens)
    best, best_s = start, timer(start, tokens)
    first_s = best_s
    for rows in row_tiles(shape, tokens):
        plan, seconds = start, float("inf")
        if rows != start.rows:
            small = candidates(rows, shape, up=True)[0]
            plan = replace(start, rows=rows, up=small, down=candidates(rows, shape, up=False)[0])
        for side in ("up", "down"):
            tiles = candidates(rows, shape, up=side == "up")
            tried = [replace(plan, **{side: tile}) for tile in tiles]
            plan, seconds = min(
                [(plan, seconds), *_timed(tried, tokens, timer, f"rows {rows}, {side}")],
                key=lambda found: found[1],
            )
        if seconds < best_s:
            best, best_s = plan, seconds
    first_s = min(first_s, timer(start, tokens))  # a device that rested is slow at first
    say(
        f"{tokens} tokens: {best_s * 1e6:.1f} us (by rule {first_s * 1e6:.1f}), rows {best.rows}, "
        f"up {best.up}, down {best.down}"
    )
    return best if best_s < first_s else start


def search_few(shape: Shape, tokens: int, timer: Timer) -> FewPlan:
    """The fastest blocks of the sort-free path."""
    start = few_rule(shape)
    best, best_s = start, timer(start, tokens)
    first_s = best_s
    for side in ("up", "down"):
        blocks = itertools.product((2, 4, 8, 16), (256, 512, 1024))
        tried = [
            replace(best, **{f"{side}_n": n, f"{side}_k": k}) for n, k in blocks if n * k <= 8192
        ]
        found = _timed(tried, tokens, timer, f"no sort, {side}")
        best, best_s = min([(best, best_s), *found], key=lambda one: one[1])
    first_s = min(first_s, timer(start, tokens))
    say(f"{tokens} tokens: {best_s * 1e6:.1f} us (by rule {first_s * 1e6:.1f}), {best}")
    return best if best_s < first_s else start


def _timed(plans: Sequence[Any], tokens: int, timer: Timer, title: str) -> list[tuple[Any, float]]:
    timer.prepare(plans, tokens)
    with progress(f"{tokens} tokens, {title}", len(plans)) as bar:
        found = []
        for plan in plans:
            found.append((plan, timer(plan, tokens)))
            bar.advance()
    return found


def row_tiles(shape: Shape, tokens: int) -> list[int]:
    """The row tile that suits the mean rows of an expert, and the next smaller one."""
    mean = tokens * shape.picks / shape.experts
    at = next(i for i, (_, most) in enumerate(ROW_TILES) if mean <= most)
    return [rows for rows, _ in ROW_TILES[max(0, at - 1) : at + 1]]


def candidates(rows: int, shape: Shape, *, up: bool) -> list[Tile]:
    """Tiles worth timing for one product; the first is a safe one."""
    if rows == 128 and shape.capability == 90:
        tile = Tile(n=128 if up else 256, k=64, stages=4, split=True, per_sm=1, counted=True)
        return [replace(tile, group=group) for group in (4, 8, 16, 2, 12)]
    found = []
    for n, k, stages in itertools.product((64, 32, 128), (64, 128, 32, 256), (3, 2, 4)):
        for swap in (False, True) if n >= 64 and rows <= 64 else (False,):
            held = (n * (2 if up else 1) + rows) * k * 2 * stages
            if held <= SHARED_BYTES and 2048 <= n * k <= 16384:
                tile = Tile(n=n, k=k, group=1 if rows < 128 else 8, stages=stages)
                warps = 8 if n * rows >= 8192 else 4
                found.append(replace(tile, warps=warps, swap=swap, stream=rows < 128))
    return found


class _ForwardTimer:
    """Seconds of a forward with a plan forced; infinite where the device cannot run it."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._inputs: dict[int, Any] = {}

    def _sets(self, tokens: int) -> list[Any]:
        if tokens not in self._inputs:
            self._inputs[tokens] = [self._layer.tokens(tokens) for _ in range(4)]
        return self._inputs[tokens]

    def prepare(self, plans: Sequence[Plan | FewPlan], tokens: int) -> None:
        """Compile all that these plans launch, in threads."""
        from mogul.kernels.triton.ahead import compile_together, rehearse
        from mogul.kernels.triton.ops import layer_of_call

        x, ids, weights = self._sets(tokens)[0]
        inputs = (x, self._layer.gate_up, self._layer.down, ids, weights)
        layer = layer_of_call(x, self._layer.down, ids, weights)
        waiting = []
        for plan in plans:
            with forced(plan):
                waiting += rehearse(layer, inputs, train=False)
        compile_together(waiting, layer.device)

    def __call__(self, plan: Plan | FewPlan, tokens: int) -> float:
        """Median of a captured forward."""
        layer, sets = self._layer, self._sets(tokens)

        def call(index: int) -> torch.Tensor:
            x, ids, weights = sets[index]
            return moe_forward(x, layer.gate_up, layer.down, ids, weights, backend="triton")

        try:
            with torch.inference_mode(), forced(plan):
                return seconds_of(call, len(sets), layer.device)
        except torch.AcceleratorError:
            raise  # the device is lost: nothing after it could be believed
        except Exception as error:  # too much shared memory or too many registers
            say(f"  left out: {str(error)[:80]}")
            return float("inf")


@contextmanager
def forced(plan: Plan | FewPlan) -> Iterator[None]:
    """Every layer runs with this plan inside the `with` block."""
    from mogul.kernels.triton import layer as module

    name = "few_plan" if isinstance(plan, FewPlan) else "plan_for"
    before = getattr(module, name)
    setattr(module, name, lambda *_of_a_call: plan)
    try:
        yield
    finally:
        setattr(module, name, before)


def plan_row(shape: Shape, tokens: int, plan: Plan | FewPlan) -> dict[str, Any]:
    """A row of plans.json: what differs from a tile's defaults."""
    facts = {
        "capability": shape.capability,
        "experts": shape.experts,
        "picks": shape.picks,
        "width": shape.width,
        "inner": shape.inner,
        "tokens": tokens,
    }
    if isinstance(plan, FewPlan):
        return {**facts, "few": asdict(plan)}
    default = asdict(Tile(n=0, k=0))
    tiles = {
        side: {key: value for key, value in asdict(tile).items() if value != default[key]}
        for side, tile in (("up", plan.up), ("down", plan.down))
    }
    return {**facts, "plan": {"rows": plan.rows, **tiles}}


def write(rows: list[dict[str, Any]], folder: Path, device: str) -> Path:
    """Both files; rows of other shapes that `plans.json` holds already stay. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "plans.json"
    keys = ("capability", "experts", "picks", "width", "inner", "tokens")
    known = json.loads(path.read_text()) if path.exists() else []
    merged = {tuple(row[key] for key in keys): row for row in [*known, *rows]}
    lines = ",\n".join("  " + json.dumps(row) for row in merged.values())
    atomic_write(path, f"[\n{lines}\n]\n")
    first = rows[0]
    name = f"E={first['experts']},N={first['inner']},device_name={device.replace(' ', '_')}.json"
    (folder / "vllm").mkdir(exist_ok=True)
    atomic_write(folder / "vllm" / name, json.dumps(vllm_config(rows), indent=4) + "\n")
    say(f"wrote {path}: set {USER_PLANS}={path} to use it; VLLM_TUNED_CONFIG_FOLDER={folder}/vllm")
    return path


def vllm_config(rows: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Tokens -> tile, as vLLM's fused_moe reads it; its one tile serves both products."""
    configs = {}
    for row in rows:
        if "plan" not in row:
            continue  # the sort-free path has no kernel of its kind there
        tile = Tile(**row["plan"]["up"])
        configs[str(row["tokens"])] = {
            "BLOCK_SIZE_M": row["plan"]["rows"],
            "BLOCK_SIZE_N": tile.n,
            "BLOCK_SIZE_K": tile.k,
            "GROUP_SIZE_M": tile.group,
            "SPLIT_K": 1,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }
    return configs
