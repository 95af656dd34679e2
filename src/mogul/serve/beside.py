"""A shared fp8 expert runs in the call of the routed ones, without touching the model's code.

In compiled code the experts module then computes both, one operator on two streams, and keeps the
shared part; what stands where the shared expert stood hands it out. As in `fuse.py` nothing is
assumed of the model: one token is run, and only where both are called once, with one input, routed
experts first, and the shared one says what its products say, are they joined. Code that is not
compiled calls both as before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mogul.kernels import takes_shared
from mogul.models.quantise import PackedExperts
from mogul.models.quantise_linears import PackedLinear
from mogul.serve.fuse import First, Next, watch_calls


class Kept(nn.Module):
    """Stands where a shared expert stood: hands out what the routed experts' call computed."""

    def __init__(self, experts: PackedExperts, shared: nn.Module) -> None:
        super().__init__()
        self.experts, self.shared = [experts], [shared]  # in lists: no submodules
        self._modules.update(shared._modules)  # the model still lists its weights

    def forward(self, x: Tensor) -> Tensor:
        """The shared part, once; computed here where the routed experts did not."""
        experts = self.experts[0]
        if not experts.kept:
            return self.shared[0](x)
        (out,) = experts.kept
        experts.kept = ()
        return out


def join_shared(model: Any, device: torch.device) -> int:
    """Let fp8 experts run their shared expert beside them; returns in how many blocks."""
    found = [
        (block, products)
        for block in model.modules()
        if (products := _products(block, model.dtype)) is not None
    ]
    parts = [part for block, _ in found for part in (block.experts, block.shared_expert)]
    seen = watch_calls(model, device, parts)
    count = 0
    for block, products in found:
        calls = [seen.get(id(part), []) for part in (block.experts, block.shared_expert)]
        if [len(call) for call in calls] != [1, 1]:
            continue
        (order, given), (after, also) = (call[0] for call in calls)
        if (
            given == also
            and order < after
            and _is_gated(block.shared_expert, products, model.dtype)
        ):
            block.experts.beside = products
            block.shared_expert = Kept(block.experts, block.shared_expert)
            count += 1
    return count


@torch.inference_mode()
def _is_gated(
    shared: nn.Module, products: tuple[PackedLinear, PackedLinear], dtype: torch.dtype
) -> bool:
    """Whether a shared expert is down(silu(gate) * up) and nothing else, tried with one row."""
    joined, last = products
    x = torch.linspace(-2, 2, joined.in_features, device=joined.value.device).to(dtype)[None]
    gate, up = joined(x).chunk(2, -1)
    want = last(F.silu(gate) * up)
    return torch.allclose(
        shared(x).float(), want.float(), rtol=0.05, atol=0.02 * float(want.abs().max())
    )


def _products(block: Any, dtype: torch.dtype) -> tuple[PackedLinear, PackedLinear] | None:
    """The joined and the last product of a block's shared expert, where it and the experts fit."""
    experts, shared = getattr(block, "experts", None), getattr(block, "shared_expert", None)
    if not isinstance(experts, PackedExperts) or shared is None or isinstance(shared, Kept):
        return None
    gate, up, down = (getattr(shared, f"{name}_proj", None) for name in ("gate", "up", "down"))
    fits = (
        takes_shared(experts.experts, dtype)
        and type(gate) is First
        and type(up) is Next
        and type(down) is PackedLinear
        and type(getattr(shared, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
    )
    if not fits:
        return None
    joined: Any = gate.joined[0]  # pyright: ignore[reportOptionalMemberAccess]
    last: Any = down
    plain = type(joined) is PackedLinear and joined.bias is None and last.bias is None
    return (joined, last) if plain else None
