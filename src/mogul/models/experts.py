"""Make mogul's kernels an experts implementation of Transformers, under the name "mogul".

Transformers calls an implementation as a method of a model's own experts module. This file reads
that module's flags into an `ExpertLayout` and calls `mogul.kernels.moe_forward`, or refuses with
the reason: an unknown activation, a changed gate, quantised weights. Nothing falls back silently.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import moe as transformers_moe

from mogul.core.errors import BackendError
from mogul.kernels import ExpertLayout, moe_forward

NAME = "mogul"
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Transformers' names of activations, and the kernels' names of the same functions."""
OTHERS = 'use experts_implementation="grouped_mm" or "eager" for this model'

_backend = "auto"


@contextmanager
def experts_backend(name: str) -> Iterator[None]:
    """Force one backend of `moe_forward` ("reference", "cpu", ...) for the calls inside."""
    global _backend
    previous, _backend = _backend, name
    try:
        yield
    finally:
        _backend = previous


def mogul_experts_forward(
    self: nn.Module,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run the experts module `self` by mogul's kernels; ids from num_experts on have no row."""
    module: Any = self
    layout = _layout(module)
    first = _first_matmul(layout.has_gate)
    return moe_forward(
        hidden_states,
        getattr(module, first),
        module.down_proj,
        top_k_index,
        top_k_weights,
        gate_up_bias=getattr(module, first + "_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        layout=layout,
        backend=_backend,
    )


def _layout(module: Any) -> ExpertLayout:
    """The layout of an experts module, kept on it; BackendError when the kernels lack it."""
    if (known := module.__dict__.get("_mogul_layout")) is None:
        known = module.__dict__["_mogul_layout"] = layout_of(module)
    return known


def layout_of(experts: nn.Module) -> ExpertLayout:
    """Read the layout of a Transformers experts module; BackendError says why there is none."""
    module: Any = experts
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise _refusal(name, "it norms the output of every expert")
    _check_weights(module, name)
    if not module.has_gate:
        activation = _activation(module.act_fn, name)
        return ExpertLayout(
            is_transposed=module.is_transposed, has_gate=False, activation=activation
        )
    if type(module)._apply_gate is transformers_moe._default_apply_gate:
        if not module.is_concatenated:
            raise _refusal(name, "it declares interleaved weights but splits them in halves")
        return ExpertLayout(
            is_transposed=module.is_transposed, activation=_activation(module.act_fn, name)
        )
    if type(module)._apply_gate is _gpt_oss_gate():
        return ExpertLayout(
            is_transposed=module.is_transposed,
            is_concatenated=module.is_concatenated,
            activation="clamped_swiglu",
            alpha=float(module.alpha),
            limit=float(module.limit),
        )
    raise _refusal(name, "it has a gate function of its own that mogul does not know")


def _first_matmul(has_gate: bool) -> str:
    return "gate_up_proj" if has_gate else "up_proj"


def _check_weights(module: Any, name: str) -> None:
    for tensor in (_first_matmul(module.has_gate), "down_proj"):
        weight = getattr(module, tensor, None)
        if not isinstance(weight, Tensor):
            raise _refusal(name, f"its {tensor} is no plain tensor (quantised?)")
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise _refusal(name, f"its {tensor} is quantised to {weight.dtype}")


def _activation(act_fn: Any, name: str) -> str:
    for spelling, activation in ACTIVATIONS.items():
        if type(act_fn) is type(ACT2FN[spelling]):
            return activation
    known = ", ".join(sorted(set(ACTIVATIONS.values())))
    raise _refusal(name, f"its activation {type(act_fn).__name__} is not one of {known}")


def _gpt_oss_gate() -> Any:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    return GptOssExperts._apply_gate


def _refusal(name: str, reason: str) -> BackendError:
    return BackendError(f'experts_implementation="{NAME}" cannot run {name}: {reason}', fix=OTHERS)


def refuse_quantised(self: nn.Module, *_args: Any, **_kwargs: Any) -> Tensor:
    """The implementation for FP8 experts: refuse by name."""
    raise _refusal(type(self).__name__, "its weights are quantised to FP8")


def register() -> None:
    """Tell Transformers about "mogul"; calling it again changes nothing."""
    transformers_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, mogul_experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, refuse_quantised)
