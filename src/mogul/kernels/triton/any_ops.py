"""`mogul::moe_any`, `moe_any_train`, `moe_any_grad`: the layer of any layout as operators.

They carry fake and autograd registrations, so a compiled or exported model sees one node.
"""

from __future__ import annotations

from dataclasses import astuple
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mogul.kernels.checks import needs_grad
from mogul.kernels.layout import ExpertLayout
from mogul.kernels.once import refuse_any, refuse_second
from mogul.kernels.triton.any_layer import Call, Form, layer_for
from mogul.kernels.triton.launch import aligned
from mogul.kernels.triton.ops import check_weights
from mogul.kernels.triton.sorting import sorted_size

_TENSORS = (
    "Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor? gate_up_bias, Tensor? down_bias"
)
_FORM = "bool transposed, bool interleaved, bool gated, int act, float alpha, float limit"
_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define(f"moe_any({_TENSORS}, {_FORM}) -> Tensor")
_LIB.define(f"moe_any_train({_TENSORS}, {_FORM}) -> (Tensor, Tensor, Tensor)")
_LIB.define(
    f"moe_any_grad(Tensor dout, {_TENSORS}, Tensor pre, Tensor sort, {_FORM}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _call(tensors: tuple[Any, ...]) -> Call:
    """Contiguous tensors on 16-byte addresses, as the compiled kernels assume."""
    check_weights(*tensors[1:3])
    whole: Any = (None if tensor is None else aligned(tensor) for tensor in tensors)
    return Call(*whole)


def _forward(tensors: tuple[Any, ...], form: Form, *, save: bool) -> tuple[Tensor, Tensor, Tensor]:
    call = _call(tensors)
    if not call.x.shape[0]:
        wide = (2 if form.gated else 1) * call.down.shape[1 if form.transposed else 2]
        none = call.x.new_empty((0, wide)), call.ids.new_empty(0, dtype=torch.int32)
        return torch.empty_like(call.x), *none
    with torch.cuda.device(call.x.device if call.x.is_cuda else -1):
        return layer_for(call, form).forward(call, save=save)


def moe_any(*args: Any) -> Tensor:
    """Forward without anything kept."""
    return _forward(args[:7], Form(*args[7:]), save=False)[0]


def moe_any_train(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Forward that also returns what backward needs: (out, pre, sort)."""
    return _forward(args[:7], Form(*args[7:]), save=True)


def moe_any_grad(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, gate_up, down, weights and the biases."""
    call, (pre, sort), form = _call(args[:7]), args[7:9], Form(*args[9:])
    if not call.x.shape[0]:
        zeros, none = torch.zeros_like, call.x.new_empty(0)
        biases = (none if b is None else zeros(b) for b in (call.gate_up_bias, call.down_bias))
        return *(zeros(t) for t in (call.x, call.gate_up, call.down, call.weights)), *biases
    with torch.cuda.device(call.x.device if call.x.is_cuda else -1):
        return layer_for(call, form).backward(aligned(dout), call, pre, sort)


for _name, _function in (
    ("moe_any", moe_any),
    ("moe_any_train", moe_any_train),
    ("moe_any_grad", moe_any_grad),
):
    for _key in ("CUDA", "CPU"):  # CPU: the interpreter's path
        _LIB.impl(_name, _function, _key)


@torch.library.register_fake("mogul::moe_any", lib=_LIB)
def _(x: Tensor, *_args: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mogul::moe_any_train", lib=_LIB)
def _(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    transposed = args[3]
    slots, wide = ids.shape[0] * ids.shape[1], gate_up.shape[2 if transposed else 1]
    sort = ids.new_empty((sorted_size(slots, down.shape[0]),), dtype=torch.int32)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    return out, x.new_empty((slots, wide)), sort


@torch.library.register_fake("mogul::moe_any_grad", lib=_LIB)
def _(dout: Tensor, *args: Any) -> tuple[Tensor, ...]:
    x, gate_up, down, _ids, weights, up_bias, down_bias = args[:7]
    empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
    biases = (x.new_empty(0) if b is None else empty(b) for b in (up_bias, down_bias))
    return *(empty(t) for t in (x, gate_up, down, weights)), *biases


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.form = inputs[7:]
    ctx.save_for_backward(*inputs[:7], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Any, _dpre: Any, _dsort: Any) -> Any:
    if dout is None:
        return (None,) * 13
    grads = torch.ops.mogul.moe_any_grad(dout, *ctx.saved_tensors, *ctx.form)
    dx, dgate_up, ddown, dweights, dup_bias, ddown_bias = grads
    in_order = (dx, dgate_up, ddown, None, dweights, dup_bias, ddown_bias)
    wanted = ctx.needs_input_grad
    return *(g if want else None for g, want in zip(in_order, wanted, strict=False)), *(None,) * 6


torch.library.register_autograd("mogul::moe_any_train", _backward, setup_context=_setup, lib=_LIB)
torch.library.register_autograd("mogul::moe_any_grad", refuse_second, lib=_LIB)
torch.library.register_autograd("mogul::moe_any", refuse_any, lib=_LIB)


def run_any(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: ExpertLayout,
) -> Tensor:
    """The layer: [T, D] -> [T, D]; differentiable in everything but ids."""
    tensors = (x, gate_up, down, ids, weights, gate_up_bias, down_bias)
    form = astuple(Form.of(layout))
    if needs_grad(*tensors):
        return torch.ops.mogul.moe_any_train(*tensors, *form)[0]
    return torch.ops.mogul.moe_any(*tensors, *form)
