"""Products of dense layers in float8, by torchao: attention's and the shared experts' matrices.

Decides which layers take part; torchao scales, casts and multiplies. Weights, gradients and
optimizer state stay what they were, under their names: inside the block the layers' forward is
another one, nothing else. Experts, routers, embeddings and head keep their precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mogul.core.errors import ConfigError
from mogul.core.log import say
from mogul.train.layers import decoder_layers

MULTIPLE = 16
"""The tensor cores' products want both axes of a weight divisible by it."""
FIRST_CAPABLE = (8, 9)


def float8_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers of a model that can compute in float8, by name."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    return {
        name: module
        for name, module in model.named_modules()
        if type(module) is nn.Linear
        and id(module) in inside
        and not (module.in_features % MULTIPLE or module.out_features % MULTIPLE)
    }


@contextmanager
def float8_products(model: nn.Module, kind: str, device: torch.device) -> Iterator[None]:
    """Inside the block, dense layers multiply in float8; on a CPU the rounding is emulated.

    Raises:
        ConfigError: torchao is missing, the device has no float8 products, or no layer fits.
    """
    if kind == "none":
        yield
        return
    torchao = _torchao()
    _refuse_device(device)
    chosen = float8_linears(model)
    if not chosen:
        raise ConfigError(
            f"run.float8={kind!r}: no dense layer of the model has axes divisible by {MULTIPLE}",
            fix="set run.float8='none'",
        )
    config = torchao.Float8LinearConfig.from_recipe_name(kind)
    if device.type == "cpu":
        object.__setattr__(config, "emulate", True)
    torchao.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda _, name: name in chosen
    )
    say(f"{len(chosen)} dense layers compute in float8 ({kind})")
    try:
        yield
    finally:
        for name, module in chosen.items():
            model.set_submodule(name, module)


def _torchao() -> Any:
    try:
        import torchao.float8 as found  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "run.float8 needs the package torchao, which is not installed",
            fix="pip install 'mogul[float8]', or set run.float8='none'",
        ) from error
    return found


def _refuse_device(device: torch.device) -> None:
    if device.type == "cpu":
        return
    module: Any = torch.get_device_module(device)
    capability = getattr(module, "get_device_capability", lambda _: FIRST_CAPABLE)(device)
    if tuple(capability) < FIRST_CAPABLE:
        raise ConfigError(
            f"{module.get_device_name(device)} has no float8 products",
            fix="set run.float8='none'",
        )
