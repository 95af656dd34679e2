"""Read how the weights of a Transformers experts module lie, and what joins its two matmuls.

Decides which classes, gates and activations the kernels have, and the words for all others. What a
class and its flags say is worked out once, outside of any compiler's graph.
"""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.integrations import moe as transformers_moe

from mogul.core.errors import BackendError
from mogul.kernels import ExpertLayout

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
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layout_of(experts: nn.Module) -> ExpertLayout:
    """Read the layout of a Transformers experts module; BackendError says why there is none."""
    layout = read_layout(experts)
    for name in (first_matmul(layout.has_gate), "down_proj"):
        weight_of(experts, name)
    return layout


def read_layout(experts: nn.Module) -> ExpertLayout:
    """The same without a look at the weights, for every call."""
    module: Any = experts
    kind: Any = type(module)
    act_fn: Any = getattr(module, "act_fn", None)
    style = ""
    if isinstance(act_fn, nn.Module):
        if isinstance(act_fn, nn.GELU):
            style = act_fn.approximate
        act_fn = type(act_fn)
    has_norm = module.__dict__.get("has_post_expert_norm", False)
    facts = (
        *(kind, act_fn, style, module.has_gate, module.is_transposed, module.is_concatenated),
        *(has_norm, *(float(getattr(module, name)) for name in _numbers_of(kind).split())),
    )
    name = _name_of_layout(*facts)
    return getattr(_layouts, name) if name else _layout_of_facts(*facts)


def weight_of(module: Any, name: str) -> Tensor:
    """A weight of an experts module; BackendError where it is quantised."""
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor):
        raise refusal(type(module).__name__, f"its {name} is no plain tensor (quantised?)")
    if weight.dtype not in FLOATS:
        raise refusal(type(module).__name__, f"its {name} is quantised to {weight.dtype}")
    return weight


def first_matmul(has_gate: bool) -> str:
    """Name of the first weight of an experts module."""
    return "gate_up_proj" if has_gate else "up_proj"


def refusal(name: str, reason: str) -> BackendError:
    """The error for a class of experts that the kernels lack."""
    return BackendError(f'experts_implementation="mogul" cannot run {name}: {reason}', fix=OTHERS)


def _owner(kind: Any) -> str:
    """The class that a gate function was written in."""
    gate = kind._apply_gate
    return f"{gate.__module__}.{gate.__qualname__}".removesuffix("._apply_gate")


# A compiler asks these once and keeps the answer: it cannot trace what they look at.


@torch.compiler.assume_constant_result
def _numbers_of(kind: type) -> str:
    """Attributes that hold alpha, where it has one, and the limit of a class's own gate."""
    return _known_numbers(kind)


@torch.compiler.assume_constant_result
def _name_of_layout(*facts: Any) -> str:
    """Where `_layouts` has the layout of these facts: a constant may be a name, but no record.

    Empty where they are refused: an error that is raised in here would be taken for a compiler's.
    """
    return _keep_layout(*facts)


_layouts = SimpleNamespace()
"""Every layout that was read; equal ones are one object, as kinds of calls are told apart by it."""


@cache
def _keep_layout(*facts: Any) -> str:
    try:
        layout = _layout_of_facts(*facts)
    except BackendError:
        return ""
    name = re.sub(r"\W", "_", repr(layout))
    vars(_layouts).setdefault(name, layout)
    return name


@cache
def _known_numbers(kind: type) -> str:
    return " ".join(GATES.get(_owner(kind), ())[1:])


def _layout_of_facts(
    kind: Any,
    act_fn: Any,
    style: str,
    has_gate: bool,
    is_transposed: bool,
    is_concatenated: bool,
    has_norm: bool,
    *numbers: float,
) -> ExpertLayout:
    name = kind.__name__
    if has_norm:
        raise refusal(name, "it norms the output of every expert")
    owner = _owner(kind)
    default = kind._apply_gate is transformers_moe._default_apply_gate or owner in WIDE_GATES
    if not has_gate or default:
        if has_gate and not is_concatenated:
            raise refusal(name, "it declares interleaved weights but splits them in halves")
        activation = _activation(act_fn, style, name)
        return ExpertLayout(is_transposed, has_gate=has_gate, activation=activation)
    if owner not in GATES:
        raise refusal(name, "it has a gate function of its own that mogul does not know")
    activation, alpha, _ = GATES[owner]
    if act_fn is not None and not alpha and _activation(act_fn, style, name) != "silu":
        raise refusal(name, f"its activation {act_fn.__name__} is not SiLU")
    more = dict(zip(("alpha", "limit") if alpha else ("limit",), numbers, strict=True))
    return ExpertLayout(is_transposed, is_concatenated, activation=activation, **more)


def _activation(act_fn: Any, style: str, name: str) -> str:
    """The kernels' name of an activation: a function, or the class of a module."""
    if act_fn is nn.GELU:
        return "gelu_tanh" if style == "tanh" else "gelu"
    for function, activation in FUNCTIONS:
        if act_fn is function:
            return activation
    for spelling, activation in ACTIVATIONS.items():
        if act_fn is type(ACT2FN[spelling]):
            return activation
    told, known = getattr(act_fn, "__name__", act_fn), ", ".join(sorted(set(ACTIVATIONS.values())))
    raise refusal(name, f"its activation {told} is not one of {known}")
