"""What joining launches gives an engine: decode steps and prompts with and without each rewrite.

A few layers of a shape are enough, because all are alike: the difference of two variants over the
number of layers is what a layer saves. Steps are captured ones replayed in the middle of answers.

    python benchmarks/gpu/bench_launches.py --layers 12 --record
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import bench_engine
import torch

from mogul.bench import ledger
from mogul.core.log import say
from mogul.kernels.triton import paged
from mogul.serve import passes, rewrites
from mogul.serve.engine import Engine
from mogul.serve.graphs import decoder_layers
from mogul.serve.loading import random_model
from mogul.serve.options import EngineOptions
from mogul.serve.params import SamplingParams
from mogul.spec import presets

VARIANTS: dict[str, tuple[str, ...]] = {
    "all joined": ("attention", "products", "residuals", "sums"),
    "all but sums": ("attention", "products", "residuals"),
    "none": (),
    "attention alone": ("attention",),
    "products alone": ("products", "residuals", "sums"),
}
"""Which rewrites run; beside these, all of them with prompts read through pages."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64, 96])
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", default=".")
    options = parser.parse_args()
    folder = Path(options.out) / "shape"
    folder.mkdir(parents=True, exist_ok=True)
    config = {**presets.config(options.preset), "num_hidden_layers": options.layers}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = random_model(folder, dtype="bfloat16", device="cuda", experts="mogul")
    bandwidth = bench_engine.copy_bandwidth()
    say(f"{torch.cuda.get_device_name()}: {bandwidth / 1e12:.3f} TB/s")
    for name, kinds in VARIANTS.items():
        engine = open_engine(model, name, kinds, options)
        measure(engine, name, options, bandwidth)
        if name == "all joined":
            through_pages(engine, options)
        engine.close()


def join_some(kinds: tuple[str, ...]) -> Callable[[Any], None]:
    """The rewrite of a graph with some of its parts."""
    parts = {
        "attention": rewrites.join_attention,
        "products": rewrites.join_norms,
        "residuals": rewrites.join_residuals,
        "sums": rewrites.join_sums,
    }

    def join(graph: Any) -> None:
        for kind in kinds:
            parts[kind](graph)

    return join


def open_engine(model: Any, name: str, kinds: tuple[str, ...], options: Any) -> Engine:
    """An engine whose layers are compiled anew with these rewrites, apart from others on disk."""
    rewrites.join = join_some(kinds)
    setattr(passes.FewRows, "uuid", lambda _self: name.encode())  # noqa: B010
    torch._dynamo.reset()
    for layer in decoder_layers(model):
        layer._compiled_call_impl = None
    most, length = max(options.batches), options.input + options.output
    settled = EngineOptions(
        max_length=length, max_sequences=most, cache_tokens=most * (length + 16),
        reuse_prefix=False, graph_sizes=tuple(options.batches), prompt_sizes=(),
    )  # fmt: skip
    return Engine(model, None, settled)


def measure(engine: Engine, name: str, options: Any, bandwidth: float) -> None:
    """Time a step of each batch size, and 8 prompts."""
    for batch in options.batches:
        step_us = 1e3 * median(bench_engine.step_ms(engine, batch, options) for _ in range(2))
        floor_us = 1e3 * bench_engine.floor_ms(engine, batch, options, bandwidth)
        note(options, f"{name}, decode, batch {batch}", round(step_us, 1), floor=round(floor_us, 1))
    note(options, f"{name}, 8 prompts", prompts_us(engine, options))


def through_pages(engine: Engine, options: Any) -> None:
    """Prompts once more without reading fresh keys where they lie."""
    may = paged._may_read_fresh
    paged._may_read_fresh = lambda _call: False
    note(options, "all joined, 8 prompts through pages", prompts_us(engine, options))
    paged._may_read_fresh = may


def prompts_us(engine: Engine, options: Any) -> float:
    """Until 8 prompts have their first token, the middle of 5."""
    times = []
    for run in range(6):
        prompts = bench_engine.prompts_of(8, options, engine.runner.vocab_size, run)
        start_s = time.perf_counter()
        engine.generate(prompts, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
    return round(1e6 * median(times[1:]), 1)


def note(options: Any, case: str, value_us: float, **more: Any) -> None:
    """Print a figure and keep it."""
    say(f"{case}: {value_us} us {more or ''}")
    if options.record:
        row = ledger.row(
            device=torch.cuda.get_device_name(), bench="engine_launches",
            case=f"{options.preset} ({options.layers} layers), bf16, {case}",
            metric="time", unit="us", value=value_us, runs=5, **more,
        )  # fmt: skip
        ledger.append([row], Path(options.out) / "ledger.jsonl")


if __name__ == "__main__":
    main()
