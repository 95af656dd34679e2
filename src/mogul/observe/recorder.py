"""Record which experts a model picks, by forward hooks; the model is not changed.

A layer's picks are read from its router's output where that holds ids (mogul's own routers and
most of Transformers'), else from the input of its experts. Ids stay on their device until the
recording is read. Under gradient checkpointing a layer runs twice in training and is recorded
twice.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mogul.core.errors import BackendError, MogulError

_LAYER = re.compile(r"\blayers\.(\d+)\b")


@dataclass
class _LayerRecord:
    """The picks of one layer, in the order of its forwards."""

    ids: list[Tensor] = field(default_factory=list)
    router_ran: bool = False

    def keep(self, ids_TK: Tensor) -> None:
        self.ids.append(ids_TK.detach().flatten(0, -2).to(torch.int16))


class Recording:
    """Picked ids of every layer, one array a forward; read it any time."""

    def __init__(self, layers: dict[int, _LayerRecord]) -> None:
        self._layers = layers

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(self._layers)

    def forwards(self, layer: int) -> list[Int[np.ndarray, "T K"]]:
        """The picks of one layer, one array for each forward."""
        return [ids.cpu().numpy().astype(np.int64) for ids in self._layers[layer].ids]

    def ids(self) -> Int[np.ndarray, "layers T K"]:
        """All picks, the tokens of all forwards in a row.

        Raises:
            MogulError: Nothing was recorded.
        """
        if not all(record.ids for record in self._layers.values()):
            raise MogulError(
                "nothing was recorded: no forward ran inside record_routing",
                fix="run the model inside the with block",
            )
        return np.stack([np.concatenate(self.forwards(layer)) for layer in self._layers])

    def clear(self) -> None:
        """Forget what was recorded so far; the hooks stay."""
        for record in self._layers.values():
            record.ids.clear()


def _ids_in(output: Any) -> Tensor | None:
    """The integer tensor of two or more axes among a router's outputs."""
    parts = output if isinstance(output, tuple) else (output,)
    for part in parts:
        if isinstance(part, Tensor) and part.ndim >= 2 and not part.dtype.is_floating_point:
            return part
    return None


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module | None, nn.Module]]:
    """Name, router and experts of every block that holds experts."""
    for name, block in model.named_modules():
        for experts in block.children():
            if type(experts).__name__.endswith("Experts"):
                routers = [c for c in block.children() if "Router" in type(c).__name__]
                yield name, (routers[0] if routers else None), experts


def _attach(router: nn.Module | None, experts: nn.Module, record: _LayerRecord) -> list[Any]:
    """Hook one block; returns the handles."""

    def after_router(_module: nn.Module, _args: Any, output: Any) -> None:
        if (ids_TK := _ids_in(output)) is not None:
            record.keep(ids_TK)
            record.router_ran = True

    def before_experts(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not record.router_ran:
            ids = _ids_in((*args, *kwargs.values()))
            if ids is None:
                raise BackendError(
                    f"{type(experts).__name__} is called without ids: its picks cannot be seen"
                )
            record.keep(ids)
        record.router_ran = False

    handles = [experts.register_forward_pre_hook(before_experts, with_kwargs=True)]
    if router is not None:
        handles.append(router.register_forward_hook(after_router))
    return handles


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recording]:
    """Record the picks of every forward inside the `with` block; hooks go when it ends.

    Recordings may be nested; each sees every forward that runs while it is open.

    Raises:
        BackendError: The model has no experts, or shows its picks nowhere.
    """
    layers: dict[int, _LayerRecord] = {}
    handles: list[Any] = []
    try:
        for name, router, experts in _blocks(model):
            found = _LAYER.search(name)
            record = layers.setdefault(int(found[1]) if found else len(layers), _LayerRecord())
            handles += _attach(router, experts, record)
        if not layers:
            raise BackendError(
                f"{type(model).__name__} has no experts to record",
                fix="record a mixture-of-experts model",
            )
        yield Recording(layers)
    finally:
        for handle in handles:
            handle.remove()
