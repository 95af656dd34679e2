"""Runs the plain Triton kernels on one layout in the interpreter and prints their errors."""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mogul.kernels import ExpertLayout, moe_forward
from mogul.kernels.triton.any_ops import run_any

CASES = {
    "plain": (ExpertLayout(), False),
    "gpt-oss": (
        ExpertLayout(
            is_transposed=True, is_concatenated=False, activation="clamped_swiglu", limit=0.8
        ),
        True,
    ),
    "clamped SiLU": (ExpertLayout(activation="clamped_silu", limit=0.8), False),
    "interleaved with biases": (ExpertLayout(is_concatenated=False), True),
    "transposed gelu_tanh": (ExpertLayout(is_transposed=True, activation="gelu_tanh"), False),
    "gelu": (ExpertLayout(activation="gelu"), False),
    "no gate, relu2": (ExpertLayout(has_gate=False, activation="relu2"), True),
    "no gate, relu, transposed": (
        ExpertLayout(has_gate=False, activation="relu", is_transposed=True),
        False,
    ),
}
EXPERTS, WIDTH, INNER, TOKENS, PICKS = 4, 48, 40, 21, 2


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else float("inf")


def run(layout: ExpertLayout, biased: bool, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the output and of every gradient against the reference."""
    torch.manual_seed(4)
    wide = INNER * (1 + layout.has_gate)
    gate_up = torch.randn(EXPERTS, wide, WIDTH) * 0.3
    down = torch.randn(EXPERTS, WIDTH, INNER) * 0.3
    if layout.is_transposed:
        gate_up, down = gate_up.mT.contiguous(), down.mT.contiguous()
    ids = torch.rand(TOKENS, EXPERTS).topk(PICKS).indices
    ids[::3, 1], ids[0, 0] = EXPERTS, -1
    leaves = {"x": torch.randn(TOKENS, WIDTH), "gate_up": gate_up, "down": down}
    leaves["weights"] = torch.rand(TOKENS, PICKS)
    if biased:
        leaves["gate_up_bias"] = torch.randn(EXPERTS, wide)
        leaves["down_bias"] = torch.randn(EXPERTS, WIDTH)
    dout = torch.randn(TOKENS, WIDTH)
    results = []
    for name in ("reference", "triton"):
        kind = torch.float32 if name == "reference" else dtype
        given = {k: v.to(kind).detach().requires_grad_() for k, v in leaves.items()}
        x, first, second, weights = (given[k] for k in ("x", "gate_up", "down", "weights"))
        biases = {k: given.get(k) for k in ("gate_up_bias", "down_bias")}
        if name == "reference":
            out = moe_forward(
                x, first, second, ids, weights, **biases, layout=layout, backend="reference"
            )
        else:
            out = run_any(x, first, second, ids, weights, *biases.values(), layout)
            with torch.no_grad():
                again = run_any(x, first, second, ids, weights, *biases.values(), layout)
            assert torch.equal(out, again)
        grads = torch.autograd.grad(out, list(given.values()), dout.to(kind))
        results.append([out.detach().float(), *(g.float() for g in grads)])
    names = ["out", *(f"d{name}" for name in leaves)]
    return {n: relative(g, w) for n, w, g in zip(names, *results, strict=True)}


def main() -> None:
    """Case names from the command line; one JSON object a line."""
    for name in sys.argv[1:]:
        for dtype in (torch.float32, torch.float16) if name == "gpt-oss" else (torch.float32,):
            found = run(*CASES[name], dtype)
            print(json.dumps({"case": name, "dtype": str(dtype)[6:], "found": found}))


if __name__ == "__main__":
    main()
