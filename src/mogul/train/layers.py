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
    model: nn.Module, *, compile: bool = False, recompute: bool | int = False
) -> Iterator[None]:
    """Inside the block, layers run compiled, and every `recompute`-th is computed twice."""
    changed: list[Any] = []
    every = int(recompute)
    try:
        for index, layer in enumerate(decoder_layers(model) if compile or every else ()):
            one: Any = layer
            forward = torch.compile(one.forward, dynamic=False) if compile else one.forward
            is_again = bool(every) and index % every == 0
            one.forward = _Recomputed(one, forward) if is_again else forward
            changed.append(one)
        yield
    finally:
        for one in changed:
            del one.forward


class _Recomputed:
    """A forward that keeps only its inputs in training."""

    def __init__(self, layer: nn.Module, forward: Any) -> None:
        self.layer, self.forward = layer, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.layer.training and torch.is_grad_enabled()):
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
