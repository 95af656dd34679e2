"""Muon for lists of weights: equal matrices of all layers take their step in one batch.

Weights of one shape and kind form a stack. Their momenta (and the second halves of bf16 weights)
lie in one tensor each, of which every weight's state is a view; gradients are gathered, all
matrices of the stack are orthogonalised at once, each alone, and the weights move together. So a
step is a few dozen launches whatever the number of layers, and its elementwise work two passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mogul.train.halves import compiled, moved_halves
from mogul.train.newton_schulz import orthogonalise

RMS_OF_ADAMW = 0.2
"""Muon's step is scaled to the root mean square that AdamW's usually has (arXiv 2502.16982)."""
MOST_ELEMENTS = 1 << 28
"""In one stack: bounds the memory of a step."""
LOW = (torch.bfloat16, torch.float16)
State = Mapping[Any, dict[str, Tensor]]
"""What an optimizer keeps by parameter."""
LISTS: Any = torch
"""torch's operators on lists of tensors, which it does not export."""


@dataclass(frozen=True)
class Slices:
    """How one tensor divides into matrices that belong together by accident only."""

    dim: int = -2
    parts: int = 1
    interleaved: bool = False

    def split(self, tensor: Tensor) -> Tensor:
        """The parts beside each other before the last two axes; a view."""
        if self.parts == 1:
            return tensor
        sizes = (-1, self.parts) if self.interleaved else (self.parts, -1)
        return tensor.unflatten(self.dim, sizes).movedim(self._place, -3)

    def join(self, parts: Tensor) -> Tensor:
        """The tensor of which `split` made these parts."""
        if self.parts == 1:
            return parts
        return parts.movedim(-3, self._place).flatten(self.dim - 1, self.dim)

    @property
    def _place(self) -> int:
        """Axis of the parts after unflattening `dim`, counted from the end."""
        return self.dim if self.interleaved else self.dim - 1


WHOLE = Slices()


@dataclass(frozen=True)
class MuonRule:
    """What one step does to every weight of a group."""

    rate: float
    weight_decay: float
    momentum: float
    factor: float
    """Of the gradients."""


class Stack:
    """Weights of one shape, dtype and division, and the state they share."""

    def __init__(
        self, weights: Sequence[nn.Parameter], slices: Slices, *, in_halves: bool, compiles: bool
    ) -> None:
        self.weights, self.slices, self.compiles = list(weights), slices, compiles
        self.in_halves = in_halves
        self._momentum: Tensor | None = None
        self._low: Tensor | None = None

    def open(self, state: State, dtype: torch.dtype) -> None:
        """Make the state, zero, and show each weight its part of it."""
        if self._momentum is not None:
            return
        first = self.weights[0]
        shape = (len(self.weights), *first.shape)
        self._momentum = torch.zeros(shape, dtype=dtype, device=first.device)
        if self.in_halves:
            self._low = torch.zeros(shape, dtype=torch.int16, device=first.device)
        for place, weight in enumerate(self.weights):
            own = state[weight]
            own["momentum"] = self._momentum[place]
            if self._low is not None:
                own["low"] = self._low[place]
            elif weight.dtype in LOW:
                own["master"] = weight.detach().float()

    def step(
        self,
        state: State,
        gradients: Sequence[Tensor | None],
        rule: MuonRule,
        numbers: Tensor,
    ) -> None:
        """Move every weight that has a gradient; all together where none is missing.

        `numbers` is what `numbers_of` says, on the weights' device.
        """
        if all(gradient is not None for gradient in gradients):
            self._step(state, slice(0, len(gradients)), gradients, rule, numbers)
            return
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                self._step(state, slice(place, place + 1), [gradient], rule, numbers)

    def numbers_of(self, rule: MuonRule) -> tuple[float, float, float, float]:
        """Factor of the gradients, share of the momentum, shrinking of the weights, step."""
        shrink = 1 - rule.rate * rule.weight_decay
        sides = self.slices.split(self.weights[0]).shape[-2:]
        return rule.factor, 1 - rule.momentum, shrink, rule.rate * RMS_OF_ADAMW * max(sides) ** 0.5

    def _step(
        self,
        state: State,
        places: slice,
        gradients: Sequence[Any],
        rule: MuonRule,
        numbers: Tensor,
    ) -> None:
        assert self._momentum is not None
        weights, momentum = self.weights[places], self._momentum[places]
        is_low = weights[0].dtype in LOW
        wide = torch.promote_types(weights[0].dtype, torch.float32)
        look = compiled(_look, self.compiles)(
            torch.stack(list(gradients)).flatten(),
            momentum.flatten(),
            numbers[:2],
            torch.bfloat16 if is_low else wide,
        )
        parts = self.slices.split(look.view(momentum.shape))
        turned = self.slices.join(orthogonalise(parts))
        if self._low is not None:
            high = torch.stack([w.detach().view(torch.int16) for w in weights])
            compiled(moved_halves, self.compiles)(
                high.flatten(),
                self._low[places].flatten(),
                turned.contiguous().flatten(),
                numbers[2:],
            )
            targets = [w.detach().view(torch.int16) for w in weights]
            LISTS._foreach_copy_(targets, list(high.unbind()))
            return
        _, _, shrink, reach = self.numbers_of(rule)
        masters = [state[w].get("master", w.detach()) for w in weights]
        LISTS._foreach_mul_(masters, shrink)
        LISTS._foreach_add_(masters, list(turned.to(wide).unbind()), alpha=-reach)
        if is_low:
            LISTS._foreach_copy_([w.detach() for w in weights], masters)


def stacks_of(
    weights: Iterable[nn.Parameter],
    slices: Mapping[nn.Parameter, Slices],
    in_halves: Any,
    *,
    compiles: bool,
) -> list[Stack]:
    """Weights by shape, dtype and division, in stacks of bounded size."""
    found: dict[tuple[Any, ...], list[list[nn.Parameter]]] = {}
    for weight in weights:
        own = slices.get(weight, WHOLE)
        key = (weight.shape, weight.dtype, weight.device, own, in_halves(weight))
        lists = found.setdefault(key, [[]])
        if lists[-1] and (len(lists[-1]) + 1) * weight.numel() > MOST_ELEMENTS:
            lists.append([])
        lists[-1].append(weight)
    return [
        Stack(members, key[3], in_halves=key[4], compiles=compiles)
        for key, lists in found.items()
        for members in lists
    ]


def _look(gradient: Tensor, momentum: Tensor, numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Nesterov: move the momentum (in place), and look one step further along it."""
    factor, share = numbers.unbind()
    wide = gradient.to(numbers.dtype) * factor
    moved = momentum.to(numbers.dtype) + (wide - momentum.to(numbers.dtype)) * share
    momentum.copy_(moved)
    return (moved + (wide - moved) * share).to(dtype)


def numbers_on_device(stacks: Sequence[Stack], rule: MuonRule) -> list[Tensor]:
    """The numbers of every stack in its own precision, one copy a device, which is waited for.

    An unpinned tensor must not be copied without waiting: where the device reads pageable memory
    by itself, it may do so after the host has given the memory to something else.
    """
    rows = torch.tensor([stack.numbers_of(rule) for stack in stacks], dtype=torch.float64)
    if all(stack.weights[0].dtype != torch.float64 for stack in stacks):
        rows = rows.float()
    there = {device: rows.to(device) for device in {stack.weights[0].device for stack in stacks}}
    found = []
    for place, weight in enumerate(stack.weights[0] for stack in stacks):
        row = there[weight.device][place]
        found.append(row.to(torch.promote_types(weight.dtype, torch.float32)))
    return found
