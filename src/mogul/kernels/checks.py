"""What the doors of the experts layer ask of a call, however its weights are stored.

Decides which rows and picks belong together, the words where they do not, and which calls want a
gradient or are under a transform that sees PyTorch's own operators only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mogul.core.errors import ConfigError


def check_picks(x: Tensor, ids: Tensor, weights: Tensor, hidden_size: int) -> None:
    """Refuse rows [T, D] and picks [T, K] that do not belong together."""
    if x.dim() != 2 or x.shape[1] != hidden_size:
        raise ConfigError(
            f"x {tuple(x.shape)} is not [T, {hidden_size}], which the experts need",
            fix=f"flatten batches, x.reshape(-1, {hidden_size}), or pass the experts of this width",
        )
    if ids.dim() != 2 or ids.shape[0] != x.shape[0] or ids.shape != weights.shape:
        raise ConfigError(
            f"ids {tuple(ids.shape)} and weights {tuple(weights.shape)} are not both "
            f"[{x.shape[0]}, K], one row for each token of x",
            fix="flatten x, ids and weights alike; route returns ids and weights of one shape",
        )
    if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype is torch.bool:
        raise ConfigError(
            f"ids are {ids.dtype}, not integers", fix="pass the ids that route returns"
        )
    if not (x.is_floating_point() and weights.is_floating_point()):
        raise ConfigError(
            f"x is {x.dtype} and weights are {weights.dtype}: both must be floating-point",
            fix="pass activations as they are, and the weights that route returns",
        )


def check_devices(x: Tensor, **others: Tensor | None) -> None:
    """Refuse a tensor that lies elsewhere: kernels may get no more of it than its address."""
    where = {name: tensor.device for name, tensor in others.items() if tensor is not None}
    if any(device != x.device for device in where.values()):
        told = ", ".join(f"{name} on {device}" for name, device in where.items())
        raise ConfigError(f"x is on {x.device}, {told}", fix=f"move all of them to {x.device}")
    if x.is_meta:
        raise ConfigError(
            "x and the experts are on meta, where tensors have no numbers",
            fix="load the weights first: from_pretrained, or to_empty and load_state_dict",
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a call of these has a gradient."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_transformed() -> bool:
    """Whether torch.func or forward-mode derivatives are at work, which see torch's operators only.

    A compiler traces through them by itself.
    """
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or _transform() is not None


_transform: Any = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
"""The innermost transform of torch.func that is at work, or None."""


TRANSFORMED = "torch.func and forward-mode derivatives see only torch's own operators"
"""Why a backend with kernels or derivatives by hand does not serve such a call."""
