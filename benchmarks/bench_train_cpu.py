"""Does our training step beat Transformers' grouped_mm on a processor?

A MoGE of 22M parameters (6 layers, hidden 256, 32 experts of width 128 in 4 groups, 4 picks,
vocabulary 8,192), batches of 8 x 256 tokens, float32, balance loss, AdamW. Steps of both run in
turn, so that they see the same weather.

    OMP_NUM_THREADS=2 python benchmarks/bench_train_cpu.py --record
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any

import torch

import mogul.models
from mogul.bench import ledger
from mogul.core.table import Table
from mogul.models import MogeConfig, MogeForCausalLM
from mogul.train.balance import Balancer
from mogul.train.balance_rules import BalanceSection
from mogul.train.layers import prepared_layers
from mogul.train.objective import choose_objective
from mogul.train.optimizer import OptimizerSpec, build_optimizer
from mogul.train.step import Stepper

CONFIG = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "router_n_groups": 4,
    "moe_intermediate_size": 128,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
ROWS, LENGTH = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time, for a busy machine")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    mogul.models.register()
    clock = time.process_time if options.cpu_time else time.perf_counter
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, CONFIG["vocab_size"], (ROWS, LENGTH), generator=generator)
    with ExitStack() as stack:
        steps = {
            "mogul": our_step(stack, ids),
            "mogul, compiled": our_step(stack, ids, compile=True),
            "Transformers, grouped_mm": their_step(ids, "grouped_mm"),
        }
        losses = {name: [step() for _ in range(2)] for name, step in steps.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(options.rounds):
            for name, step in steps.items():
                start = clock()
                step()
                times[name].append(clock() - start)
    report(times, losses, options)


def build(experts: str) -> Any:
    torch.manual_seed(0)
    return MogeForCausalLM._from_config(
        MogeConfig(**CONFIG), attn_implementation="sdpa", experts_implementation=experts
    ).train()


def our_step(stack: ExitStack, ids: torch.Tensor, *, compile: bool = False) -> Callable[[], float]:
    model = build("mogul")
    optimizer = build_optimizer(model, OptimizerSpec(lr=3e-4))
    stack.enter_context(prepared_layers(model, compile=compile))
    section = BalanceSection(loss="batch")
    balancer = stack.enter_context(Balancer(model, section, compiled=compile))
    stepper = Stepper(model, optimizer, choose_objective(model, compile=compile))

    def step() -> float:
        found = stepper.gradients([ids])
        stepper.update(found, 3e-4)
        balancer.end_step()
        return found.loss

    return step


def their_step(ids: torch.Tensor, experts: str) -> Callable[[], float]:
    model = build(experts)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = 0.01
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )

    def step() -> float:
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(output.loss.detach())

    return step


def report(
    times: dict[str, list[float]], losses: dict[str, list[float]], options: argparse.Namespace
) -> None:
    tokens = ROWS * LENGTH
    speed = {name: tokens / median(values) for name, values in times.items()}
    best = {name: tokens / min(values) for name, values in times.items()}
    ours = speed["mogul"]
    rows = [
        (name, round(value), round(best[name]), f"{ours / value:.2f}", f"{losses[name][1]:.4f}")
        for name, value in speed.items()
    ]
    kind = "CPU time" if options.cpu_time else "wall time"
    Table(
        "Training step on the processor",
        ("step", "tokens/s", "best", "mogul is faster by", "second loss"),
        rows,
        (f"medians of {options.rounds} interleaved, {kind}, {torch.get_num_threads()} threads",),
    ).show("table")
    if options.record:
        peers = {name: round(value, 1) for name, value in speed.items() if name != "mogul"}
        threads = torch.get_num_threads()
        ledger.append(
            [
                ledger.row(
                    bench="train_cpu",
                    case=f"22M MoGE, {ROWS} x {LENGTH} tokens, float32, {threads} threads, {kind}",
                    metric="median speed of whole steps",
                    unit="tokens/s",
                    value=round(ours, 1),
                    best=round(best["mogul"], 1),
                    runs=options.rounds,
                    peers=peers,
                    ratio=round(ours / peers["Transformers, grouped_mm"], 3),
                    ratio_compiled=round(
                        speed["mogul, compiled"] / peers["Transformers, grouped_mm"], 3
                    ),
                )
            ]
        )


if __name__ == "__main__":
    main()
