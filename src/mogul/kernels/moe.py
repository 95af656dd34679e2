"""The door of the experts layer: checks, precision and the choice of a backend.

Decides what a legal call is and which backend serves it; the backends decide nothing. Checks that
must read the ids are made only under MOGUL_DEBUG, as they would cost time in every layer.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.registry import Registry, warn_of_reference
from mogul.kernels.checks import check_devices, check_picks, is_transformed, needs_grad
from mogul.kernels.cpu import why_not_cpu
from mogul.kernels.cpu.moe import moe_forward_cpu
from mogul.kernels.layout import DEFAULT_LAYOUT, ExpertLayout
from mogul.kernels.reference.moe import moe_forward_reference
from mogul.kernels.triton import moe_forward_triton, quick_call, why_not_triton

DEBUG = os.environ.get("MOGUL_DEBUG", "0") not in ("", "0")


class MoeForward(Protocol):
    """What a backend must accept: x, weights and biases of one dtype on one device; int64 ids."""

    def __call__(
        self,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        *,
        gate_up_bias: Tensor | None,
        down_bias: Tensor | None,
        layout: ExpertLayout,
    ) -> Tensor:
        """Run the layer."""
        ...


class CallFacts(NamedTuple):
    """What a backend's `why_not(**facts)` is told of a call; None is not known yet."""

    device: torch.device
    dtype: torch.dtype
    num_experts: int | None = None
    hidden_size: int | None = None
    expert_width: int | None = None
    top_k: int | None = None
    layout: ExpertLayout = DEFAULT_LAYOUT
    has_bias: bool = False
    needs_grad: bool = False
    is_transformed: bool = False
    """By torch.func (vmap, grad, jvp...) or forward-mode derivatives."""


MOE_FORWARD: Registry[MoeForward] = Registry("moe_forward", on_choice=warn_of_reference)
MOE_FORWARD.add("triton", moe_forward_triton, why_not=why_not_triton)
MOE_FORWARD.add("cpu", moe_forward_cpu, why_not=why_not_cpu)
MOE_FORWARD.add("reference", moe_forward_reference)


def choose_backend(
    device: torch.device | str, dtype: torch.dtype, *, backend: str = "auto", **facts: object
) -> str:
    """Return the name of the backend that `moe_forward` uses for these facts.

    Args:
        device: where the tensors are.
        dtype: of the expert weights.
        backend: "auto", or a name to insist on.
        facts: further fields of `CallFacts` (num_experts, layout, needs_grad...).

    Raises:
        BackendError: the forced backend cannot run, with the reason.
    """
    call = CallFacts(torch.device(device), dtype, **facts)  # type: ignore[arg-type]
    return MOE_FORWARD.resolve(backend, call)[0]


def moe_forward(
    x: Float[Tensor, "T D"],
    gate_up: Float[Tensor, "E 2F D"],
    down: Float[Tensor, "E D F"],
    ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    *,
    gate_up_bias: Float[Tensor, "E 2F"] | None = None,
    down_bias: Float[Tensor, "E D"] | None = None,
    layout: ExpertLayout = DEFAULT_LAYOUT,
    backend: str = "auto",
) -> Float[Tensor, "T D"]:
    """Run each token through its picked experts and sum their outputs times the weights.

    A slot whose id is negative or >= E has no row: no arithmetic, no gradient, and its weight is
    ignored. Computes in the dtype of the expert weights (under autocast in autocast's, float64
    excepted) and returns x.dtype. Deterministic. Differentiable in x, gate_up, down, both biases
    and weights: once, except by "reference".

    Args:
        x: tokens.
        gate_up: first matmul of all experts; other shapes by `layout`.
        down: second matmul.
        ids: picked experts, any integer dtype.
        weights: factor of every pick.
        gate_up_bias: added to the first matmul, in the column order of gate_up.
        down_bias: added to the second one, before the weight.
        layout: what lies where, and the activation.
        backend: a name of `MOE_FORWARD`, or "auto" for the most preferred that can run.

    Raises:
        ConfigError: shapes, dtypes or devices that do not belong together.
        BackendError: the forced backend cannot run this call, with the reason.
    """
    call = (x, gate_up, down, ids, weights, gate_up_bias, down_bias)
    kind = _kind(*call, layout, backend)
    known = _SETTLED.get(kind) if kind is not None else None
    if known is None:
        known = _settle(call, layout, backend)
        if kind is not None:
            known = _keep(kind, known, call)
    run, dtype, is_plain, quick, _ = known
    if DEBUG:
        _check_ids(ids, gate_up.shape[0])
    if quick is not None and (y := quick(x, gate_up, down, ids, weights)) is not None:
        return y
    if is_plain:
        return run(
            x, gate_up, down, ids, weights,
            gate_up_bias=gate_up_bias, down_bias=down_bias, layout=layout,
        )  # fmt: skip
    y = run(
        _cast(x, dtype),
        _cast(gate_up, dtype),
        _cast(down, dtype),
        _cast(ids, torch.int64),
        weights,
        gate_up_bias=None if gate_up_bias is None else _cast(gate_up_bias, dtype),
        down_bias=None if down_bias is None else _cast(down_bias, dtype),
        layout=layout,
    )
    return _cast(y, x.dtype)


class Settled(NamedTuple):
    """What follows from a call's kind."""

    run: MoeForward
    dtype: torch.dtype
    is_plain: bool
    """Nothing is cast."""
    quick: Callable[..., Tensor | None] | None
    """Serves further calls without another look, or answers None."""
    layout: ExpertLayout
    """Held so that no other gets its identity."""


_SETTLED: dict[tuple[Any, ...], Settled] = {}
"""By kind of call: legal ones need no second look, which would cost more than some layers."""
_MOST_SETTLED = 4096


def _kind(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    layout: ExpertLayout,
    backend: str,
) -> tuple[Any, ...] | None:
    """All that checks and the choice of a backend look at; None where they must look anew.

    That is where a size may be symbolic, a transform is at work, or there are no numbers.
    """
    if type(x) is not Tensor or x.is_meta or torch.compiler.is_compiling() or is_transformed():
        return None
    grad = torch.is_grad_enabled()
    if grad:
        grad = needs_grad(x, gate_up, down, weights, gate_up_bias, down_bias)
    device = x.device
    autocast = torch.is_autocast_enabled(device.type)
    biases = ()
    if gate_up_bias is not None or down_bias is not None:
        both = (gate_up_bias, down_bias)
        biases = tuple(b if b is None else (b.shape, b.dtype, b.device) for b in both)
    return (
        x.shape, x.dtype, device, gate_up.shape, gate_up.dtype, gate_up.device,
        down.shape, down.dtype, down.device, ids.shape, ids.dtype, ids.device,
        weights.shape, weights.dtype, weights.device, biases, id(layout), backend, grad,
        MOE_FORWARD.changes, autocast and torch.get_autocast_dtype(device.type),
    )  # fmt: skip


def _settle(call: tuple[Any, ...], layout: ExpertLayout, backend: str) -> Settled:
    """Check a call and choose who serves it."""
    x, gate_up, down, ids, weights, gate_up_bias, down_bias = call
    num_experts, hidden_size, expert_width = layout.sizes(gate_up, down)
    check_picks(x, ids, weights, hidden_size)
    _check_experts(gate_up, down)
    check_devices(
        x, gate_up=gate_up, down=down, ids=ids, weights=weights,
        gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    _check_bias("gate_up_bias", gate_up_bias, (num_experts, (1 + layout.has_gate) * expert_width))
    _check_bias("down_bias", down_bias, (num_experts, hidden_size))
    dtype = gate_up.dtype
    if dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    facts = CallFacts(
        x.device,
        dtype,
        num_experts,
        hidden_size,
        expert_width,
        ids.shape[1],
        layout,
        has_bias=gate_up_bias is not None or down_bias is not None,
        needs_grad=needs_grad(x, gate_up, down, weights, gate_up_bias, down_bias),
        is_transformed=is_transformed(),
    )
    run = MOE_FORWARD.resolve(backend, facts)[1]
    of_dtype = (x, gate_up, down, *(b for b in (gate_up_bias, down_bias) if b is not None))
    is_plain = ids.dtype == torch.int64 and all(tensor.dtype == dtype for tensor in of_dtype)
    return Settled(run, dtype, is_plain, None, layout)


def _keep(kind: tuple[Any, ...], known: Settled, call: tuple[Any, ...]) -> Settled:
    """Remember a kind of call, with the shortest way to serve it."""
    x, gate_up, down, ids, weights, *biases = call
    has_bias = any(bias is not None for bias in biases)
    grad = needs_grad(x, gate_up, down, weights, *biases)
    if known.run is moe_forward_triton and known.is_plain and not (has_bias or grad):
        known = known._replace(quick=quick_call(x, down, ids, weights, known.layout))
    if len(_SETTLED) >= _MOST_SETTLED:
        _SETTLED.clear()
    _SETTLED[kind] = known
    return known


def forget_calls() -> None:
    """Settle every kind of call anew, for who changes what serves them."""
    _SETTLED.clear()


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`Tensor.to`, without its cost where nothing changes: this door is passed at every layer."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check_experts(gate_up: Tensor, down: Tensor) -> None:
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise ConfigError(
                f"{name} is {weight.dtype}, which has no arithmetic of its own",
                fix="dequantise the experts first, or run them by moe_forward_quantised",
            )


def _check_bias(name: str, bias: Tensor | None, shape: tuple[int, int]) -> None:
    if bias is not None and bias.shape != shape:
        raise ConfigError(
            f"{name} {tuple(bias.shape)} is not {list(shape)}",
            fix="pass one row an expert, as wide as the product it is added to, or None",
        )


def _check_ids(ids: Tensor, num_experts: int) -> None:
    """Under MOGUL_DEBUG: a sentinel is -1 or E, anything further out is likely a mistake."""
    if ids.numel() == 0:
        return
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high > num_experts:
        raise ConfigError(
            f"ids range from {low} to {high}, but there are {num_experts} experts",
            fix=f"an id is 0..{num_experts - 1}, or {num_experts} for a slot without a row",
        )
