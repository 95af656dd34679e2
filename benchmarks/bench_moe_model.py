"""How much faster is a whole Qwen3-30B-A3B with mogul's experts than with Transformers' own?

The model has the real widths and fewer layers; its vocabulary shrinks with them, so that the head
keeps its share. Prefill is one forward of 4,096 tokens, training a forward and backward of 16,384
(4 sequences) without the optimizer. Both sides run the same code but for the experts: captured in a
CUDA graph, with and without torch.compile of every decoder layer. The implementations take turns;
a row is the median over the rounds.

    python benchmarks/bench_moe_model.py --layers 4 --implementations mogul,grouped_mm --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
from tune import precompile

import mogul.models  # noqa: F401 (registers the implementation)
from mogul.bench import ledger

FULL = {"layers": 48, "vocab": 151_936}
START = time.time()


def log(*words: Any) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


def make_model(layers: int) -> Any:
    """Random weights in bf16 on the device."""
    config = Qwen3MoeConfig(
        vocab_size=FULL["vocab"] * layers // FULL["layers"] // 64 * 64,
        hidden_size=2048,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=768,
        norm_topk_prob=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = Qwen3MoeForCausalLM(config)
        torch.set_default_dtype(torch.float32)
    return model


def capture(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of one call, after three plain ones."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def prefill(model: Any, ids: Tensor) -> Callable[[], object]:
    """One forward, logits of the last token."""

    def call() -> Tensor:
        with torch.no_grad():
            return model(ids, logits_to_keep=1, use_cache=False).logits

    return call


def training(model: Any, ids: Tensor) -> Callable[[], object]:
    """One forward and backward."""

    def call() -> Tensor:
        model.zero_grad(set_to_none=True)
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss

    return call


def once(graph: torch.cuda.CUDAGraph) -> float:
    """Milliseconds of one replay."""
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    graph.replay()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b)


def eager_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of plain calls."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def measure(
    model: Any, kind: str, ids: Tensor, names: list[str], rounds: int, compiled: bool
) -> dict[str, dict[str, float]]:
    """Captured times of every implementation that runs, taken in turns; plain times beside them."""
    graphs: dict[str, tuple[torch.cuda.CUDAGraph, float]] = {}
    for name in names:
        call = (prefill if kind == "prefill" else training)(model, ids)
        try:
            model.set_experts_implementation(name)
            plain = eager_ms(call) if not compiled else float("nan")
            graphs[name] = capture(call), plain
            log(kind, "compiled" if compiled else "plain", name, "captured")
        except Exception as error:
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            log(f"{name} does not run {kind}: {type(error).__name__} {str(error)[:160]}")
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        for name, (graph, _) in graphs.items():
            times[name].append(once(graph))
    return {
        name: {
            "ms": statistics.median(t),
            "spread": max(t[1:]) - min(t[1:]),
            "eager_ms": graphs[name][1],
        }
        for name, t in times.items()
    }


def report(found: dict[str, dict[str, float]], case: str, rounds: int, out: Path) -> None:
    """Print the cell; write its ledger row (value: mogul's milliseconds)."""
    for name, row in found.items():
        ratio = row["ms"] / found["mogul"]["ms"] if "mogul" in found else float("nan")
        log(f"{case}: {name} {row['ms']:.3f} ms, {ratio:.2f} x mogul, eager {row['eager_ms']:.2f}")
    if "mogul" not in found:
        return
    mine = found["mogul"]
    row = ledger.row(
        device=torch.cuda.get_device_name(),
        bench="moe_model",
        case=case,
        metric="time",
        unit="ms",
        value=round(mine["ms"], 4),
        spread=round(mine["spread"], 4),
        runs=rounds,
        peers={n: round(r["ms"], 4) for n, r in found.items() if n != "mogul"},
        eager_ms={n: round(r["eager_ms"], 3) for n, r in found.items()},
    )
    ledger.append([row], out / "ledger.jsonl")


def main() -> None:
    """Run every cell; write ledger.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--implementations", default="mogul,grouped_mm,batched_mm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    names = args.implementations.split(",")
    precompile([("C", 4096)], [("C", 16384)])
    vocab = FULL["vocab"] * args.layers // FULL["layers"] // 64 * 64
    for compiled in (False, True) if args.compile else (False,):
        for kind, shape in (("prefill", (1, 4096)), ("training", (4, 4096))):
            model = make_model(args.layers).train(kind == "training")
            if compiled:
                for layer in model.model.layers:
                    layer.compile(fullgraph=True)
            ids = torch.randint(vocab, shape, device="cuda")
            case = f"Qwen3-30B-A3B {args.layers} layers {kind} {ids.numel()}"
            case += " compiled layers, captured" if compiled else " captured"
            found = measure(model, kind, ids, names, args.rounds, compiled)
            report(found, case, args.rounds, args.out)
            del model
            torch.cuda.empty_cache()
            torch.compiler.reset()


if __name__ == "__main__":
    main()
