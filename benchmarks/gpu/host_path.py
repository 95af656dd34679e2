"""How long does the host work for one call of the experts layer, and on what?

The device sleeps while 50 calls are queued, so nothing waits for it; the median of 15 such rounds,
and the least beside it, which other programs of the machine disturbed least.
Doors: `moe_forward`; the same as a Transformers experts module (`experts_implementation="mogul"`);
the recorded launches alone, as the device's driver takes them; the forward as written, without its
tape; `route`. Then the parts of a call in Python: its kind, the door after it, both allocations.

    python benchmarks/gpu/host_path.py --shapes A,C,D --tokens 1,8,64,456,4096 --out DIR
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Case, make_case, make_tokens
from torch import Tensor, nn
from tune import layer_for

from mogul.bench import ledger
from mogul.kernels import RouterSpec, moe_forward, route
from mogul.kernels.moe import DEFAULT_LAYOUT, _kind
from mogul.models.experts import register

ROUNDS, CALLS = 15, 50


def host_us(call: Callable[[], object]) -> tuple[float, float]:
    """Microseconds of host work a call: the median of all rounds, and the least."""
    found = []
    for _ in range(5):
        call()
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        torch.cuda._sleep(20_000_000)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append((time.perf_counter() - start) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(found), min(found)


def experts_module(case: Case) -> nn.Module:
    """Transformers' Qwen3-MoE experts with the weights of a case."""
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    register()
    experts, width, inner = case.dims
    config = Qwen3MoeConfig(
        hidden_size=width, moe_intermediate_size=inner, num_experts=experts,
        num_experts_per_tok=case.picks,
    )  # fmt: skip
    config._experts_implementation = "mogul"
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)
    module.gate_up_proj = nn.Parameter(case.gate_up, requires_grad=False)
    module.down_proj = nn.Parameter(case.down, requires_grad=False)
    return module


def launches_alone(case: Case, inputs: tuple[Tensor, ...]) -> Callable[[], object] | None:
    """Only the entries into the driver of a recorded forward, every argument ready."""
    x, ids, weights = inputs
    layer = layer_for(case)
    everything = (x, case.gate_up, case.down, ids, weights)
    layer.infer(*everything)
    tape = layer.tape(x.shape[0])
    if tape is None:
        return None
    tape._known.clear()
    tape.replay(everything, layer.device)
    ready = next(reversed(tape._known.values()))  # their memory is free: nothing is made meanwhile

    def call() -> None:
        for entry, args in ready:
            entry(*args)

    return call


def doors(case: Case, tokens: int) -> dict[str, Callable[[], object]]:
    """What is timed at one number of tokens."""
    x, ids, weights = make_tokens(case, tokens)
    layer, module = layer_for(case), experts_module(case)
    everything = (x, case.gate_up, case.down, ids, weights)
    written = layer.few if layer.shape.uses_few(tokens) else layer.forward
    logits = torch.randn(tokens, case.dims[0], device="cuda", dtype=x.dtype)
    spec = RouterSpec(case.dims[0], case.picks, num_groups=case.groups, weighting="renormalised")
    found: dict[str, Callable[[], object]] = {
        "moe_forward": lambda: moe_forward(*everything),
        "transformers": lambda: module(x, ids, weights),
        "as_written": lambda: written(*everything),
        "route": lambda: route(logits, spec),
    }
    alone = launches_alone(case, (x, ids, weights))
    if alone is not None:
        found["launches"] = alone
    work = 2 * ids.numel() * sum(case.dims[1:])
    found["kind"] = lambda: _kind(*everything, None, None, DEFAULT_LAYOUT, "auto")
    found["memory"] = lambda: (torch.empty_like(x), x.new_empty(work, dtype=torch.uint8))
    return found


def main() -> None:
    """One line a cell, one ledger row each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="A,C,D")
    parser.add_argument("--tokens", default="1,8,64,456,4096")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    sizes = [int(part) for part in args.tokens.split(",")]
    for name in args.shapes.split(","):
        case = make_case(name)
        for tokens in sizes:
            with torch.no_grad():
                us = {door: host_us(call) for door, call in doors(case, tokens).items()}
            told = "  ".join(
                f"{door} {value:.1f} ({least:.1f})" for door, (value, least) in us.items()
            )
            print(f"{name} {tokens}: {told} us", flush=True)
            value, least = us.pop("moe_forward")
            row = ledger.row(
                torch.cuda.get_device_name(), bench="host_path", case=f"{name} {tokens}",
                metric="host_time", unit="us", value=round(value, 1), least=round(least, 1),
                runs=ROUNDS,
                others={door: round(value, 1) for door, (value, _) in us.items()},
                others_least={door: round(least, 1) for door, (_, least) in us.items()},
            )  # fmt: skip
            ledger.append([row], args.out / "ledger.jsonl")
        del case
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
