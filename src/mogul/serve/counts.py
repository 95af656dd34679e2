"""How many tokens each expert of each layer got, counted where they are computed.

The numbers stay on the device, in compiled and captured steps, too, until somebody reads them.
What is called with the picks is the experts module of each layer, in every family; while an engine
counts, another stands in its place and calls it. Steps of other engines that run the same model
pass through it uncounted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mogul.observe.hooks import moe_blocks, num_experts_of
from mogul.serve import attention


class CountedExperts(nn.Module):
    """Stands where experts stood: counts their picks, then calls them."""

    def __init__(self, experts: nn.Module, counts_E: Tensor, owner: Tensor) -> None:
        super().__init__()
        self.experts, self.counts_E = [experts], counts_E  # in a list: no submodule
        self.owner = owner
        self._parameters, self._buffers = experts._parameters, experts._buffers
        self._modules = experts._modules  # the model lists its weights as before

    def forward(self, hidden: Tensor, ids: Tensor, *others: Any, **named: Any) -> Tensor:
        """As the experts."""
        torch.ops.mogul.count_picks(ids, self.counts_E, self.owner)
        return self.experts[0](hidden, ids, *others, **named)


class ExpertCounts:
    """Counts of all layers of a model, on its device."""

    def __init__(self, model: nn.Module, device: torch.device, owner: int) -> None:
        """Begin to count the steps of one owner (see `attention.StepState`).

        Raises:
            BackendError: the model has no experts.
        """
        self._blocks = moe_blocks(model)
        self.num_experts = num_experts_of(model, self._blocks)
        # behind the experts: null picks, and tokens that only fill a captured step
        size = (len(self._blocks), self.num_experts + 1)
        self._counts_LE = torch.zeros(size, dtype=torch.int64, device=device)
        number = torch.tensor(owner)  # its value then is no part of the compiled code
        self._places: list[tuple[nn.Module, str, CountedExperts]] = []
        names = {id(block.experts): i for i, block in enumerate(self._blocks)}
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in names:
                    counted = CountedExperts(child, self._counts_LE[names[id(child)]], number)
                    setattr(parent, name, counted)
                    self._places.append((parent, name, counted))

    def read(self) -> np.ndarray:
        """Tokens that each expert got since the start [layers, E]; waits for the steps so far."""
        return self._counts_LE[:, : self.num_experts].cpu().numpy()

    def close(self) -> None:
        """Stop; the model is as it was, but for others who still count."""
        for parent, name, counted in self._places:
            inner, outer = getattr(parent, name), None
            while isinstance(inner, CountedExperts) and inner is not counted:
                inner, outer = inner.experts[0], inner
            if inner is counted and outer is not None:
                outer.experts[0] = counted.experts[0]
            elif inner is counted:
                setattr(parent, name, counted.experts[0])
        self._places = []


def _count_picks(ids: Tensor, counts_E: Tensor, owner: Tensor) -> None:
    """Add the picks [T, K] of a step's tokens to counts [E + 1]; what is no expert's goes last."""
    slots_T = attention.running_slots(int(owner))
    if slots_T is None:  # another's step, or one token that is run and watched
        return
    experts = len(counts_E) - 1
    is_real = (ids >= 0) & (ids < experts) & (slots_T >= 0)[:, None]
    ids_S = torch.where(is_real, ids, experts).flatten().long()
    counts_E.scatter_add_(0, ids_S, torch.ones_like(ids_S))


_LIB = torch.library.Library("mogul", "FRAGMENT")
_LIB.define("count_picks(Tensor ids, Tensor(a!) counts, Tensor owner) -> ()")
_LIB.impl("count_picks", _count_picks, "CompositeExplicitAutograd")


@torch.library.register_fake("mogul::count_picks", lib=_LIB)
def _(_ids: Tensor, _counts: Tensor, _owner: Tensor) -> None:
    return None
