"""Ideas around the experts of a whole Qwen3-30B-A3B, four layers, in turns with grouped_mm.

python benchmarks/gpu/model_ideas.py --out DIR --cells prefill,compiled,whole

Predicted before the first run (one H100, milliseconds of mogul's side; then 8.50 captured and 5.33
compiled, grouped_mm 13.8 and 6.90):

- route: picks by mogul's router kernel. Captured 8.33, ratio 1.66; compiled 5.21, 1.32.
- tail: sum over picks, residual and the next layer's norm in one launch. 8.0, 1.73; with route
  7.83, 1.77.
- head: with both, also attention's residual and the norm before the experts. 7.35, 1.88.
- open (compiled): the sum over picks left to Inductor, which adds the residual in it. 5.28, 1.31.
- whole: all layers compiled as one graph, both sides. 5.23 and 6.80, ratio 1.30.

Found: captured 8.35 (1.66), 7.99 (1.74), 7.82 (1.77), 7.33 (1.89); open 5.88 (1.25), worse.

Predicted before the second run: training compiled as one graph -0.8 ms on both sides, ratio as
layer by layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from transformers.integrations import moe as transformers_moe

sys.path.insert(0, str(Path(__file__).parents[1]))
from tune import precompile

import bench_moe_model as bench
from mogul.kernels.triton import ops
from mogul.kernels.triton.plans import plan_for

Maker = Callable[[Any, Tensor], Callable[[], object]]


@torch.library.custom_op("ideas::slots", mutates_args=())
def slots(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Every pick's output [T x K, D], not yet summed."""
    layer = ops.layer_of_call(x, down, ids, weights)
    plan, count = plan_for(layer.shape, x.shape[0]), ids.numel()
    sort = layer.sort(ids, plan.rows)
    act, y = x.new_empty((count, down.shape[2])), x.new_empty((count, x.shape[1]))
    layer.up(plan, x, gate_up, act, act, sort, save=False)
    layer.product(plan, plan.down, act, down, y, sort, transposed=False)
    return y


@slots.register_fake
def _(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty((ids.numel(), x.shape[1]))


def open_experts(self: Any, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """An experts implementation whose sum over picks a compiler sees."""
    y = slots(x, self.gate_up_proj, self.down_proj, ids, weights).view(*ids.shape, -1)
    return (y.float() * weights.float().unsqueeze(-1)).sum(1).to(x.dtype)


transformers_moe.ALL_EXPERTS_FUNCTIONS.register("open", open_experts)


@triton.jit
def _add_norm(value, row, cols, residual, gamma, h_out, n_out, eps, D: tl.constexpr):
    at = row * D + cols
    kind = h_out.dtype.element_ty
    h = (value.to(kind).to(tl.float32) + tl.load(residual + at).to(tl.float32)).to(kind)
    tl.store(h_out + at, h)
    wide = h.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide) / D + eps)).to(kind).to(tl.float32)
    tl.store(n_out + at, (tl.load(gamma + cols).to(tl.float32) * normed).to(kind))


@triton.jit
def sum_add_norm(y, weights, residual, gamma, h_out, n_out, eps, D: tl.constexpr, K: tl.constexpr):
    """One program a token: h = residual + sum of the picks, n = its norm."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    total = tl.zeros((D,), tl.float32)
    for pick in tl.static_range(K):
        slot = row * K + pick
        total += tl.load(weights + slot).to(tl.float32) * tl.load(y + slot * D + cols)
    _add_norm(total, row, cols, residual, gamma, h_out, n_out, eps, D)


@triton.jit
def add_norm(a, residual, gamma, h_out, n_out, eps, D: tl.constexpr):
    """One program a token: h = residual + a, n = its norm."""
    row, cols = tl.program_id(0).to(tl.int64), tl.arange(0, D)
    value = tl.load(a + row * D + cols).to(tl.float32)
    _add_norm(value, row, cols, residual, gamma, h_out, n_out, eps, D)


def joined(model: Any, ids: Tensor, *, head: bool = False) -> Callable[[], object]:
    """`bench.prefill` with a layer's last launches and the next one's first in one."""
    decoder = model.model

    def call() -> Tensor:
        h = decoder.embed_tokens(ids)
        rope = decoder.rotary_emb(h, torch.arange(ids.shape[1], device=ids.device)[None])
        n = decoder.layers[0].input_layernorm(h)
        after = [layer.input_layernorm for layer in decoder.layers[1:]] + [decoder.norm]
        for layer, norm in zip(decoder.layers, after, strict=True):
            a, _ = layer.self_attn(n, position_embeddings=rope, attention_mask=None)
            before = layer.post_attention_layernorm
            if head:
                h, n = _normed(add_norm, before, (a, h))
            else:
                h = h + a
                n = before(h)
            flat = n.view(-1, n.shape[-1])
            _, weights, picks = layer.mlp.gate(flat)
            experts = layer.mlp.experts
            y = slots(flat, experts.gate_up_proj, experts.down_proj, picks, weights)
            h, n = _normed(sum_add_norm, norm, (y, weights, h), K=picks.shape[1])
        return model.lm_head(n[:, -1:])

    return torch.no_grad()(call)


def _normed(
    kernel: Any, norm: Any, inputs: tuple[Tensor, ...], **constants: int
) -> tuple[Tensor, Tensor]:
    residual = inputs[-1]
    h, n = torch.empty_like(residual), torch.empty_like(residual)
    width = residual.shape[-1]
    grid = (residual.numel() // width,)
    args = (*inputs, norm.weight, h, n, norm.variance_epsilon)
    kernel[grid](*args, D=width, **constants, num_warps=8)
    return h, n


def with_head(model: Any, ids: Tensor) -> Callable[[], object]:
    """`joined`, attention's residual too."""
    return joined(model, ids, head=True)


CELLS: dict[str, list[tuple[str, str, Maker]]] = {
    "prefill": [
        ("mogul", "mogul", bench.prefill),
        ("route", "mogul+route", bench.prefill),
        ("tail", "mogul", joined),
        ("route+tail", "mogul+route", joined),
        ("route+tail+head", "mogul+route", with_head),
        ("grouped_mm", "grouped_mm", bench.prefill),
    ],
    "compiled": [
        ("mogul", "mogul", bench.prefill),
        ("route", "mogul+route", bench.prefill),
        ("open", "open", bench.prefill),
        ("open+route", "open+route", bench.prefill),
        ("grouped_mm", "grouped_mm", bench.prefill),
    ],
    "whole": [
        ("route", "mogul+route", bench.prefill),
        ("grouped_mm", "grouped_mm", bench.prefill),
    ],
    "whole-training": [
        ("mogul", "mogul", bench.training),
        ("route", "mogul+route", bench.training),
        ("grouped_mm", "grouped_mm", bench.training),
    ],
}


def run_cell(cell: str, rounds: int, out: Path) -> None:
    """All variants of a cell in turns; a line each, with the distance of logits to the first's."""
    training = "training" in cell
    model = bench.make_model(4).train(training)
    if cell.startswith("whole"):
        model.model.compile()
        model.loss_function = torch.compile(model.loss_function)
    elif cell == "compiled":
        for layer in model.model.layers:
            layer.compile(fullgraph=True)
    shape = (4 if training else 1, 4096)
    ids = torch.randint(model.config.vocab_size, shape, device="cuda")
    replays, first = {}, None
    for name, implementation, maker in CELLS[cell]:
        try:
            bench.choose(model, implementation)
            call = maker(model, ids)
            given = call().detach().float()
            first = given if first is None else first
            error = ((given - first).norm() / first.norm()).item()
            bench.plain_ms(call)
            replays[name] = bench.capture(call).replay
            bench.log(cell, name, f"ready, {error:.1e} from the first")
        except Exception as problem:
            bench.log(cell, name, "failed:", type(problem).__name__, str(problem)[:300])
    times = {name: [] for name in replays}
    for _ in range(rounds):
        for name, replay in replays.items():
            times[name].append(bench.once(replay))
    middle = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    for name, ms in middle.items():
        ratio = middle.get("grouped_mm", float("nan")) / ms
        bench.log(f"{cell} {name}: {ms:.3f} ms, grouped_mm takes {ratio:.3f} times as long")
        line = {"cell": cell, "variant": name, "ms": ms, "least": min(times[name]), "ratio": ratio}
        with (out / "ideas.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def main() -> None:
    """Run the cells asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64
    cells = args.cells.split(",")
    with_training = any("training" in cell for cell in cells)
    precompile([("C", 4096)], [("C", 16384)] if with_training else [])
    with sdpa_kernel(bench.CUDNN_FIRST, set_priority=True):
        for cell in cells:
            run_cell(cell, args.rounds, args.out)
            torch.cuda.empty_cache()
            torch.compiler.reset()


if __name__ == "__main__":
    main()
