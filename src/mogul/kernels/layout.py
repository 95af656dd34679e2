"""How the tensors of one experts layer lie in memory, and what happens between its two matmuls.

Decides: which axis is which, where gate and up stand, which activation joins them. Every backend
reads this record and refuses what it lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from mogul.core.errors import ConfigError, nearest


def _relu_squared(hidden: Tensor) -> Tensor:
    return F.relu(hidden).square()


CLAMPED_SWIGLU = "clamped_swiglu"
CLAMPED_SILU = "clamped_silu"
CLAMPED = (CLAMPED_SWIGLU, CLAMPED_SILU)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": _relu_squared,
}


@dataclass(frozen=True)
class ExpertLayout:
    """The layout of one experts layer; the default is that of Qwen3-MoE.

    `clamped_swiglu` is gpt-oss's: (up.clamp(-limit, limit) + 1) * gate * sigmoid(alpha * gate),
    with gate.clamp(max=limit). `clamped_silu` is DeepSeek-V4's: silu(gate.clamp(max=limit)) *
    up.clamp(-limit, limit).
    """

    is_transposed: bool = False
    """gate_up is [E, D, 2F] and down [E, F, D], instead of [E, 2F, D] and [E, D, F]."""
    is_concatenated: bool = True
    """gate is the first half and up the second; otherwise they alternate."""
    has_gate: bool = True
    """False: gate_up has F columns in place of 2F and is only activated."""
    activation: str = "silu"
    alpha: float = 1.702
    limit: float = 7.0

    def __post_init__(self) -> None:
        known = (*ACTIVATIONS, *CLAMPED)
        if self.activation not in known:
            raise ConfigError(
                f"experts have no activation {self.activation!r}",
                fix=nearest(self.activation, known),
            )
        if self.activation in CLAMPED and not self.has_gate:
            raise ConfigError(
                f"activation {self.activation!r} needs a gate half, but has_gate=False",
                fix="set has_gate=True or choose another activation",
            )

    def sizes(self, gate_up: Tensor, down: Tensor) -> tuple[int, int, int]:
        """Return (E, D, F), or ConfigError when the two weights do not belong together."""
        if gate_up.dim() == 3 and down.dim() == 3:
            num_experts, hidden, width = down.shape
            if self.is_transposed:
                hidden, width = width, hidden
            columns = 2 * width if self.has_gate else width
            rest = (hidden, columns) if self.is_transposed else (columns, hidden)
            if gate_up.shape == (num_experts, *rest):
                return num_experts, hidden, width
        first, second = ("D, {}F", "F, D") if self.is_transposed else ("{}F, D", "D, F")
        raise ConfigError(
            f"gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)} are no experts layer: "
            f"expected [E, {first.format(2 if self.has_gate else '')}] and [E, {second}]",
            fix="check the weights against ExpertLayout(is_transposed=..., has_gate=...)",
        )

    def split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Views of the gate and up halves of [..., 2F]."""
        if self.is_concatenated:
            gate, up = hidden.chunk(2, dim=-1)
            return gate, up
        return hidden[..., ::2], hidden[..., 1::2]

    def activate(self, hidden: Tensor) -> Tensor:
        """From the first matmul's output [..., 2F] to the second one's input [..., F]."""
        if not self.has_gate:
            return ACTIVATIONS[self.activation](hidden)
        gate, up = self.split(hidden)
        if self.activation in CLAMPED:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
            if self.activation == CLAMPED_SILU:
                return F.silu(gate) * up
            return (up + 1) * (gate * (gate * self.alpha).sigmoid())
        active = ACTIVATIONS[self.activation](gate)
        return active * up if active.requires_grad else active.mul_(up)

    def activate_into(self, hidden: Tensor, out: Tensor) -> None:
        """`activate` into a tensor that exists, with none made beside it for SiLU."""
        if self.activation != "silu" or not self.has_gate:
            out.copy_(self.activate(hidden))
            return
        gate, up = self.split(hidden)
        torch.ops.aten.silu.out(gate, out=out)
        out.mul_(up)


DEFAULT_LAYOUT = ExpertLayout()
"""That of Qwen3-MoE and most others."""
