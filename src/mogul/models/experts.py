"""Make mogul's kernels an experts implementation of Transformers, under the name "mogul".

Transformers calls an implementation as a method of a model's own experts module. `expert_layout.py`
reads how its weights lie; this file calls `mogul.kernels.moe_forward` with them. Nothing falls back
silently: what the kernels lack is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.integrations import moe as transformers_moe

from mogul.kernels import moe_forward
from mogul.models.expert_layout import first_matmul, layout_of, read_layout, refusal, weight_of

__all__ = ["NAME", "experts_backend", "layout_of", "mogul_experts_forward", "register"]

NAME = "mogul"

_backend = "auto"
_forced: list[list[str]] = []
"""The names that are forced now, the last one counts."""


@contextmanager
def experts_backend(name: str) -> Iterator[None]:
    """Force one backend of `moe_forward` ("reference", "cpu", ...) until the block ends.

    For all threads: the backward pass and what it computes again run in threads of their own.
    """
    global _backend
    mine, _backend = [name], name
    _forced.append(mine)
    try:
        yield
    finally:  # blocks of several threads may end in any order
        _forced[:] = [other for other in _forced if other is not mine]
        _backend = _forced[-1][0] if _forced else "auto"


def mogul_experts_forward(
    self: nn.Module,
    hidden_states: Float[Tensor, "T D"],
    top_k_index: Int[Tensor, "T K"],
    top_k_weights: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Run the experts module `self` by mogul's kernels; ids from num_experts on have no row."""
    module: Any = self
    layout = read_layout(module)
    first = first_matmul(layout.has_gate)
    return moe_forward(
        hidden_states,
        weight_of(module, first),
        weight_of(module, "down_proj"),
        top_k_index,
        top_k_weights,
        gate_up_bias=getattr(module, first + "_bias") if module.has_bias else None,
        down_bias=module.down_proj_bias if module.has_bias else None,
        layout=layout,
        backend=_backend,
    )


def refuse_quantised(self: nn.Module, *_args: Any, **_kwargs: Any) -> Tensor:
    """The implementation for FP8 experts: refuse by name."""
    raise refusal(type(self).__name__, "its weights are quantised to FP8")


def register() -> None:
    """Tell Transformers about "mogul"; calling it again changes nothing."""
    transformers_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, mogul_experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, refuse_quantised)
