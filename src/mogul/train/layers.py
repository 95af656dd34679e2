"""Compile the decoder layers and compute some of them again in the backward pass.

Layers are treated one by one: one compiled graph serves all layers of a shape, and recomputation
stands outside of it. Works on every Transformers decoder; the model is as before at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mogul.core.errors import ConfigError
from mogul.kernels.moe import choose_backend
from mogul.models.experts import NAME as EXPERTS
from mogul.models.experts import layout_of


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model of Transformers."""
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(
            f"{type(model).__name__} shows no list of decoder layers",
            fix="set run.compile=false and run.activation_checkpointing=false",
        )
    return list(layers)


@contextmanager
def prepared_layers(
    model: nn.Module, *, compile: bool | str = False, recompute: bool | int = False
) -> Iterator[None]:
    """Inside the block, layers run compiled, and every `recompute`-th is computed twice.

    `compile` may name a backend of torch.compile.
    """
    if compile:
        _choose_kernels(model)
    changed: list[Any] = []
    every = int(recompute)
    try:
        for index, layer in enumerate(decoder_layers(model) if compile or every else ()):
            one: Any = layer
            forward = one.forward
            if compile:
                backend = compile if isinstance(compile, str) else "inductor"
                forward = torch.compile(forward, dynamic=False, backend=backend)
            is_again = bool(every) and index % every == 0
            one.forward = _Recomputed(one, forward) if is_again else forward
            changed.append(one)
        yield
    finally:
        for one in changed:
            del one.forward


def _choose_kernels(model: Any) -> None:
    """Ask for the experts' backend now: the search for it must not end up in a graph."""
    if getattr(model.config, "_experts_implementation", None) != EXPERTS:
        return
    for module in model.modules():
        experts: Any = module
        if not isinstance(getattr(experts, "down_proj", None), nn.Parameter):
            continue
        layout = layout_of(experts)
        first = experts.gate_up_proj if layout.has_gate else experts.up_proj
        sizes = zip(
            ("num_experts", "hidden_size", "expert_width"),
            layout.sizes(first, experts.down_proj),
            strict=True,
        )
        choose_backend(
            first.device,
            first.dtype,
            **dict(sizes),
            top_k=model.config.num_experts_per_tok,
            layout=layout,
            has_bias=experts.has_bias,
            needs_grad=True,
        )


class _Recomputed:
    """A forward that keeps only its inputs in training."""

    def __init__(self, layer: nn.Module, forward: Any) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
