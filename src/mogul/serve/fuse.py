"""Linear layers that read the same input become one product, without touching the model's code.

A decode step of one token spends its time in starting small products. Query, key and value (and
gate and up) stand in one weight whose parts the modules keep as views; the first one called
multiplies for all, the others hand out their part. Which modules are called with the same input, in
which order, is not assumed: one token is run and watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.serve.attention import run_one_token

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class First(nn.Module):
    """The first of some linear layers: computes them all and keeps the others' parts."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        super().__init__()
        self.sizes = [part.out_features for part in parts]
        self.whole = torch.cat([part.weight.data for part in parts])
        biases = [part.bias.data for part in parts if part.bias is not None]
        self.whole_bias = torch.cat(biases) if biases else None
        self.weight, self.bias = parts[0].weight, parts[0].bias
        self.out_features, self.in_features = parts[0].out_features, parts[0].in_features
        self.kept: tuple[Tensor, ...] = ()
        for part, weight in zip(parts, self.whole.split(self.sizes), strict=True):
            part.weight.data = weight
        if self.whole_bias is not None:
            for part, bias in zip(parts, self.whole_bias.split(self.sizes), strict=True):
                part.bias.data = bias

    def forward(self, x: Tensor) -> Tensor:
        """The first part; the others wait."""
        first, *rest = F.linear(x, self.whole, self.whole_bias).split(self.sizes, dim=-1)
        self.kept = tuple(rest)
        return first


class Next(nn.Module):
    """A later one of these layers: hands out what the first computed."""

    def __init__(self, first: First, part: nn.Linear) -> None:
        super().__init__()
        self.first = [first]  # in a list: no submodule
        self.weight, self.bias = part.weight, part.bias
        self.out_features, self.in_features = part.out_features, part.in_features

    def forward(self, _x: Tensor) -> Tensor:
        """Its part, once."""
        first = self.first[0]
        mine, *rest = first.kept
        first.kept = tuple(rest)
        return mine


def fuse_linears(model: Any, device: torch.device) -> int:
    """Join the linear layers of a model that may be joined; returns how many groups."""
    groups = [
        (block, names)
        for block in model.modules()
        for names in GROUPS
        if all(type(getattr(block, name, None)) is nn.Linear for name in names)
    ]
    seen = _watch(model, device, (getattr(b, n) for b, names in groups for n in names))
    count = 0
    for block, names in groups:
        parts = [getattr(block, name) for name in names]
        calls = [seen.get(id(part), []) for part in parts]
        if not _may_join(parts, calls):
            continue
        first = First(parts)
        setattr(block, names[0], first)
        for name, part in zip(names[1:], parts[1:], strict=True):
            setattr(block, name, Next(first, part))
        count += 1
    return count


def _watch(
    model: Any, device: torch.device, linears: Iterable[nn.Module]
) -> dict[int, list[tuple[int, int]]]:
    """Run one token: for each layer its calls as (order, identity of the input)."""
    seen: dict[int, list[tuple[int, int]]] = {}
    inputs: list[Tensor] = []  # kept, so that no two share an identity

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        seen.setdefault(id(module), []).append((len(inputs), id(args[0])))

    hooks = [linear.register_forward_pre_hook(note) for linear in linears]
    try:
        run_one_token(model, device)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _may_join(parts: list[nn.Linear], calls: list[list[tuple[int, int]]]) -> bool:
    """Called once each, one after the other, with one input; alike in dtype and bias."""
    if any(len(call) != 1 for call in calls):
        return False
    orders = [call[0][0] for call in calls]
    first = parts[0]
    return (
        len({call[0][1] for call in calls}) == 1
        and orders == list(range(orders[0], orders[0] + len(parts)))
        and all(
            part.weight.dtype == first.weight.dtype
            and (part.bias is None) == (first.bias is None)
            and part.in_features == first.in_features
            for part in parts
        )
    )
