"""Ideas for decode steps that wait: kernels that let weights and keys come while others still run.

Each idea changes the source of some kernels, which then stand in mogul's place; captured steps are
replayed in the middle of answers. `off` is the largest difference of a logit from mogul's own.
Predictions, microseconds a layer of Qwen3-30B-A3B's shape saved at 1 / 8 / 16 / 64 sequences:
down 3 / 4 / 4 / 3, early 1 / 2 / 2 / 1, attend 2 / 2 / 3 / 4, added 0 / 0 / 0 / 4.

    python benchmarks/gpu/decode_ideas.py --layers 48 --record --out DIR
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bench_engine
import torch

from mogul.bench import ledger
from mogul.core.log import say
from mogul.kernels.triton import (
    attention_kernels,
    layer,
    linear,
    normed,
    normed_kernels,
    paged,
    paged_write,
    row_kernels,
    sort_kernels,
    token_kernels,
)
from mogul.serve.engine import Engine
from mogul.serve.graphs import try_ladder
from mogul.serve.options import EngineOptions


class Change(NamedTuple):
    """A kernel and what of its source becomes what."""

    module: Any
    kernel: str
    old: str
    new: str


WAIT = "    if PDL:\n        gdc_wait()\n        gdc_launch_dependents()\n"
FIRST = "    if PDL:\n        gdc_launch_dependents()\n        gdc_wait()\n"
FETCH = "from mogul.kernels.triton.linear_kernels import fetch\n"
DOWN_ROWS = """    if PDL:
        if STREAM:
            m0 = tl.load(head_ptr + E + 1)
            if tl.program_id(0) < m0 * tl.cdiv(N, BLOCK_N):
                e0, start0, end0, n0 = _tile_at(
                    tl.program_id(0), m0, tl.cdiv(N, BLOCK_N), tiles_ptr, BLOCK_GROUP
                )
                fetch(w_ptr + e0.to(tl.int64) * (N * C), n0 * BLOCK_N, N, C, BLOCK_N)
        gdc_wait()
        gdc_launch_dependents()
"""
DOWN_TOKENS = """    if PDL:
        for k0 in tl.static_range(K):
            e0 = tl.load(ids_ptr + tl.program_id(1) * K + k0)
            if (e0 >= 0) & (e0 < E):
                fetch(w_ptr + e0.to(tl.int64) * (D * F), tl.program_id(0) * BLOCK_N, D, F, BLOCK_N)
        gdc_wait()
        gdc_launch_dependents()
"""
PREFETCH = """tl.inline_asm_elementwise(
                            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l",
                            [(POINTER + where0).to(tl.int64)],
                            dtype=tl.int32, is_pure=False, pack=1,
                        )"""
SHARES = """    ends, total, chunk = shares(
        starts_ptr, lengths_ptr, num_seqs, S, MAX_Q, WINDOW, BLOCK_L, WORKERS, MIN_BLOCKS
    )
"""
NAMES = "    w = tl.program_id(0)\n    n = tl.program_id(1)\n"
ATTEND_OLD = f"""    if PDL:
        gdc_launch_dependents()  # whose weights then come while this runs
        gdc_wait()
{NAMES}{SHARES}"""
ATTEND_NEW = f"""{NAMES}    if PDL:
        gdc_launch_dependents()
{SHARES}    if PDL:
        if w * chunk < total:
            s0 = tl.sum((ends <= w * chunk).to(tl.int32))
            start0, queries0, length0, first0, count0 = sequence(
                starts_ptr, lengths_ptr, s0, True, MAX_Q, WINDOW, BLOCK_L
            )
            end0 = tl.sum(tl.where(tl.arange(0, S) == s0, ends, 0))
            shift0 = first0 - (end0 - count0)
            table0 = tables_ptr + s0.to(tl.int64) * table_stride
            line0 = tl.arange(0, 4) * (C // 4)
            for j0 in tl.static_range(4):
                if w * chunk + j0 < tl.minimum(tl.minimum(w * chunk + chunk, total), end0):
                    pos0 = (w * chunk + j0 + shift0) * BLOCK_L + tl.arange(0, BLOCK_L)
                    page0 = tl.load(table0 + pos0 // Z, mask=pos0 < length0, other=0).to(tl.int64)
                    where0 = ((page0 * Z + pos0 % Z) * N + n)[:, None] * C + line0[None, :]
                    {PREFETCH.replace("POINTER", "key_cache_ptr")}
                    {PREFETCH.replace("POINTER", "value_cache_ptr")}
        gdc_wait()
"""
CHANGES: dict[str, tuple[Change, ...]] = {
    "down": (
        Change(row_kernels, "down_rows", WAIT, DOWN_ROWS),
        Change(token_kernels, "down_tokens", WAIT, DOWN_TOKENS),
    ),
    "early": (
        Change(token_kernels, "sum_slots", WAIT, FIRST),
        Change(normed_kernels, "norm_rows", WAIT, FIRST),
        Change(sort_kernels, "sort_in_one", WAIT, FIRST),
        Change(attention_kernels, "write_pages", WAIT, FIRST),
    ),
    "attend": (Change(attention_kernels, "attend_few", ATTEND_OLD, ATTEND_NEW),),
    "added": (),
}
VARIANTS = ((), tuple(CHANGES), *((name,) for name in CHANGES), ())


def changed(module: Any, changes: list[Change], number: int, folder: Path) -> Any:
    """A module like another with some kernels changed."""
    text = Path(module.__file__).read_text()
    for _, kernel, old, new in changes:
        first = text.index(f"def {kernel}(")
        at = text.index(old, first)
        if 0 < text.find("@triton.jit", first) < at:
            raise RuntimeError(f"{kernel} is not as this script knows it")
        text = text[:at] + new + text[at + len(old) :]
    at = text.index("\n\n\n")
    name = f"ideas{number}_{module.__name__.rsplit('.', 1)[1]}"
    (folder / f"{name}.py").write_text(f"{text[:at]}\n{FETCH}{text[at:]}")
    return importlib.import_module(name)


def put(names: tuple[str, ...], number: int, folder: Path) -> dict[tuple[Any, str], Any]:
    """Put the kernels of some ideas in place; what stood there."""
    before: dict[tuple[Any, str], Any] = {(normed, "added_rows"): normed.added_rows}
    normed.added_rows = 64 if "added" in names else normed.added_rows
    changes = [change for name in names for change in CHANGES[name]]
    for module in {change.module for change in changes}:
        own = [change for change in changes if change.module is module]
        made = changed(module, own, number, folder)
        for change in own:
            before[module, change.kernel] = getattr(module, change.kernel)
            setattr(module, change.kernel, getattr(made, change.kernel))
    forget_launches()
    return before


def forget_launches() -> None:
    """Let every launch be made anew."""
    kept = (paged._few, paged_write._writer, normed._norm, linear._launch, layer.layer_of)
    for one in kept:
        one.cache_clear()


def logits(engine: Engine, batch: int) -> Any:
    """Of a captured step over the same tokens for every variant."""
    ladder = engine.runner.ladder
    assert ladder is not None
    inputs = engine.runner.arena.views(ladder.layout((batch, 1)))
    generator = torch.Generator().manual_seed(batch)
    inputs.ids_T.copy_(torch.randint(0, engine.runner.vocab_size, (batch,), generator=generator))
    return ladder.replay((batch, 1), batch).float().clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64])
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", default=".")
    options = parser.parse_args()
    options.input, options.output, options.quantise = 1024, 128, None
    folder = Path(options.out) / "kernels"
    folder.mkdir(parents=True, exist_ok=True)
    sys.path.insert(0, str(folder))
    most = max(options.batches)
    settled = EngineOptions(
        max_length=1152, max_sequences=most, cache_tokens=most * 1168, reuse_prefix=False,
        graph_sizes=tuple(options.batches),
    )  # fmt: skip
    engine = Engine(bench_engine.model_of(options, "shape"), None, settled)
    for cache in engine.runner.caches:
        cache.key.normal_()
        cache.value.normal_()
    want: dict[int, Any] = {}
    for number, names in enumerate(VARIANTS):
        before = put(names, number, folder)
        measure(engine, " + ".join(names) or "as it is", options, want)
        for (module, name), kept in before.items():
            setattr(module, name, kept)


def measure(engine: Engine, name: str, options: Any, want: dict[int, Any]) -> None:
    """Capture anew, time a step of each batch size, compare its logits."""
    runner = engine.runner
    runner.ladder = None
    limits = engine.sizes.largest_step
    runner.ladder = try_ladder(runner, options.batches, limits, 0, tune=False)
    for batch in options.batches:
        step_us = 1e3 * median(bench_engine.step_ms(engine, batch, options) for _ in range(3))
        got = logits(engine, batch)
        off = float((got - want.setdefault(batch, got)).abs().max())
        say(f"{name}, batch {batch}: {step_us:.1f} us, off {off:.3g}")
        if options.record:
            row = ledger.row(
                device=torch.cuda.get_device_name(), bench="decode_ideas", metric="time",
                case=f"{options.preset} ({options.layers} layers), bf16, {name}, batch {batch}",
                unit="us", value=round(step_us, 1), runs=30, off=off,
            )  # fmt: skip
            ledger.append([row], Path(options.out) / "ledger.jsonl")


if __name__ == "__main__":
    main()
