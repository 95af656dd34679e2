"""How much faster is a whole Qwen3-30B-A3B with mogul's experts than with Transformers' own?

The model has the real widths and fewer layers; its vocabulary shrinks with them, so that the head
keeps its share. Prefill is one forward of 4,096 tokens, training a forward and backward of 16,384
(4 sequences) without the optimizer. Both sides run the same code but for the experts: captured in a
CUDA graph, with and without torch.compile of every decoder layer. The implementations take turns;
a row is the median over the rounds. Attention is SDPA without a mask: Transformers leaves the
causal mask out of plain calls only, and with a mask SDPA takes a slower kernel.

`NAME+route` also lets mogul's router kernel pick; `sonicmoe` and `deepgemm` (which has no backward)
use installed libraries in place of the hub's copies; `--sequences` sets the batches
(`prefill:4x1024,training:32x1024`). `--norms torch` and `--rotations compiled` stand for what
Transformers' `use_kernels=True` brings from its hub, on all sides: torch's norm of one launch, and
Transformers' own rotation compiled. `--profile` adds each side's device time by kernel
(profile.jsonl). Prefill without compiled layers also says how far each implementation's numbers are
from mogul's.

    python benchmarks/bench_moe_model.py --layers 4 --implementations mogul,grouped_mm --out DIR
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.integrations import moe as transformers_moe
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3_moe import modeling_qwen3_moe as modeling
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeTopKRouter

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import peer_deepgemm
import peer_sonic
from profile_layer import kernel_times
from tune import precompile

import mogul.models  # noqa: F401 (registers the implementation)
from mogul.bench import ledger
from mogul.kernels import RouterSpec, route

CAUSAL = "sdpa_causal"
AttentionInterface.register(CAUSAL, sdpa_attention_forward)
AttentionMaskInterface.register(CAUSAL, lambda *_args, **_kwargs: None)
FULL = {"layers": 48, "vocab": 151_936}
START = time.time()


def log(*words: Any) -> None:
    """Print with the seconds since the start."""
    print(f"[{time.time() - START:6.1f}]", *words, flush=True)


SPEC = RouterSpec(num_experts=128, top_k=8, score="softmax", weighting="renormalised")
_transformers_router = Qwen3MoeTopKRouter.forward


def _router(self: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Transformers' router, or mogul's kernel after the same product."""
    if not getattr(self, "routes_by_kernel", False):
        return _transformers_router(self, hidden_states)
    logits = nn.functional.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
    picked = route(logits, SPEC)
    return logits, picked.weights, picked.ids


def _norm(self: Any, hidden_states: Tensor) -> Tensor:
    """Transformers' norm takes eight launches unless it is compiled; this one takes one."""
    weight = self.weight
    return nn.functional.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)


Qwen3MoeTopKRouter.forward = _router
transformers_moe.ALL_EXPERTS_FUNCTIONS.register("sonicmoe", peer_sonic.experts_forward)


def choose(model: Any, name: str) -> None:
    """Set a model's experts implementation, and who picks."""
    implementation, _, router = name.partition("+")
    if implementation == "deepgemm":
        peer_deepgemm.give_transformers()
    model.set_experts_implementation(implementation)
    for layer in model.model.layers:
        layer.mlp.gate.routes_by_kernel = router == "route"


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
        attn_implementation=CAUSAL,
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


def once(call: Callable[[], object]) -> float:
    """Milliseconds of one call, by device events."""
    a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    a.record()
    call()
    b.record()
    torch.cuda.synchronize()
    return a.elapsed_time(b)


def plain_ms(call: Callable[[], object]) -> float:
    """Median milliseconds of calls that the host starts; compiles first where it must."""
    call()
    return statistics.median(once(call) for _ in range(5))


def outputs(model: Any, ids: Tensor) -> list[Tensor]:
    """What the first layer's experts return, and the last hidden states."""
    found: list[Tensor] = []
    hook = model.model.layers[0].mlp.register_forward_hook(lambda *call: found.append(call[2]))
    with torch.no_grad():
        found.append(model.model(ids, use_cache=False).last_hidden_state)
    hook.remove()
    return found


def differences(model: Any, ids: Tensor, names: list[str]) -> dict[str, list[float]]:
    """Relative distance of the others' outputs from mogul's: first experts, last hidden states.

    The first experts see the same inputs and picks, so they differ by rounding; later, picks that
    were nearly tied differ, too.
    """
    choose(model, "mogul")
    ours, found = outputs(model, ids), {}
    for name in names:
        if name == "mogul":
            continue
        try:
            choose(model, name)
            pairs = list(zip(outputs(model, ids), ours, strict=True))
        except Exception as error:  # measure() shows it in full
            log(f"{name} is not compared: {type(error).__name__}")
            continue
        found[name] = [float((a - b).float().norm() / b.float().norm()) for a, b in pairs]
        log(f"{name} is off mogul by", *(f"{d:.1e}" for d in found[name]))
    return found


def measure(
    model: Any, kind: str, ids: Tensor, names: list[str], rounds: int, *, profiled: bool
) -> dict[str, dict[str, Any]]:
    """Times of every implementation that runs, captured and in turns; plain calls beside them."""
    replays: dict[str, tuple[Callable[[], object], float]] = {}
    for name in names:
        call = (prefill if kind == "prefill" else training)(model, ids)
        try:
            choose(model, name)
            plain = plain_ms(call)
            log(kind, name, f"plain {plain:.2f} ms")
            replays[name] = capture(call).replay, plain
            log(kind, name, "captured")
        except Exception as error:
            model.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            log(f"{name} does not run {kind}: {type(error).__name__} {str(error)[:160]}")
            if not isinstance(error, torch.OutOfMemoryError):
                traceback.print_exc(limit=-4)
    times: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(rounds):
        for name, (replay, _) in replays.items():
            times[name].append(once(replay))
    return {
        name: {
            "ms": statistics.median(t),
            "spread": max(t[1:]) - min(t[1:]),
            "eager_ms": replays[name][1],
            "kernels": kernel_times(replays[name][0], 3) if profiled else [],
        }
        for name, t in times.items()
    }


def report(
    found: dict[str, dict[str, Any]], off: dict[str, list[float]], case: str, rounds: int, out: Path
) -> None:
    """Print the cell; write its ledger row (value: mogul's milliseconds)."""
    for name, row in found.items():
        if row["kernels"]:
            with (out / "profile.jsonl").open("a") as file:
                file.write(json.dumps({"case": case, "name": name, "us": row["kernels"]}) + "\n")
        ratio = row["ms"] / found["mogul"]["ms"] if "mogul" in found else float("nan")
        log(f"{case}: {name} {row['ms']:.3f} ms, {ratio:.2f} x mogul, plain {row['eager_ms']:.2f}")
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
        **({"off_mogul": {n: [round(d, 5) for d in ds] for n, ds in off.items()}} if off else {}),
    )
    ledger.append([row], out / "ledger.jsonl")


CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
"""The faster kernel for both sides, as `mogul train` has it."""


def main() -> None:
    """Run every cell; write ledger.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--implementations", default="mogul,grouped_mm,batched_mm")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compile", action="store_true", help="also with compiled layers")
    parser.add_argument(
        "--sequences", type=batches, default=batches("prefill:1x4096,training:4x4096")
    )
    parser.add_argument("--norms", choices=("transformers", "torch"), default="transformers")
    parser.add_argument("--rotations", choices=("transformers", "compiled"), default="transformers")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    if args.norms == "torch":
        Qwen3MoeRMSNorm.forward = _norm
    if args.rotations == "compiled":
        modeling.apply_rotary_pos_emb = torch.compile(modeling.apply_rotary_pos_emb)
    names = args.implementations.split(",")
    torch._dynamo.config.recompile_limit = 64  # every layer, with every implementation
    sizes = {
        kind: [("C", n * length) for k, n, length in args.sequences if k == kind] for kind in KINDS
    }
    precompile(sizes["prefill"], sizes["training"])
    with sdpa_kernel(CUDNN_FIRST, set_priority=True):
        for compiled in (True, False) if args.compile else (False,):
            for kind, count, length in args.sequences:
                run_cell(args, names, kind, (count, length), compiled)
                torch.cuda.empty_cache()
                torch.compiler.reset()


KINDS = ("prefill", "training")


def batches(text: str) -> list[tuple[str, int, int]]:
    """`prefill:1x4096` -> (kind, sequences, length)."""
    found = []
    for part in text.split(","):
        kind, _, size = part.partition(":")
        count, _, length = size.partition("x")
        found.append((kind, int(count), int(length)))
    return found


def run_cell(
    args: argparse.Namespace, names: list[str], kind: str, shape: tuple[int, int], compiled: bool
) -> None:
    """One model, all implementations in turns."""
    model = make_model(args.layers).train(kind == "training")
    if compiled:
        for layer in model.model.layers:
            layer.compile(fullgraph=not {"sonicmoe", "deepgemm"} & set(names))
        model.loss_function = torch.compile(model.loss_function)
    ids = torch.randint(model.config.vocab_size, shape, device="cuda")
    case = f"Qwen3-30B-A3B {args.layers} layers {kind} {ids.numel()}"
    case += f" in {shape[0]}" if shape[1] != 4096 else ""
    case += " compiled layers, captured" if compiled else " captured"
    case += ", torch's norms" if args.norms == "torch" else ""
    case += ", rotations compiled" if args.rotations == "compiled" else ""
    if kind == "training":
        names = [name for name in names if name != "deepgemm"]
    off = differences(model, ids, names) if kind == "prefill" and not compiled else {}
    found = measure(model, kind, ids, names, args.rounds, profiled=args.profile)
    report(found, off, case, args.rounds, args.out)


if __name__ == "__main__":
    main()
