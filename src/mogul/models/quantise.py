"""Quantise the routed experts of a loaded model in place; everything else stays as it is.

Decides which modules count as experts (what `experts.layout_of` understands) and what replaces
them: a module with the same call, whose weights are buffers in one of the formats of
`mogul.kernels`. Router, shared experts, attention and embeddings keep their dtype. Such a model
generates and is evaluated; it cannot be trained or saved as a Transformers checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.core.log import progress, say
from mogul.core.units import show_bytes
from mogul.kernels import (
    ExpertFormat,
    QuantisedExperts,
    expert_format,
    moe_forward_quantised,
    moe_with_shared,
    quantise_experts,
)
from mogul.models.experts import layout_of


class Importance(NamedTuple):
    """Mean squares of what the experts of one layer multiply, from `expert_inputs`."""

    gate_up: Float[Tensor, "E D"]
    down: Float[Tensor, "E F"]


class Packed(nn.Module):
    """Quantised weights as buffers; what ends in "bias" is not quantised."""

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """Follow the model to devices; a cast must not turn packed numbers into others."""
        dtypes = {name: tensor.dtype for name, tensor in self.named_buffers()}
        kept = {name: tensor.detach() for name, tensor in self.named_buffers()}
        super()._apply(fn, recurse)
        for name, tensor in self.named_buffers():
            if tensor.dtype != dtypes[name] and not name.endswith("bias"):
                setattr(self, name, kept[name].to(tensor.device))
        return self


def refuse_saving(model: nn.Module) -> None:
    """From now on `save_pretrained` says that packed weights have no file format."""
    if hasattr(model, "save_pretrained"):
        # a reference to the model itself would keep it from being freed
        model.save_pretrained = partial(_refuse, type(model).__name__)  # type: ignore[assignment]


def _refuse(kind: str, *_args: Any, **_options: Any) -> None:
    raise ConfigError(
        f"{kind} holds packed weights, which no checkpoint describes",
        fix="`mogul quantise` writes a checkpoint in fp8 from the unquantised one; load_quantised "
        "and Engine.from_pretrained(quantise=...) quantise while loading",
    )


_JOINED = ("auto", "triton")
"""Backends that may run a shared expert in the call of the routed ones."""

_FP8_BUFFERS = ("gate_up_value", "gate_up_scale", "down_value", "down_scale")


class PackedExperts(Packed):
    """Stands where a Transformers experts module stood, with its call."""

    def __init__(self, experts: QuantisedExperts) -> None:
        super().__init__()
        self.format, self.layout = experts.format, experts.layout
        self.num_experts = experts.sizes[0]
        self.backend = "auto"
        self.beside: tuple[Any, ...] = ()
        """Products of a shared expert that compiled code runs in the same call: gate and up joined,
        then down."""
        self.kept: tuple[Tensor, ...] = ()
        """What the shared expert gave, until it is asked for."""
        for name, tensor in experts.tensors().items():
            self.register_buffer(name, tensor)

    @property
    def experts(self) -> QuantisedExperts:
        """The weights as a record, wherever the buffers have moved."""
        return QuantisedExperts.of_tensors(dict(self._buffers), self.format, self.layout)  # type: ignore[arg-type]

    def forward(
        self,
        hidden_states: Float[Tensor, "T D"],
        top_k_index: Int[Tensor, "T K"],
        top_k_weights: Float[Tensor, "T K"],
    ) -> Float[Tensor, "T D"]:
        """As the module it replaced."""
        if self.kept:  # a call that failed before the shared part was asked for
            self.kept = ()
        if self.beside and self.backend in _JOINED and torch.compiler.is_compiling():
            routed = [getattr(self, name) for name in _FP8_BUFFERS]
            products = [tensor for one in self.beside for tensor in (one.value, one.scale)]
            out, shared = moe_with_shared(
                hidden_states, routed, top_k_index, top_k_weights, products
            )
            self.kept = (shared,)
            return out
        return moe_forward_quantised(
            hidden_states, self.experts, top_k_index, top_k_weights, backend=self.backend
        )

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        experts, width, inner = self.experts.sizes
        return f"{self.format.name}, {experts} experts, {width} -> {inner} -> {width}"


def experts_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the unquantised routed experts."""
    for name, module in model.named_modules():
        if type(module).__name__.endswith("Experts") and hasattr(module, "down_proj"):
            yield name, module


def no_experts(model: nn.Module) -> ConfigError:
    """The error of a dense model."""
    return ConfigError(
        f"{type(model).__name__} has no routed experts to quantise",
        fix="give a mixture-of-experts model",
    )


def quantise_model(
    model: nn.Module,
    format: str | ExpertFormat,
    *,
    importance: Mapping[str, Importance] | None = None,
) -> nn.Module:
    """Replace every experts module of `model` by a quantised one; returns the model.

    The unquantised weights of a layer are let go as soon as it is done, so the peak is the model
    and one quantised layer.

    Args:
        model: any mixture-of-experts model that `experts_implementation="mogul"` accepts.
        format: fp8, fp8-w8a16, int4-32, int4-64 or int4-128.
        importance: from `expert_inputs`; int4 is far better with it.

    Raises:
        ConfigError: the model has no experts.
        BackendError: experts with a gate or a norm that mogul does not know.
    """
    chosen = expert_format(format)
    found = list(experts_modules(model))
    if not found:
        raise no_experts(model)
    before = after = 0
    with progress(f"quantising to {chosen.name}", len(found)) as bar:
        for _, module in found:
            layout_of(module)  # refuses what the kernels lack, before anything is changed
        for name, module in found:
            before += sum(tensor.nbytes for tensor in module.parameters())
            quantised = quantise_module(module, chosen, (importance or {}).get(name))
            after += quantised.experts.num_bytes
            model.set_submodule(name, quantised)
            bar.advance()
    say(f"experts in {chosen.name}: {show_bytes(before)} became {show_bytes(after)}")
    refuse_saving(model)
    return model


def quantise_module(
    module: nn.Module, format: ExpertFormat, importance: Importance | None = None
) -> PackedExperts:
    """The quantised twin of one experts module."""
    experts: Any = module
    layout = layout_of(module)
    first = "gate_up_proj" if layout.has_gate else "up_proj"
    packed = quantise_experts(
        getattr(experts, first),
        experts.down_proj,
        format,
        layout=layout,
        gate_up_bias=_bias(experts, first),
        down_bias=_bias(experts, "down_proj"),
        importance=importance,
    )
    return PackedExperts(packed)


def _bias(experts: Any, name: str) -> Tensor | None:
    return getattr(experts, f"{name}_bias").detach() if experts.has_bias else None
