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
import torch.nn.functional as F
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
FUNCTIONS = ((F.silu, "silu"), (F.gelu, "gelu"), (F.relu, "relu"))
"""What a module may have in place of an activation module."""
_MODELS = "transformers.models."
GATES = {
    _MODELS + "gpt_oss.modeling_gpt_oss.GptOssExperts": ("clamped_swiglu", "alpha", "limit"),
    _MODELS + "openai_privacy_filter.modeling_openai_privacy_filter.OpenAIPrivacyFilterExperts": (
        "clamped_swiglu", "alpha", "limit",
    ),
    _MODELS + "minimax_m3_vl.modeling_minimax_m3_vl.MiniMaxM3VLExperts": (
        "clamped_swiglu", "swiglu_alpha", "swiglu_limit",
    ),
    _MODELS + "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts": ("clamped_silu", "", "limit"),
    _MODELS + "glm5_next.modeling_glm5_next.Glm5NextTextExperts": (
        "clamped_silu", "", "swiglu_limit",
    ),
    _MODELS + "hy_v4.modeling_hy_v4.HYV4Experts": ("clamped_silu", "", "swiglu_limit"),
}  # fmt: skip
"""Gate functions of their own: the activation, and the attributes that hold its alpha and limit."""
WIDE_GATES = (_MODELS + "beam.modeling_beam.BeamExperts",)
"""The default gate, computed in float32, as the kernels do."""
OTHERS = 'use experts_implementation="grouped_mm" or "eager" for this model'

_backend = "auto"
_forced: list[list[str]] = []
"""The names that are forced now, the last one counts."""


@contextmanager
def experts_backend(name: str) -> Iterator[None]:
    """Force one backend of `moe_forward` ("reference", "cpu", ...) until the block ends.

    For all threads: the backward pass and what it computes again run in threads of their own.
    """
    global _backend
    mine, _backend = [name], name
    _forced.append(mine)
    try:
        yield
    finally:  # blocks of several threads may end in any order
        _forced[:] = [other for other in _forced if other is not mine]
        _backend = _forced[-1][0] if _forced else "auto"


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
    known = module.__dict__.get("_mogul_layout")
    if torch.compiler.is_compiling():
        return layout_of(module) if known is None else known
    read = [module.__dict__.get(name) for name in _READ]
    read.append(module._modules.get("act_fn"))
    if known is None or read != module.__dict__.get("_mogul_layout_of"):
        found = layout_of(module)
        known = module.__dict__["_mogul_layout"] = _layouts.setdefault(found, found)
        module.__dict__["_mogul_layout_of"] = read
    return known


_READ = ("act_fn", *sorted({name for gate in GATES.values() for name in gate[1:] if name}))
"""Attributes of a module that its layout follows and that a person may change."""
_layouts: dict[ExpertLayout, ExpertLayout] = {}
"""Equal layouts are one object: kinds of calls are told apart by it."""


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
    gate = type(module)._apply_gate
    owner = f"{gate.__module__}.{gate.__qualname__}".removesuffix("._apply_gate")
    if gate is transformers_moe._default_apply_gate or owner in WIDE_GATES:
        if not module.is_concatenated:
            raise _refusal(name, "it declares interleaved weights but splits them in halves")
        return ExpertLayout(
            is_transposed=module.is_transposed, activation=_activation(module.act_fn, name)
        )
    if owner not in GATES:
        raise _refusal(name, "it has a gate function of its own that mogul does not know")
    activation, alpha, limit = GATES[owner]
    if hasattr(module, "act_fn") and not alpha and _activation(module.act_fn, name) != "silu":
        raise _refusal(name, f"its activation {type(module.act_fn).__name__} is not SiLU")
    return ExpertLayout(
        is_transposed=module.is_transposed,
        is_concatenated=module.is_concatenated,
        activation=activation,
        alpha=float(getattr(module, alpha)) if alpha else ExpertLayout.alpha,
        limit=float(getattr(module, limit)),
    )


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
    for function, activation in FUNCTIONS:
        if act_fn is function:
            return activation
    if type(act_fn) is nn.GELU:
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    for spelling, activation in ACTIVATIONS.items():
        if type(act_fn) is type(ACT2FN[spelling]):
            return activation
    told = getattr(act_fn, "__name__", type(act_fn).__name__)
    known = ", ".join(sorted(set(ACTIVATIONS.values())))
    raise _refusal(name, f"its activation {told} is not one of {known}")


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
