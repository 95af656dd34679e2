"""Does grouping cost speed on a CPU? SmolLM2 upcycled to 32 experts in 8 groups, against itself.

Both models compute the same function with the same active parameters (the routers are extra), so
the dense one is the bar: prefill of 512 tokens and 64 greedy decode steps, fp32, batch 1, the two
taking turns. Bar: upcycled speed / dense speed >= 0.8 in both.

    python benchmarks/bench_cpu_generate.py --record
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mogul.bench import ledger
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.log import progress
from mogul.core.table import Table
from mogul.models import load_model, load_tokenizer
from mogul.models.upcycle import upcycle
from mogul.train.data import shipped_text

BAR_RATIO = 0.8


@torch.inference_mode()
def generate_s(model: PreTrainedModel, prompt_BL: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prompt, and for the decode steps after it (greedy, dynamic cache)."""
    cache = DynamicCache(config=model.config)
    start_s = time.perf_counter()
    logits = model(prompt_BL, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    token_B1 = logits[:, -1].argmax(-1, keepdim=True)
    prefill_s = time.perf_counter() - start_s
    start_s = time.perf_counter()
    for _ in range(new_tokens):
        logits = model(token_B1, past_key_values=cache, use_cache=True).logits
        token_B1 = logits[:, -1].argmax(-1, keepdim=True)
    return prefill_s, time.perf_counter() - start_s


def best_s(run: Callable[[], object], repeats: int = 7) -> float:
    """Fastest of a few runs, in seconds."""
    times = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        run()
        times.append(time.perf_counter() - start_s)
    return min(times)


def machine() -> tuple[float, float]:
    """Read bandwidth in bytes/s and matrix speed in FLOP/s, fp32, as this process gets them."""
    big = torch.ones(64 * 2**20)
    square = torch.randn(2048, 2048)
    read_s = best_s(big.sum)
    return 4 * big.numel() / read_s, 2 * 2048**3 / best_s(lambda: square @ square)


def floors_s(model: PreTrainedModel, prompt: int, new: int) -> tuple[float, float]:
    """Least seconds of prefill (FLOP) and decode (weight bytes), for the parameters of a token."""
    bytes_per_s, flop_per_s = machine()
    params = sum(p.numel() for p in model.parameters())  # tied embeddings: once, as the head
    head = model.config.vocab_size * model.config.hidden_size
    prefill_flop = 2 * (params - head) * prompt + 2 * head
    return prefill_flop / flop_per_s, 4 * params * new / bytes_per_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--implementation", default="mogul", help="experts implementation")
    parser.add_argument("--prompt", type=int, default=512, help="prompt tokens")
    parser.add_argument("--new", type=int, default=64, help="new tokens")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()

    folder = smollm2_checkpoint()
    dense = load_model(folder, dtype=torch.float32).eval()
    moge = upcycle(dense, num_experts=options.experts, num_groups=options.groups)
    moge.set_experts_implementation(options.implementation)
    text = shipped_text().held_out[0]
    ids = load_tokenizer(folder)(text[: 12 * options.prompt])["input_ids"][: options.prompt]
    times = measure({"dense": dense, "upcycled": moge}, torch.tensor([ids]), options)
    report(times, floors_s(dense, options.prompt, options.new), options)


def measure(
    models: dict[str, PreTrainedModel], prompt_BL: Tensor, options: Any
) -> dict[str, list[tuple[float, float]]]:
    """Let the models take turns; the first turn of each is warm-up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    with progress("generate", total=(options.runs + 1) * len(models)) as bar:
        for _ in range(options.runs + 1):
            for name, model in models.items():
                times[name].append(generate_s(model, prompt_BL, options.new))
                bar.advance(note=name)
    return {name: runs[1:] for name, runs in times.items()}


def report(
    times: dict[str, list[tuple[float, float]]], floor_s: tuple[float, float], options: Any
) -> None:
    """Print the table and, when asked, add the rows to the ledger."""
    rows, entries = [], []
    phases = (("prefill", options.prompt), ("decode", options.new))
    for index, (phase, tokens) in enumerate(phases):
        mogul_s = sorted(run[index] for run in times["upcycled"])
        dense_s = sorted(run[index] for run in times["dense"])
        speed, baseline = tokens / median(mogul_s), tokens / median(dense_s)
        ratio = speed / baseline
        spread = [round(tokens / s, 2) for s in (mogul_s[-1], mogul_s[0])]
        limit = tokens / floor_s[index]
        rows.append(
            (phase, f"{baseline:.1f}", f"{speed:.1f}", f"{spread[0]:.1f} .. {spread[1]:.1f}",
             f"{limit:.1f}", f"{ratio:.2f}", "yes" if ratio >= BAR_RATIO else "NO")
        )  # fmt: skip
        case = f"SmolLM2-135M fp32 batch 1, {options.prompt} + {options.new} tokens, "
        case += f"{options.experts} experts in {options.groups} groups, {options.implementation}"
        entries.append(
            ledger.row(
                bench="cpu_generate", case=case, metric=f"{phase} speed", unit="tokens/s",
                value=round(speed, 2), spread=spread, runs=options.runs, floor=round(limit, 2),
                baseline="dense SmolLM2, Transformers, same run",
                baseline_value=round(baseline, 2), ratio=round(ratio, 3),
            )
        )  # fmt: skip
    Table(
        f"SmolLM2-135M fp32, batch 1, {torch.get_num_threads()} threads, tokens/s",
        ("phase", "dense", "upcycled", "spread", "limit", "ratio", f">= {BAR_RATIO}"),
        rows,
        notes=("medians of interleaved runs; limit: FLOP or weight bytes at speeds measured now",),
    ).show()
    if options.record:
        ledger.append(entries)


if __name__ == "__main__":
    main()
