"""What does tracing add to a forward, and how large is a trace of 48 layers x 128 experts?

python benchmarks/bench_trace.py [--record]

A Qwen3-MoE with random weights: on a GPU the layers of Qwen3-30B-A3B (12 of 48, bf16, 4 x 1024
tokens), on a CPU smaller ones (fp32, 4 x 128 tokens). Bare and traced forwards take turns; the
median counts. The peer is the bare forward of the same run, with the fastest experts.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import mogul.models  # noqa: F401  (registers the experts implementation)
from mogul.bench import ledger
from mogul.core.table import Table
from mogul.models.load import default_device
from mogul.observe.tracer import Level, Tracer
from mogul.spec.picks import trace_of_picks
from mogul.spec.trace import ModelStamp

GPU = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 12,
       "num_experts": 128, "num_experts_per_tok": 8, "num_attention_heads": 32,
       "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 32000}  # fmt: skip
CPU = {**GPU, "hidden_size": 768, "moe_intermediate_size": 256, "num_hidden_layers": 6,
       "num_experts": 64, "num_attention_heads": 12, "head_dim": 64}  # fmt: skip


def build(device: torch.device) -> tuple[Any, torch.Tensor]:
    is_cpu = device.type == "cpu"
    config = Qwen3MoeConfig(**(CPU if is_cpu else GPU), intermediate_size=1024)
    config._experts_implementation = "mogul"
    with device:
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32 if is_cpu else torch.bfloat16)
        model = Qwen3MoeForCausalLM._from_config(config, experts_implementation="mogul").eval()
        ids = torch.randint(0, config.vocab_size, (4, 128 if is_cpu else 1024))
        torch.set_default_dtype(torch.float32)
    return model, ids


def timed_s(model: Any, ids: torch.Tensor) -> float:
    start_s = time.perf_counter()
    with torch.no_grad():
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    if ids.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start_s


def measure(model: Any, ids: torch.Tensor, level: Level, runs: int) -> dict[str, float]:
    bare_s, traced_s = [], []
    with Tracer(model, level=level) as tracer:
        for _ in range(runs + 2):
            traced_s.append(timed_s(model, ids))
            tracer.pause()
            bare_s.append(timed_s(model, ids))
            tracer.resume()
    bare, traced = (float(np.median(times[2:])) for times in (bare_s, traced_s))
    return {"bare_s": bare, "traced_s": traced, "ratio": traced / bare}


def trace_bytes() -> int:
    """A trace of 48 layers x 128 experts, 8 picks, with a full sample."""
    stamp = ModelStamp(
        name="m", family="qwen3_moe", num_layers=48, num_experts=128, top_k=8, hidden_size=2048
    )
    rng = np.random.default_rng(0)
    ids = np.argpartition(rng.random((8192, 48, 128)), 8, axis=-1)[..., :8]
    trace = trace_of_picks(ids, stamp)
    wide = {  # counts of a long run need four bytes
        n: a * 100_003 if n in ("count", "coactivation", "transition") else a
        for n, a in trace.arrays.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        type(trace)(trace.meta, wide).save(folder)
        return sum(file.stat().st_size for file in Path(folder).iterdir())


def main() -> int:
    """Measure; `--record` adds rows to the ledger."""
    device = torch.device(default_device())
    model, ids = build(device)
    runs = 9 if device.type == "cpu" else 30
    levels: tuple[Level, ...] = ("routing", "activations")
    rows = []
    name = torch.cuda.get_device_name() if device.type == "cuda" else ""
    config = model.config
    case = (
        f"{config.num_hidden_layers} layers x {config.num_experts} experts, K "
        f"{config.num_experts_per_tok}, hidden {config.hidden_size}, {ids.numel()} tokens"
    )
    for level in levels:
        result = measure(model, ids, level, runs)
        rows.append((case, level, *(round(value, 5) for value in result.values())))
        if "--record" in sys.argv:
            ledger.append(
                [
                    ledger.row(
                        device=name, bench="trace", case=f"{case}, level {level}",
                        metric="traced over bare forward", unit="ratio",
                        value=round(result["ratio"], 4), runs=runs,
                        bare_s=round(result["bare_s"], 5), traced_s=round(result["traced_s"], 5),
                    )
                ]
            )  # fmt: skip
    size = trace_bytes()
    if "--record" in sys.argv:
        case48 = "48 layers x 128 experts, K 8"
        row = ledger.row(
            device=name,
            bench="trace",
            case=case48,
            metric="trace_bytes",
            unit="B",
            value=size,
            runs=1,
        )
        ledger.append([row])
    notes = (f"a trace of 48 layers x 128 experts: {size / 1e6:.2f} MB",)
    Table(
        f"tracing on {name or 'CPU'}", ("case", "level", "bare s", "traced s", "ratio"), rows, notes
    ).show()
    return 0


if __name__ == "__main__":
    sys.exit(main())
