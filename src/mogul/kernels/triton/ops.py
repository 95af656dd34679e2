"""The layer as torch operators: `mogul::moe` (inference), `mogul::moe_train`, `mogul::moe_grad`.

Operators carry fake and autograd registrations, so torch.compile(fullgraph=True), torch.export and
activation checkpointing see one node.  Outside of tracing and autograd `run` skips the dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.kernels.once import refuse_any, refuse_second
from mogul.kernels.triton.ahead import compile_ahead
from mogul.kernels.triton.launch import aligned, device_index
from mogul.kernels.triton.layer import Layer, layer_of
from mogul.kernels.triton.sorting import sorted_size

_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define("moe(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights) -> Tensor")
_LIB.define(
    "moe_added(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, Tensor residual) "
    "-> Tensor"
)
_LIB.define(
    "moe_train(Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights) "
    "-> (Tensor, Tensor, Tensor)"
)
_LIB.define(
    "moe_grad(Tensor dout, Tensor x, Tensor gate_up, Tensor down, Tensor ids, Tensor weights, "
    "Tensor pre, Tensor sort, bool need_input, bool need_weight) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def layer_of_call(x: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Layer:
    """The launches that a call goes through."""
    device = device_index(x)
    dtypes = (x.dtype, ids.dtype, weights.dtype)
    return layer_of(down.shape[0], ids.shape[1], x.shape[1], down.shape[2], dtypes, device)


def check_weights(gate_up: Tensor, down: Tensor) -> None:
    """Refuse weights that would have to be copied at every call."""
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not weight.is_contiguous() or weight.data_ptr() % 16:
            raise BackendError(
                f"{name} with strides {weight.stride()} at address {weight.data_ptr():#x} is not "
                "contiguous on a 16-byte boundary, as the Triton kernels need",
                fix=f"pass {name}.contiguous() or backend='reference'",
            )


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run with the first tensor's device as the current one, as Triton's launcher expects."""

    @wraps(function)
    def call(tensor: Tensor, *args: Any) -> Any:
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return function(tensor, *args)
        return function(tensor, *args)

    return call


@_on_its_device
def moe(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Forward without anything kept."""
    check_weights(gate_up, down)
    if x.shape[0] == 0:
        return torch.empty_like(x)
    layer = layer_of_call(x, down, ids, weights)
    x, ids, weights = aligned(x), aligned(ids), aligned(weights)
    return layer.infer(x, gate_up, down, ids, weights)


@_on_its_device
def moe_added(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, residual: Tensor
) -> Tensor:
    """The same and a residual [T, D], added by the last launch."""
    check_weights(gate_up, down)
    if (residual.shape, residual.dtype, residual.device) != (x.shape, x.dtype, x.device):
        raise BackendError(
            f"residual {tuple(residual.shape)} {residual.dtype} on {residual.device} is not as x: "
            f"{tuple(x.shape)} {x.dtype} on {x.device}",
            fix="give it x's shape, dtype and device, or add it after the experts",
        )
    if x.shape[0] == 0:
        return torch.empty_like(x)
    layer = layer_of_call(x, down, ids, weights)
    x, ids, weights, residual = aligned(x), aligned(ids), aligned(weights), aligned(residual)
    return layer.infer(x, gate_up, down, ids, weights, residual)


@_on_its_device
def moe_train(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward that also returns what backward needs: (out, pre, sort)."""
    check_weights(gate_up, down)
    if x.shape[0] == 0:
        return (
            torch.empty_like(x),
            x.new_empty(0, 2 * down.shape[2]),
            ids.new_empty(0, dtype=torch.int32),
        )
    layer = layer_of_call(x, down, ids, weights)
    inputs = (aligned(x), gate_up, down, aligned(ids), aligned(weights))
    compile_ahead(layer, inputs, train=True)
    return layer.forward(*inputs, save=True)


@_on_its_device
def moe_grad(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    pre: Tensor,
    sort: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate_up, down, weights; an empty tensor for one not needed."""
    if x.shape[0] == 0:
        none = x.new_empty(0)
        grads = (torch.zeros_like(gate_up), torch.zeros_like(down)) if need_weight else (none, none)
        return torch.zeros_like(x) if need_input else none, *grads, torch.zeros_like(weights)
    return layer_of_call(x, down, ids, weights).backward(
        aligned(dout),
        aligned(x),
        gate_up,
        down,
        aligned(ids),
        aligned(weights),
        pre,
        sort,
        need_input=need_input,
        need_weight=need_weight,
    )


for _name, _fn in (
    ("moe", moe),
    ("moe_added", moe_added),
    ("moe_train", moe_train),
    ("moe_grad", moe_grad),
):
    _LIB.impl(_name, _fn, "CUDA")
    _LIB.impl(_name, _fn, "CPU")  # the interpreter's path


@torch.library.register_fake("mogul::moe", lib=_LIB)
@torch.library.register_fake("mogul::moe_added", lib=_LIB)
def _(x: Tensor, *_others: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("mogul::moe_train", lib=_LIB)
def _(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    slots = ids.shape[0] * ids.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sort = ids.new_empty((sorted_size(slots, down.shape[0]),), dtype=torch.int32)
    return out, x.new_empty((slots, 2 * down.shape[2])), sort


@torch.library.register_fake("mogul::moe_grad", lib=_LIB)
def _(
    dout: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    pre: Tensor,
    sort: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    none = x.new_empty(0)
    empty = partial(torch.empty_like, memory_format=torch.contiguous_format)
    grads = (empty(gate_up), empty(down)) if need_weight else (none, none)
    return empty(x) if need_input else none, *grads, empty(weights)


def _setup(ctx, inputs, output) -> None:
    x, gate_up, down, ids, weights = inputs
    _, pre, sort = output
    ctx.save_for_backward(x, gate_up, down, ids, weights, pre, sort)
    ctx.mark_non_differentiable(pre, sort)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _dpre, _dsort):
    if dout is None:
        return None, None, None, None, None
    x, gate_up, down, ids, weights, pre, sort = ctx.saved_tensors
    need_x, need_gate_up, need_down, _, need_weights = ctx.needs_input_grad
    need_weight = need_gate_up or need_down
    dx, dgate_up, ddown, dweights = torch.ops.mogul.moe_grad(
        dout, x, gate_up, down, ids, weights, pre, sort, need_x, need_weight
    )
    return (
        dx if need_x else None,
        dgate_up if need_gate_up else None,
        ddown if need_down else None,
        None,
        dweights if need_weights else None,
    )


torch.library.register_autograd("mogul::moe_train", _backward, setup_context=_setup, lib=_LIB)
torch.library.register_autograd("mogul::moe_grad", refuse_second, lib=_LIB)
torch.library.register_autograd("mogul::moe", refuse_any, lib=_LIB)


def run(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer: [T, D] -> [T, D]; differentiable in x, gate_up, down and weights."""
    wants_grad = torch.is_grad_enabled() and (
        x.requires_grad or gate_up.requires_grad or down.requires_grad or weights.requires_grad
    )
    if wants_grad:
        return torch.ops.mogul.moe_train(x, gate_up, down, ids, weights)[0]
    if (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or torch._C._len_torch_dispatch_stack() > 0
    ):
        return torch.ops.mogul.moe(x, gate_up, down, ids, weights)
    return moe(x, gate_up, down, ids, weights)


class Quick:
    """Calls of one kind that were served before, without asking anything twice.

    The kind fixes shapes, dtypes and devices; what may still differ is checked here.
    """

    def __init__(self, layer: Layer, tokens: int) -> None:
        self._layer, self._tokens = layer, tokens

    def __call__(
        self, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor | None:
        """The layer without gradient; None where the longer way has to be gone."""
        if torch._C._len_torch_dispatch_stack() > 0:  # traced: the number of tokens may be a symbol
            return None
        layer = self._layer
        tape = layer.tape(self._tokens)
        if (
            tape is None
            or torch._C._cuda_getDevice() != layer.device
            or not (
                x.is_contiguous()
                and gate_up.is_contiguous()
                and down.is_contiguous()
                and ids.is_contiguous()
                and weights.is_contiguous()
            )
        ):
            return None
        return tape.replay((x, gate_up, down, ids, weights), layer.device)
