"""The one way to see a router at work: hooks on every block that holds experts.

The experts module is called with ids and weights in every family, so picks are read there; logits
come from the router's output. The model is not changed, hooks go when the `with` block ends.
Blocks are found by their children's class names: `...Experts`, and `...Router` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mogul.core.errors import BackendError

_LAYER = re.compile(r"\blayers\.(\d+)\b")


@dataclass(frozen=True)
class MoeBlock:
    """A block with experts."""

    layer: int
    router: nn.Module | None
    experts: nn.Module


@dataclass(frozen=True)
class Picks:
    """What one layer decided in one forward, on its device."""

    layer: int
    ids: Tensor
    """[T, K]; an id outside 0..E-1 is a null pick."""
    weights: Tensor | None
    """[T, K]"""
    logits: Tensor | None
    """[T, E] or more columns; None where the router shows none."""


def moe_blocks(model: nn.Module, *, with_mtp: bool = False) -> list[MoeBlock]:
    """Every block with experts that a forward passes, in the order of the model.

    A multi-token-prediction layer is left out unless `with_mtp`: only training and speculation
    run that layer.

    Raises:
        BackendError: The model has none that can be seen.
    """
    found: list[MoeBlock] = []
    config = getattr(model, "config", None)
    has_mtp = getattr(config, "num_nextn_predict_layers", 0) or 0
    beyond = config.num_hidden_layers if config is not None and has_mtp and not with_mtp else None
    for name, block in model.named_modules():
        for child in block.children():
            if type(child).__name__.endswith("Experts"):
                routers = [c for c in block.children() if "Router" in type(c).__name__]
                number = _LAYER.search(name)
                layer = int(number[1]) if number else len(found)
                if beyond is not None and layer >= beyond:
                    continue
                found.append(MoeBlock(layer, routers[0] if routers else None, child))
    if not found:
        raise BackendError(
            f"{type(model).__name__} has no experts to record",
            fix="record a mixture-of-experts model",
        )
    return found


def num_experts_of(model: Any, blocks: Sequence[MoeBlock]) -> int:
    """Experts of each block, by the model's config, else by their weights."""
    config = model.config.get_text_config()
    for name in ("num_experts", "num_local_experts", "n_routed_experts"):
        if count := getattr(config, name, None):
            return int(count)
    return next(p.shape[0] for p in blocks[0].experts.parameters() if p.dim() == 3)


@contextmanager
def watch(model: nn.Module, see: Callable[[Picks], None]) -> Iterator[list[MoeBlock]]:
    """Call `see` for every layer with experts in every forward inside the `with` block.

    Watches may be nested; each sees every forward that runs while it is open. Under gradient
    checkpointing a layer runs twice in training and is seen twice.

    Raises:
        BackendError: The model has no experts, or (in a forward) shows its picks nowhere.
    """
    blocks = moe_blocks(model)
    handles: list[Any] = []
    try:
        for block in blocks:
            handles += _attach(block, see)
        yield blocks
    finally:
        for handle in handles:
            with suppress(KeyError):
                handle.remove()


def _attach(block: MoeBlock, see: Callable[[Picks], None]) -> list[Any]:
    seen_logits: list[Tensor] = []

    def after_router(_module: nn.Module, _args: Any, output: Any) -> None:
        seen_logits[:] = [logits] if (logits := _logits_in(output)) is not None else []

    def before_experts(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids, weights = _picks_in((*args, *kwargs.values()))
        if ids is None:
            raise BackendError(
                f"{type(block.experts).__name__} is called without ids: its picks cannot be seen",
                fix="trace a model whose router hands its picks to the experts",
            )
        see(Picks(block.layer, ids, weights, seen_logits.pop() if seen_logits else None))

    handles = [block.experts.register_forward_pre_hook(before_experts, with_kwargs=True)]
    if block.router is not None:
        handles.append(block.router.register_forward_hook(after_router))
    return handles


def _logits_in(output: Any) -> Tensor | None:
    """A router returns its logits, alone or first."""
    first = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(first, Tensor) or not first.dtype.is_floating_point or first.ndim < 2:
        return None
    return first.detach().flatten(0, -2)


def _picks_in(values: tuple[Any, ...]) -> tuple[Tensor | None, Tensor | None]:
    """Ids and weights among the inputs of experts: (hidden, ids, weights)."""
    tensors = [v for v in values if isinstance(v, Tensor) and v.ndim >= 2]
    ids = next((t for t in tensors if not t.dtype.is_floating_point), None)
    if ids is None:
        return None, None
    rest = [t for t in tensors[1:] if t.dtype.is_floating_point and t.shape == ids.shape]
    weights = rest[-1].detach().flatten(0, -2) if rest else None
    return ids.detach().flatten(0, -2), weights
