"""Which part of a parameter a rank keeps, and how local parameters take the place of whole ones.

A cut is a list of index ranges along one axis: whole experts, the F slice of each expert (gate and
up halves together), the heads of an attention. `keep` replaces a parameter of a module by its part
and writes down what was cut, so that any whole tensor can be cut alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mogul.core.errors import ConfigError
from mogul.spec.grouping import divisors

CUTS = "_mogul_cuts"
"""Attribute of a module: {parameter name: (Cut, ...)}."""


@dataclass(frozen=True)
class Cut:
    """Rows that a rank keeps along one axis of a parameter."""

    axis: int
    kept: tuple[int, ...]
    whole: int
    """Size of the axis before cutting."""

    def take(self, tensor: Tensor) -> Tensor:
        """The kept part; an index -1 (an empty slot) gives zeros."""
        if tensor.is_meta:
            shape = list(tensor.shape)
            shape[self.axis] = len(self.kept)
            return tensor.new_empty(shape)
        first, count = (self.kept[0], len(self.kept)) if self.kept else (0, 0)
        if self.kept == tuple(range(first, first + count)) and first >= 0:
            return tensor.narrow(self.axis, first, count).clone()
        index = torch.tensor(self.kept, device=tensor.device)
        part = tensor.index_select(self.axis, index.clamp(min=0))
        if -1 in self.kept:
            empty = (index < 0).view([-1 if a == self.axis else 1 for a in range(part.ndim)])
            part = part.masked_fill(empty, 0)
        return part


def keep(module: nn.Module, name: str, *cuts: Cut) -> None:
    """Replace the parameter `name` by its part; nothing for a parameter that is None."""
    whole = module._parameters.get(name)
    if whole is None:
        return
    part: Tensor = whole.detach()
    for cut in cuts:
        part = cut.take(part)
    parameter = nn.Parameter(part.contiguous(), requires_grad=whole.requires_grad)
    module.register_parameter(name, parameter)
    cuts_of(module)[name] = cuts


def cuts_of(module: nn.Module) -> dict[str, tuple[Cut, ...]]:
    """What was cut from the parameters of a module."""
    return module.__dict__.setdefault(CUTS, {})


def even(axis: int, whole: int, rank: int, ranks: int) -> Cut:
    """The rank's equal share of an axis."""
    share = whole // ranks
    return Cut(axis, tuple(range(rank * share, (rank + 1) * share)), whole)


def width_cut(axis: int, width: int, rank: int, ranks: int, *, halves: int, together: bool) -> Cut:
    """The rank's share of an expert's inner width F where `halves` x F stand on one axis.

    `together` says that the halves (gate and up) follow each other; otherwise they alternate.
    """
    share = width // ranks
    part = range(rank * share, (rank + 1) * share)
    if together:
        kept = [half * width + f for half in range(halves) for f in part]
    else:
        kept = [halves * f + half for f in part for half in range(halves)]
    return Cut(axis, tuple(kept), halves * width)


def cut_experts(module: Any, experts: Sequence[int], tp_rank: int, tp: int) -> None:
    """Leave the experts in this order, and of each the F slice of `tp_rank`, in an experts module.

    The second bias is added once, by the first slice.

    Raises:
        ConfigError: `tp` does not divide the expert width.
    """
    total = module.num_experts
    rows = Cut(0, tuple(experts), total)
    first = "gate_up_proj" if module.has_gate else "up_proj"
    halves = 2 if module.has_gate else 1
    width = module.down_proj.shape[1 if module.is_transposed else 2]
    if width % tp:
        raise ConfigError(
            f"moe_tp={tp} does not divide the expert width {width}",
            fix=f"moe_tp may be one of {divisors(width)}",
        )
    axis_in, axis_out = (2, 1) if module.is_transposed else (1, 2)
    layout = {"halves": halves, "together": module.is_concatenated}
    inner = [width_cut(axis_in, width, tp_rank, tp, **layout)] if tp > 1 else []
    keep(module, first, rows, *inner)
    keep(module, "down_proj", rows, *([even(axis_out, width, tp_rank, tp)] if tp > 1 else []))
    if module.has_bias:
        inner = [width_cut(1, width, tp_rank, tp, **layout)] if tp > 1 else []
        keep(module, first + "_bias", rows, *inner)
        keep(module, "down_proj_bias", rows)
        if tp_rank:
            module.down_proj_bias.data.zero_()
            module.down_proj_bias.requires_grad_(False)
    module.num_experts = len(experts)
    module._is_expert_parallel = True  # stock implementations then skip rows without an expert


def cut_columns(linear: nn.Linear, rank: int, ranks: int) -> None:
    """Keep the rank's outputs of a linear layer (and of its bias)."""
    outputs = linear.weight.shape[0]
    keep(linear, "weight", even(0, outputs, rank, ranks))
    keep(linear, "bias", even(0, outputs, rank, ranks))
    linear.out_features = outputs // ranks


def cut_rows(linear: nn.Linear, rank: int, ranks: int) -> None:
    """Keep the rank's inputs of a linear layer; its bias stays whole, to be added once."""
    inputs = linear.weight.shape[1]
    keep(linear, "weight", even(1, inputs, rank, ranks))
    linear.in_features = inputs // ranks
