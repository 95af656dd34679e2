"""Routes by the Triton kernel in the interpreter and compares with the reference, rule by rule."""

from __future__ import annotations

import json
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import torch

from mogul.kernels import RouterSpec
from mogul.kernels.reference.route import route_reference
from mogul.kernels.triton.routing import route_counted, route_triton

RULES = {
    "plain": {"num_experts": 12, "top_k": 3},
    "one expert": {"num_experts": 1, "top_k": 1},
    "grouped, one each": {
        "num_experts": 64,
        "top_k": 8,
        "num_groups": 8,
        "weighting": "renormalised_in_group",
    },
    "grouped, two each": {
        "num_experts": 24,
        "top_k": 6,
        "num_groups": 3,
        "score": "sigmoid",
        "weighting": "renormalised_in_group",
        "scaling_factor": 2.5,
    },
    "renormalised": {"num_experts": 20, "top_k": 4, "weighting": "renormalised"},
    "null experts": {
        "num_experts": 16,
        "top_k": 4,
        "num_groups": 2,
        "num_null_experts": 8,
        "weighting": "renormalised",
    },
    "null experts, no groups": {"num_experts": 6, "top_k": 2, "num_null_experts": 3},
    "limited groups": {
        "num_experts": 32,
        "top_k": 4,
        "num_groups": 8,
        "limit_groups": 3,
        "score": "sigmoid",
        "weighting": "renormalised",
        "scaling_factor": 2.5,
    },
}


def compare(spec: RouterSpec, seed: int, *, ties: bool, biased: bool) -> dict[str, float]:
    """Wrong ids, largest error of weights, scores and gradients, wrong counts."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(37, spec.num_columns, generator=generator) * 3
    if ties:
        logits = logits.round()
        logits[0] = 0
    bias = scale = None
    if biased:
        bias = torch.randn(spec.num_experts, generator=generator)
        scale = torch.rand(spec.num_experts, generator=generator) + 0.5
    ids, weights, scores, count, offset = route_counted(logits, spec, bias, scale)
    want = route_reference(logits, spec, bias, scale)
    rows = torch.bincount(want[0].flatten(), minlength=spec.num_experts + 1)[: spec.num_experts]
    found = {
        "ids": float((ids != want[0]).sum()),
        "weights": float((weights - want[1]).abs().max()),
        "scores": float((scores - want[2]).abs().max()),
        "counts": float((count != rows).sum()),
        "offsets": float((offset[1:] != rows.cumsum(0)).sum() + offset[0]),
    }
    results = []
    for route in (route_triton, route_reference):
        leaves = [logits.clone().requires_grad_()]
        if scale is not None:
            leaves.append(scale.clone().requires_grad_())
        _, w, s = route(leaves[0], spec, bias, leaves[1] if scale is not None else None)
        loss = (w * torch.arange(w.numel()).view_as(w).cos()).sum() + s.square().sum()
        results.append(torch.autograd.grad(loss, leaves))
    for name, got, ref in zip(("dlogits", "dscale"), *results, strict=False):
        found[name] = float((got - ref).abs().max())
    return found


def wrong_picks_of_no_number(spec: RouterSpec) -> int:
    """Ids of tokens whose logits are no number that are not torch's."""
    logits = torch.zeros(3, spec.num_columns)
    logits[1] = float("nan")
    return int(
        (route_counted(logits, spec)[0] != route_reference(logits, spec, None, None)[0]).sum()
    )


def error_of_narrow_logits(spec: RouterSpec, dtype: torch.dtype) -> float:
    """Weights of logits in 16 bits, which tie often, against the reference's; wrong ids count 1."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(37, spec.num_columns, generator=generator).to(dtype)
    ids, weights = route_counted(logits, spec)[:2]
    want = route_reference(logits, spec, None, None)
    return float((ids != want[0]).sum() + (weights - want[1]).abs().max())


def compiled_gradient_error() -> float:
    """Gradients of a compiled graph against those of eager mode."""
    spec = RouterSpec(**RULES["grouped, two each"])
    leaves = [torch.randn(5, 24, requires_grad=True), torch.rand(24, requires_grad=True)]

    def loss(logits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        _, weights, scores = route_triton(logits, spec, None, scale)
        return weights.square().sum() + scores.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(f(*leaves), leaves) for f in (loss, compiled)]
    return max(float((a - b).abs().max()) for a, b in zip(*grads, strict=True))


def second_derivative_error() -> float:
    """Derivatives of a squared gradient, of the logits and of the scale."""
    spec, found = RouterSpec(**RULES["grouped, two each"]), []
    for route in (route_triton, route_reference):
        generator = torch.Generator().manual_seed(3)
        logits = torch.randn(5, 24, generator=generator).requires_grad_()
        scale = torch.rand(24, generator=generator).requires_grad_()
        _, weights, scores = route(logits, spec, None, scale)
        (grad,) = torch.autograd.grad(
            weights.square().sum() + scores.square().sum(), logits, create_graph=True
        )
        found.append(torch.autograd.grad(grad.square().sum(), [logits, scale]))
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def main() -> None:
    """Every rule; one JSON object a line."""
    print(json.dumps({"case": "second derivative", "error": second_derivative_error()}))
    print(json.dumps({"case": "compiled", "error": compiled_gradient_error()}))
    for name in sys.argv[1:]:
        spec = RouterSpec(**RULES[name])
        print(json.dumps({"case": f"{name}, no number", "wrong": wrong_picks_of_no_number(spec)}))
        for dtype in (torch.float16, torch.bfloat16):
            error = error_of_narrow_logits(spec, dtype)
            print(json.dumps({"case": f"{name}, {dtype}", "error": error}))
        for ties in (False, True):
            for biased in (False, True):
                found = compare(spec, 5, ties=ties, biased=biased)
                case = {"case": name, "ties": ties, "biased": biased}
                print(json.dumps({**case, "found": found}))


if __name__ == "__main__":
    main()
