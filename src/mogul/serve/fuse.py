"""Linear layers that read the same input become one product, without touching the model's code.

A decode step of one token spends its time in starting small products. Query, key and value (and
gate and up) stand in one weight whose parts the modules keep as views; the first one called
multiplies for all, the others hand out their part. Which modules are called with the same input, in
which order, is not assumed: one token is run and watched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mogul.models.quantise_linears import PackedLinear
from mogul.serve.attention import run_one_token

LINEARS = (nn.Linear, PackedLinear)
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class First(nn.Module):
    """The first of some linear layers: computes them all and keeps the others' parts."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.sizes = [int(part.out_features) for part in parts]  # pyright: ignore[reportArgumentType]
        self.joined = [_join(parts, self.sizes)]  # in a list: no submodule, its parts hold all
        self.kept: tuple[Tensor, ...] = ()
        _take_tensors(self, parts[0])

    def forward(self, x: Tensor) -> Tensor:
        """The first part; the others wait."""
        first, *rest = self.joined[0](x).split(self.sizes, dim=-1)
        self.kept = tuple(rest)
        return first


class Next(nn.Module):
    """A later one of these layers: hands out what the first computed."""

    def __init__(self, first: First, part: nn.Module) -> None:
        super().__init__()
        self.first = [first]  # in a list: no submodule
        _take_tensors(self, part)

    def forward(self, _x: Tensor) -> Tensor:
        """Its part, once."""
        first = self.first[0]
        mine, *rest = first.kept
        first.kept = tuple(rest)
        return mine


def _join(parts: Sequence[nn.Module], sizes: list[int]) -> nn.Module:
    """One layer with the tensors of all, row after row; the parts keep views of them."""
    joined: Any = copy.copy(parts[0])
    joined._parameters, joined._buffers = dict(parts[0]._parameters), dict(parts[0]._buffers)
    joined.out_features = sum(sizes)
    for name, first in _tensors(parts[0]):
        whole = _stack([getattr(part, name).data for part in parts])
        keep = (
            nn.Parameter(whole, requires_grad=False) if isinstance(first, nn.Parameter) else whole
        )
        setattr(joined, name, keep)
        for part, view in zip(parts, whole.split(sizes), strict=True):
            getattr(part, name).data = view
    return joined


def _stack(tensors: list[Tensor]) -> Tensor:
    """One under the other; fp8 goes as bytes, which every device can join."""
    if tensors[0].itemsize > 1:
        return torch.cat(tensors)
    return torch.cat([tensor.view(torch.uint8) for tensor in tensors]).view(tensors[0].dtype)


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _take_tensors(module: nn.Module, part: nn.Module) -> None:
    """Hold the weights of a layer under their names, so that the model still lists them."""
    module.in_features, module.out_features = part.in_features, part.out_features  # pyright: ignore
    module._parameters.update(part._parameters)
    module._buffers.update(part._buffers)


def fuse_linears(model: Any, device: torch.device) -> int:
    """Join the linear layers of a model that may be joined; returns how many groups."""
    groups = [
        (block, names)
        for block in model.modules()
        for names in GROUPS
        if all(type(getattr(block, name, None)) in LINEARS for name in names)
    ]
    seen = watch_calls(model, device, (getattr(b, n) for b, names in groups for n in names))
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


def watch_calls(
    model: Any, device: torch.device, modules: Iterable[nn.Module]
) -> dict[int, list[tuple[int, int]]]:
    """Run one token: for each layer its calls as (order, identity of the input)."""
    seen: dict[int, list[tuple[int, int]]] = {}
    inputs: list[Tensor] = []  # kept, so that no two share an identity

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        seen.setdefault(id(module), []).append((len(inputs), id(args[0])))

    hooks = [module.register_forward_pre_hook(note) for module in modules]
    try:
        run_one_token(model, device)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _may_join(parts: list[nn.Module], calls: list[list[tuple[int, int]]]) -> bool:
    """Called once each, one after the other, with one input; alike in kind, dtypes and bias."""
    if any(len(call) != 1 for call in calls):
        return False
    orders = [call[0][0] for call in calls]
    kinds = {
        (type(part), *((name, tensor.dtype, tensor.shape[1:]) for name, tensor in _tensors(part)))
        for part in parts
    }
    return (
        len({call[0][1] for call in calls}) == 1
        and orders == list(range(orders[0], orders[0] + len(parts)))
        and len(kinds) == 1
    )
