"""Runs one case of the quantised Triton kernels in the interpreter and prints its error.

A process of its own, because TRITON_INTERPRET must be set before triton is imported.
"""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mogul.kernels import (
    ExpertLayout,
    dequantise_experts,
    moe_forward,
    moe_forward_quantised,
    quantise_experts,
)
from mogul.kernels.quant_format import FP8_MAX, quantise_rows, split_rows
from mogul.kernels.triton import quant_kernels, quant_layer
from mogul.kernels.triton.plans import Plan, Tile

PLAIN = Tile(n=32, k=32, warps=4, stages=2, group=2)
SWAPPED = Tile(n=32, k=64, warps=4, stages=2, swap=True, stream=True, per_sm=1)
WIDE = Tile(n=32, k=128, warps=4, stages=2, swap=True, stream=True)
CASES = {
    "fp8 plain": ("fp8", PLAIN, "silu", torch.float32),
    "fp8 swapped half": ("fp8", SWAPPED, "silu", torch.float16),
    "fp8 clamped with biases": ("fp8", PLAIN, "clamped_swiglu", torch.float32),
    "fp8-w8a16 plain": ("fp8-w8a16", PLAIN, "silu", torch.float32),
    "fp8-w8a16 swapped half": ("fp8-w8a16", SWAPPED, "silu", torch.float16),
    "fp8-w8a16 clamped with biases": ("fp8-w8a16", PLAIN, "clamped_swiglu", torch.float32),
    "int4-32 spans": ("int4-32", WIDE, "silu", torch.float32),
    "int4-64 half": ("int4-64", SWAPPED, "silu", torch.float16),
    "int4-128 short group": ("int4-128", SWAPPED, "silu", torch.float32),
    "int4-128 clamped with biases": ("int4-128", WIDE, "clamped_swiglu", torch.float32),
}


def torch_rounds(x, live=None, *, split=False):
    """Rows rounded by torch: the interpreter's own conversion to e4m3 loses carries."""
    return split_rows(x) if split else quantise_rows(x)


def rounding_error() -> float:
    """The kernel that rounds rows, into fp32 so that scales and live rows are what is tested."""
    x = torch.randn(6, 80)
    x[1] = 0
    value, scale, live = torch.full_like(x, 7.0), torch.full((6,), 7.0), torch.tensor([5])
    flags = {"C": 80, "BLOCK_C": 32, "SPLIT": False, "COUNTED": True, "PDL": False}
    quant_kernels.round_rows[(6,)](x, value, scale, live.int(), **flags)
    _, want = quantise_rows(x[:5])
    assert (value[5] == 7).all()
    assert scale[5] == 7
    assert value[[0, 2, 3, 4]].abs().amax() <= FP8_MAX * 1.0001
    spoilt, rest, scales = x.clone(), torch.empty_like(value), torch.empty(6)
    spoilt[0, 3] = float("nan")
    quant_kernels.round_rows[(6,)](spoilt, rest, scales, live.int(), **flags)
    assert scales[0].isnan(), "a row with what is no number stays none, by its scale"
    assert torch.equal(scales[1:5], scale[1:5])
    errors = ((scale[:5] - want).abs() / want, (value[:5] * want[:, None] - x[:5]).abs())
    return max(float(error.max()) for error in errors)


def torch_gates(both):
    """What `gated` computes, rounded by torch."""
    value, scale = gated(both)
    return quantise_rows(value * scale[:, None])


def gated(both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel that gates and rounds rows, its values in fp32."""
    value = torch.empty(len(both), both.shape[1] // 2)
    scale = torch.empty(len(both))
    flags = {"F": value.shape[1], "BLOCK_F": 32, "PDL": False}
    quant_kernels.round_gated[(len(both),)](both, value, scale, **flags)
    return value, scale


def gated_error() -> float:
    """silu(gate) * up of rows, before it becomes e4m3."""
    both = torch.randn(5, 2 * 80)
    both[1] = 0
    value, scale = gated(both)
    want = torch.nn.functional.silu(both[:, :80]) * both[:, 80:]
    _, want_scale = quantise_rows(want)
    errors = ((scale - want_scale).abs() / want_scale, (value * scale[:, None] - want).abs())
    return max(float(error.max()) for error in errors)


def shared_error() -> float:
    """Routed and shared experts as one operator against one after the other; torch's checks."""
    from mogul.kernels import moe_with_shared
    from mogul.kernels.triton import quant_shared, routing

    assert routing, "it registers mogul::route"
    quant_shared.rounded_rows = torch_rounds
    quant_shared.gated_rows = torch_gates
    packed = quantise_experts(torch.randn(4, 64, 32), torch.randn(4, 32, 32), "fp8")
    shared = (quantise_rows(torch.randn(96, 32)), quantise_rows(torch.randn(32, 48)))
    x, ids, weights = torch.randn(5, 32), torch.randint(0, 5, (5, 2)), torch.rand(5, 2)
    up, down = packed.gate_up, packed.down
    experts, products = (up.value, up.scale, down.value, down.scale), (*shared[0], *shared[1])
    routed = (*experts, ids, weights)
    operator = torch.ops.mogul.moe_quantised_shared.default
    found = operator(x, *routed, *products), moe_with_shared(x, experts, ids, weights, products)
    errors = [float((got - want).norm() / want.norm()) for got, want in zip(*found, strict=True)]
    checks = ("test_faketensor",)  # the others multiply fp8 on the processor
    torch.library.opcheck(operator, (x, *routed, *shared[0], *shared[1]), test_utils=checks)
    router, rule = torch.randn(4, 32), [4, 2, 1, 0, 0, 0, 1]
    logits = torch.ops.mogul.linear(x, router, torch.float32)
    ids, weights, _, _ = torch.ops.mogul.route(logits, None, None, rule, 1.0)
    want = moe_with_shared(x, experts, ids, weights, products)
    inside = (x, x, router, None, None, rule, 1.0, *routed[:4], *shared[0], *shared[1])
    got = torch.ops.mogul.moe_routed_shared(*inside)
    errors += [float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)]
    return max(errors)


def operator_error() -> float:
    """Operator checks of torch, and a module compiled and exported as one graph."""
    from mogul.kernels import MOE_QUANTISED
    from mogul.kernels.triton.quant import moe_quantised_triton
    from mogul.models.quantise import PackedExperts

    MOE_QUANTISED.add("interpreted", moe_quantised_triton)
    packed = quantise_experts(torch.randn(4, 64, 32), torch.randn(4, 32, 32), "int4-32")
    module = PackedExperts(packed)
    module.backend = "interpreted"
    call = (torch.randn(5, 32), torch.randint(0, 4, (5, 2)), torch.rand(5, 2))
    with torch.no_grad():
        want = module(*call)
        got = torch.compile(module, fullgraph=True, backend="eager")(*call)
        graph = torch.export.export(module, call).graph
    assert any("moe_quantised" in str(node.target) for node in graph.nodes)
    up, down = packed.gate_up, packed.down
    weights = (up.value, up.scale, down.value, down.scale, None, None)
    operator = torch.ops.mogul.moe_quantised.default
    torch.library.opcheck(operator, (call[0], *weights, *call[1:], 32, 0, 1.702, 7.0))
    return float((got - want).norm())


def few_error(format_name: str, activation: str) -> float:
    """One token without a sort, with a null pick and with one pick."""
    experts, width, inner = 16, 96, 80
    layout = ExpertLayout(activation=activation)
    clamped = activation == "clamped_swiglu"
    biases = {}
    if clamped:
        biases["gate_up_bias"] = torch.randn(experts, 2 * inner)
        biases["down_bias"] = torch.randn(experts, width)
    gate_up = torch.randn(experts, 2 * inner, width) * 0.2
    down = torch.randn(experts, width, inner) * 0.2
    packed = quantise_experts(gate_up, down, format_name, layout=layout, **biases)
    plain = dequantise_experts(packed, torch.float32)
    worst = 0.0
    for ids in (torch.tensor([[3, 16, 9]]), torch.tensor([[15]])):
        x, weights = torch.randn(len(ids), width), torch.rand(ids.shape)
        want = moe_forward(x, *plain, ids, weights, layout=layout, backend="reference", **biases)
        module = sys.modules["mogul.kernels.triton.quant"]
        got = module.moe_quantised_triton(x, packed, ids, weights)
        worst = max(worst, float((got - want).norm() / want.norm()))
    return worst


def main() -> None:
    """Case names from the command line; one JSON object a line."""
    quant_layer.rounded_rows = torch_rounds
    whole = {
        "rounding": rounding_error,
        "gated rounding": gated_error,
        "operator": operator_error,
        "shared": shared_error,
    }
    for name in sys.argv[1:]:
        if name in whole:
            print(json.dumps({"case": name, "error": whole[name]()}))
            continue
        torch.manual_seed(3)
        if name.startswith("few "):
            error = few_error(name.split()[1], "clamped_swiglu" if "clamped" in name else "silu")
            print(json.dumps({"case": name, "error": error if error == error else 1e9}))
            continue
        format_name, tile, activation, dtype = CASES[name]
        experts, width, inner, tokens, picks = 4, 96, 80, 21, 2
        clamped = activation == "clamped_swiglu"
        layout = ExpertLayout(
            is_transposed=clamped, is_concatenated=not clamped, activation=activation
        )
        gate_up = torch.randn(experts, 2 * inner, width) * 0.2
        down = torch.randn(experts, width, inner) * 0.2
        biases = {}
        if clamped:
            gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
            biases["gate_up_bias"] = torch.randn(experts, 2 * inner)
            biases["down_bias"] = torch.randn(width, experts).T  # as it comes: strided
        packed = quantise_experts(gate_up, down, format_name, layout=layout, **biases)
        x = torch.randn(tokens, width).to(dtype)
        ids = torch.rand(tokens, experts).topk(picks).indices
        ids[::3, 1], ids[0, 0] = experts, -1
        weights = torch.rand(tokens, picks)
        want = moe_forward_quantised(x.float(), packed, ids, weights, backend="reference")
        quant_layer.quant_plan_for = lambda *_, tile=tile, **__: Plan(rows=16, up=tile, down=tile)
        module = sys.modules["mogul.kernels.triton.quant"]
        got = module.moe_quantised_triton(x, packed, ids, weights).float()
        error = float((got - want).norm() / want.norm())
        print(json.dumps({"case": name, "error": error if error == error else 1e9}))


if __name__ == "__main__":
    main()
