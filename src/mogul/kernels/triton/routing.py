"""Routing on NVIDIA GPUs as the operator `mogul::route`: one launch, differentiable.

Decides what is refused (float64 logits, more than 4,096 columns) and how the gradient is found:
picks carry none, so backward differentiates the weights of the kept ids by the reference's own
formula. One opaque operator also means that nothing traces the router as softmax and top-k.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.checks import TRANSFORMED
from mogul.kernels.reference.route import weigh_picks
from mogul.kernels.router_spec import SCORES, WEIGHTINGS, RouterSpec
from mogul.kernels.triton import _device_reason
from mogul.kernels.triton.launch import Launch, cdiv, device_index, next_power_of_2

MAX_COLUMNS = 4096
_SMALL, _LARGE = 512, 4096
"""Columns x tokens that one program holds; the large tile adds to the counts less often."""
_MANY = 1 << 18
"""Columns x tokens from which large tiles still fill the device."""


def why_not_route(
    *,
    device: torch.device,
    dtype: torch.dtype,
    spec: RouterSpec,
    is_transformed: bool = False,
    **_facts: object,
) -> str | None:
    """The reason why a call cannot run on this kernel, or None."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the logits are on {device}, not on an NVIDIA GPU"
    if is_transformed:
        return TRANSFORMED
    if reason := _device_reason(device.index):
        return reason
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the logits are {dtype}; float32, bfloat16 and float16 are supported"
    if spec.num_columns > MAX_COLUMNS:
        return f"{spec.num_columns} experts; at most {MAX_COLUMNS} are supported"
    return None


def route_triton(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [T, K], weights [T, K] and scores [T, E]; see `mogul.kernels.route`."""
    return _routed(logits, spec, bias, scale)[:3]


def route_counted(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None = None, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `route_triton`, and the rows of every expert [E] and their offsets [E + 1], int32."""
    ids, weights, scores, rows = _routed(logits, spec, bias, scale)
    experts = spec.num_experts
    return ids, weights, scores, rows[:experts], rows[experts : 2 * experts + 1]


def _routed(
    logits: Tensor, spec: RouterSpec, bias: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids, weights, scores, and counts and offsets in one piece."""
    flat = None if scale is None else scale.reshape(-1)
    args = (logits, bias, flat, _rule(spec), spec.scaling_factor)
    wants_grad = torch.is_grad_enabled() and (
        logits.requires_grad or (flat is not None and flat.requires_grad)
    )
    direct = not (wants_grad or torch.compiler.is_compiling() or type(logits) is not Tensor)
    if direct and torch._C._len_torch_dispatch_stack() == 0:
        return _on_device(*args)  # spares the dispatcher's time
    return torch.ops.mogul.route(*args)


@cache
def _rule(spec: RouterSpec) -> list[int]:
    return [
        *(spec.num_experts, spec.top_k, spec.num_groups, spec.num_null_experts),
        *(spec.limit_groups or 0, SCORES.index(spec.score), WEIGHTINGS.index(spec.weighting)),
    ]


def spec_of(rule: list[int], factor: float) -> RouterSpec:
    """The rule of a call of `mogul::route`."""
    experts, picks, groups, nulls, limit, score, weighting = rule
    return RouterSpec(
        num_experts=experts,
        top_k=picks,
        num_groups=groups,
        num_null_experts=nulls,
        limit_groups=limit or None,
        score=SCORES[score],  # type: ignore[arg-type]
        weighting=WEIGHTINGS[weighting],  # type: ignore[arg-type]
        scaling_factor=factor,
    )


def _outputs(logits: Tensor, rule: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Empty results; rows [2E + 2] start at 0: counts, offsets, programs that are done."""
    tokens, experts, picks = logits.shape[0], rule[0], rule[1]
    return (
        logits.new_empty((tokens, picks), dtype=torch.int64),
        logits.new_empty((tokens, picks), dtype=torch.float32),
        logits.new_empty((tokens, experts), dtype=torch.float32),
        logits.new_zeros((2 * experts + 2,), dtype=torch.int32),
    )


_launches: dict[Any, tuple[Launch, int]] = {}


def _launch(
    logits: Tensor, bias: Tensor | None, scale: Tensor | None, rule: list[int], factor: float
) -> tuple[Launch, int]:
    """The compiled kernel of a rule and the tokens that one program takes."""
    device = device_index(logits)
    tensors = [t for t in (logits, bias, scale) if t is not None]
    facts = tuple((t.dtype, t.data_ptr() % 16 == 0) for t in tensors)
    num_bias = 0 if bias is None else bias.numel()
    columns = max(16, next_power_of_2(rule[0] + rule[3]))
    # wider rows would be shared by warps, which costs more than the counts
    many = columns <= 128 and logits.shape[0] * columns >= _MANY
    key = (*rule, factor, num_bias, scale is None, facts, device, many)
    if key not in _launches:
        from mogul.kernels.triton import route_kernels

        experts, picks, groups, nulls, limit, score, weighting = rule
        block = max(1, (_LARGE if many else _SMALL) // columns)
        constants = {
            **{"E": experts, "NULLS": nulls, "M": groups, "K": picks, "LIMIT": limit},
            **{"SCORE": score, "WEIGHTING": weighting, "SCALED": scale is not None},
            **{"NUM_BIAS": num_bias, "FACTOR": factor, "BLOCK_T": block},
            **{"COLUMNS": columns, "SLOTS": next_power_of_2(picks)},
            **{"GROUPS": max(2, next_power_of_2(groups))},
        }
        warps = 8 if many else 1 if columns <= 256 else 4
        _launches[key] = Launch(route_kernels.route_tokens, constants, warps=warps, stages=1), block
    return _launches[key]


def _run(
    logits: Tensor, bias: Tensor | None, scale: Tensor | None, rule: list[int], factor: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = logits.contiguous()
    bias, scale = (None if t is None else t.contiguous() for t in (bias, scale))
    results = _outputs(logits, rule)
    tokens = logits.shape[0]
    if not tokens:
        return results
    launch, block = _launch(logits, bias, scale, rule, factor)
    device = device_index(logits)
    some = (logits if bias is None else bias, logits if scale is None else scale)
    launch((cdiv(tokens, block), 1), device, logits, *some, *results, tokens)
    return results


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(
    "route(Tensor logits, Tensor? bias, Tensor? scale, int[] rule, float factor) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _on_device(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if logits.is_cuda and logits.device.index != torch.cuda.current_device():
        with torch.cuda.device(logits.device):
            return _run(logits, *args)
    return _run(logits, *args)


for _key in ("CUDA", "CPU"):  # CPU: the interpreter's path
    _LIB.impl("route", _on_device, _key)


@torch.library.register_fake("mogul::route", lib=_LIB)
def _(
    logits: Tensor, bias: Tensor | None, scale: Tensor | None, rule: list[int], factor: float
) -> tuple[Tensor, ...]:
    return _outputs(logits, rule)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, _bias, scale, ctx.rule, ctx.factor = inputs
    ids, _weights, _scores, rows = output
    ctx.save_for_backward(logits, scale, ids)
    ctx.mark_non_differentiable(ids, rows)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, _dids: Any, dweights: Any, dscores: Any, _drows: Any) -> Any:
    logits, scale, ids = ctx.saved_tensors
    given = [grad for grad in (dweights, dscores) if grad is not None]
    if not given:
        return None, None, None, None, None
    again = torch.is_grad_enabled()  # a graph of the gradients is made
    with torch.enable_grad():
        leaves = [
            t if again and t.requires_grad else t.detach().requires_grad_()
            for t in (logits, scale)
            if t is not None
        ]
        results = weigh_picks(
            leaves[0], ids, spec_of(ctx.rule, ctx.factor), leaves[1] if len(leaves) > 1 else None
        )
        wanted = [r for r, g in zip(results, (dweights, dscores), strict=True) if g is not None]
    grads = torch.autograd.grad(wanted, leaves, given, create_graph=again, allow_unused=True)
    return grads[0], None, grads[1] if len(grads) > 1 else None, None, None


torch.library.register_autograd("mogul::route", _backward, setup_context=_setup, lib=_LIB)
