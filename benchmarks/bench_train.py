"""How fast does a whole training step run on one GPU, and where does its time go?

Shapes of the issue: `fixed` (hidden 1024, 16 layers, 64 experts in 8 groups, 8 picks, width 256,
vocabulary 32,000, 2,048 tokens a sequence) and `pangu` (four layers of Pangu Pro MoE, vocabulary
32,000). bf16 weights with float32 masters, AdamW, balance loss, real routing of a model at its
random start. MFU = (6 x active parameters without the input embedding + causal attention) x
tokens/s over the vendor's peak. `--peer` runs Transformers' Trainer with grouped_mm as well.

    python benchmarks/bench_train.py --case fixed --peer --out results.jsonl
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import mogul.models
from mogul.bench import ledger
from mogul.models import MogeConfig, MogeForCausalLM, PanguProMoEConfig, PanguProMoEForCausalLM
from mogul.simulate.train import flop_per_token
from mogul.spec.families import model_spec
from mogul.train.balance import Balancer
from mogul.train.balance_rules import BalanceSection
from mogul.train.build import chosen_kernels
from mogul.train.float8 import float8_products
from mogul.train.layers import prepared_layers
from mogul.train.metrics import peak_flop_per_s
from mogul.train.objective import choose_objective
from mogul.train.optimizer import OptimizerSpec, build_optimizer
from mogul.train.recipe import RunSection
from mogul.train.step import Stepper

LENGTH = 2048
DEVICE = torch.device("cuda", 0)
FIXED = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "num_attention_heads": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "router_n_groups": 8,
    "moe_intermediate_size": 256,
    "max_position_embeddings": LENGTH,
}
PANGU = {"vocab_size": 32000, "num_hidden_layers": 4, "max_position_embeddings": LENGTH}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["fixed", "pangu"], default="fixed")
    parser.add_argument("--rows", type=int, default=0, help="sequences a micro-batch")
    parser.add_argument("--accumulation", type=int, default=0)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--optimizer", choices=["adamw", "muon"], action="append")
    parser.add_argument("--attention", choices=["best", "auto", "cudnn"], default="best")
    parser.add_argument("--float8", choices=["none", "tensorwise", "rowwise"], default="none")
    parser.add_argument("--peer", action="store_true", help="Trainer with grouped_mm as well")
    parser.add_argument("--peer-rows", type=int, default=8)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-split", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="JSON lines of ledger rows")
    options = parser.parse_args()
    mogul.models.register()
    if not options.rows:
        options.rows = 32 if options.case == "fixed" else 8
    if not options.accumulation:
        options.accumulation = 1 if options.case == "fixed" else 4
    if options.attention == "best":
        options.attention = best_attention(options)
    found: dict[str, Any] = {}
    if options.peer:
        guarded("peer", lambda: found.update(peer=bench_trainer(options)))
    for optimizer in options.optimizer or ["adamw"]:
        guarded(optimizer, lambda kind=optimizer: found.update(ours=bench_ours(options, kind)))
        if "ours" in found:
            record(options, optimizer, found.pop("ours"), found.get("peer"))


def guarded(what: str, part: Callable[[], object]) -> None:
    """Run a part; a failure is printed and the rest goes on."""
    try:
        part()
    except Exception:
        print(f"{what} failed", flush=True)
        traceback.print_exc()
    gc.collect()
    torch.cuda.empty_cache()


def build(options: argparse.Namespace, experts: str) -> Any:
    torch.manual_seed(0)
    is_pangu = options.case == "pangu"
    config = PanguProMoEConfig(**PANGU) if is_pangu else MogeConfig(**FIXED)
    cls = PanguProMoEForCausalLM if is_pangu else MogeForCausalLM
    with torch.device(DEVICE):
        return cls._from_config(
            config,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation=experts,
        ).train()


def batches(options: argparse.Namespace, vocab: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (options.rows, LENGTH)
    return [
        torch.randint(0, vocab, shape, generator=generator).pin_memory()
        for _ in range(options.accumulation)
    ]


def best_attention(options: argparse.Namespace) -> str:
    """Flash against cuDNN, forward and backward, at the case's shape."""
    heads, width = (8, 128) if options.case == "fixed" else (40, 128)
    times = {}
    for name, backend in (
        ("auto", SDPBackend.FLASH_ATTENTION),
        ("cudnn", SDPBackend.CUDNN_ATTENTION),
    ):
        try:
            q, k, v = (
                torch.randn(8, heads, LENGTH, width, device=DEVICE, dtype=torch.bfloat16)
                .requires_grad_()
                for _ in range(3)
            )  # fmt: skip
            with sdpa_kernel(backend):
                for _ in range(3):
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    F.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()
                torch.cuda.synchronize()
            times[name] = (time.perf_counter() - start) / 10 * 1e3
        except RuntimeError as error:
            print("attention", name, error, flush=True)
    print("attention ms (8 sequences)", times, flush=True)
    torch.cuda.empty_cache()
    return min(times, key=lambda name: times[name]) if times else "auto"


def bench_ours(options: argparse.Namespace, kind: str) -> dict[str, Any]:
    start = time.perf_counter()
    model = build(options, "mogul")
    big = options.case == "pangu"
    spec = OptimizerSpec(kind=kind, lr=1e-4, state_dtype="bfloat16" if big else "float32")
    optimizer = build_optimizer(model, spec, compile=True)
    compiles = not options.no_compile
    run = RunSection(steps=1, attention=options.attention)
    with ExitStack() as stack:
        stack.enter_context(float8_products(model, options.float8, DEVICE))
        stack.enter_context(prepared_layers(model, compile=compiles))
        stack.enter_context(chosen_kernels(run, DEVICE))
        section = BalanceSection(loss="batch")
        balancer = stack.enter_context(
            Balancer(model, section, micro_batches=options.accumulation, compiled=compiles)
        )
        stepper = Stepper(
            model,
            optimizer,
            choose_objective(model, "chunked", compile=compiles),
            wide_sums=not big,
        )
        parts = batches(options, model.config.vocab_size)

        def step() -> float:
            found = stepper.gradients(parts)
            with torch.profiler.record_function("part: optimizer"):
                stepper.update(found, 1e-4)
            balancer.end_step()
            return found.loss

        for index in range(3):
            loss = step()
            torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            print(f"step {index}: loss {loss:.4f}, {seconds:.1f} s since start", flush=True)
        breaks = torch._dynamo.utils.counters["graph_break"]
        print("graph breaks", {key[:200]: count for key, count in breaks.items()}, flush=True)
        result = timed(step, options, model)
        print(json.dumps(result), flush=True)
        if not options.no_split:
            guarded("split", lambda: result.update(split=split(step, result["step_s"])))
            print(json.dumps(result), flush=True)
    return result


def timed(step: Callable[[], float], options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Median and spread of whole steps."""
    times = []
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(options.steps):
        start = time.perf_counter()
        loss = step()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    tokens = options.rows * LENGTH * options.accumulation
    return summary(times, tokens, model) | {
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "attention": options.attention,
        "rows": options.rows,
        "accumulation": options.accumulation,
    }


def summary(times: list[float], tokens: int, model: Any) -> dict[str, Any]:
    median = sorted(times)[len(times) // 2]
    flop = flop_per_token(model_spec(model.config.to_dict()), LENGTH)
    peak = peak_flop_per_s(DEVICE) or float("nan")
    return {
        "step_s": median,
        "spread": (max(times) - min(times)) / median,
        "runs": len(times),
        "tokens_per_s": tokens / median,
        "tflop_per_s": tokens / median * flop / 1e12,
        "mfu": tokens / median * flop / peak,
    }


def split(step: Callable[[], float], step_s: float) -> dict[str, float]:
    """Share of the step by part: device time of operators, and the time the device waited."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    ) as profiler:
        step()
        torch.cuda.synchronize()
    busy = experts = attention = optimizer = loss = 0.0
    rows = {}
    for event in profiler.key_averages():
        total, own = event.device_time_total / 1e6, event.self_device_time_total / 1e6
        name = event.key
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not name.startswith("part: "):
                busy += own
                rows[name[:70]] = own
        elif name in ("mogul::moe_train", "mogul::moe_grad"):
            experts += total
        elif "scaled_dot_product" in name and name.startswith("aten::_scaled"):
            attention += total
        elif name == "_HeadLoss":
            loss += total
        elif name == "part: optimizer":
            optimizer += total
    for name, value in sorted(rows.items(), key=lambda pair: -pair[1])[:40]:
        print(f"{value * 1e3:9.3f} ms  {name}", flush=True)
    parts = {
        "experts": experts,
        "attention": attention,
        "loss": loss,
        "optimizer": optimizer,
        "rest": busy - experts - attention - loss - optimizer,
        "host": max(0.0, step_s - busy),
    }
    return {name: value / step_s for name, value in parts.items()}


def bench_trainer(options: argparse.Namespace) -> dict[str, Any]:
    """Transformers' Trainer: the same weights, batch of tokens, optimizer and losses."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model = build(options, "grouped_mm")
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.01
    tokens_rows = options.rows * options.accumulation
    rows = min(options.peer_rows, tokens_rows)
    ids = torch.randint(0, model.config.vocab_size, (256, LENGTH))
    data = [{"input_ids": row, "labels": row} for row in ids] * 8
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.start = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            times.append(time.perf_counter() - self.start)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=tokens_rows // rows,
            max_steps=3 + options.steps // 2,
            bf16=True,
            optim="adamw_torch_fused",
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    result = summary(times[3:], tokens_rows * LENGTH, model)
    result |= {"rows": rows, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    print("Trainer", json.dumps(result), flush=True)
    return result


def record(
    options: argparse.Namespace, kind: str, ours: dict[str, Any], peer: dict[str, Any] | None
) -> None:
    rounded = {
        key: round(value, 4) if isinstance(value, float) else value for key, value in ours.items()
    }
    precision = "bf16" if options.float8 == "none" else f"dense layers in float8 {options.float8}"
    case = f"{options.case}, {options.rows} x {LENGTH} tokens x {options.accumulation}"
    row = ledger.row(
        device=torch.cuda.get_device_name(DEVICE),
        bench="train",
        case=f"{case}, {precision}, {kind}",
        metric="speed of whole steps",
        unit="tokens/s",
        value=round(ours["tokens_per_s"]),
        **{key: rounded[key] for key in rounded if key not in ("tokens_per_s", "rows")},
        peers={"Trainer, grouped_mm": round(peer["tokens_per_s"])} if peer else {},
        ratio=round(ours["tokens_per_s"] / peer["tokens_per_s"], 3) if peer else None,
        peer_detail=peer,
    )
    print(json.dumps(row), flush=True)
    if options.out:
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
