"""Quantised experts: the record of their weights, and the door that runs them.

Decides the one layout they are stored in: gate rows before up rows, [E, 2F, D] and [E, D, F],
whatever the model's own; biases and activation come along. Forward only: no gradient exists. The
router is no part of this and stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mogul.core.errors import ConfigError
from mogul.core.log import log
from mogul.core.registry import Registry
from mogul.kernels.checks import check_devices, check_picks
from mogul.kernels.layout import DEFAULT_LAYOUT, ExpertLayout
from mogul.kernels.quant_format import (
    ExpertFormat,
    dequantise_fp8,
    dequantise_int4,
    expert_format,
    quantise_fp8_weight,
    quantise_int4,
)


@dataclass(frozen=True)
class QuantisedWeight:
    """One matrix of all experts, [E, N, C] by meaning."""

    value: Tensor
    """float8_e4m3fn [E, N, C], or uint8 [E, N, C / 2] of packed pairs."""
    scale: Tensor
    """float32 [E, N], or bfloat16 [E, groups, N, 2]: scale and offset."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """E, N, C."""
        experts, rows, columns = self.value.shape
        return experts, rows, columns * (2 if self.value.dtype == torch.uint8 else 1)

    def dequantise(self, format: ExpertFormat, dtype: torch.dtype, experts: slice | int) -> Tensor:
        """The matrices of some experts."""
        value, scale = self.value[experts], self.scale[experts]
        if format.kind == "fp8":
            return dequantise_fp8(value, scale, dtype)
        return dequantise_int4(value, scale, format.group, dtype)


@dataclass(frozen=True)
class QuantisedExperts:
    """All weights of one experts layer in one format."""

    format: ExpertFormat
    gate_up: QuantisedWeight
    down: QuantisedWeight
    layout: ExpertLayout = DEFAULT_LAYOUT
    """Only the activation matters: matrices are stored row by row, gate before up."""
    gate_up_bias: Tensor | None = None
    down_bias: Tensor | None = None

    def __post_init__(self) -> None:
        if self.layout.is_transposed or not self.layout.is_concatenated:
            raise ConfigError(
                "quantised experts are stored as [E, 2F, D] with gate rows before up rows",
                fix="use mogul.kernels.quantise_experts, which brings other layouts into this one",
            )
        experts, width, inner = self.down.sizes
        if self.gate_up.sizes != (experts, (1 + self.layout.has_gate) * inner, width):
            raise ConfigError(
                f"gate_up {self.gate_up.sizes} and down {self.down.sizes} are no experts layer",
                fix="quantise both matrices of one layer in one call of quantise_experts",
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Experts, model width, expert width."""
        return self.down.sizes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.down.value.device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name, `gate_up_value` and so on: what a checkpoint holds."""
        found: dict[str, Tensor | None] = {
            "gate_up_value": self.gate_up.value,
            "gate_up_scale": self.gate_up.scale,
            "down_value": self.down.value,
            "down_scale": self.down.scale,
        }
        found |= {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @classmethod
    def of_tensors(
        cls, tensors: dict[str, Tensor], format: ExpertFormat, layout: ExpertLayout
    ) -> QuantisedExperts:
        """The record of what `tensors` gave."""
        gate_up = QuantisedWeight(tensors["gate_up_value"], tensors["gate_up_scale"])
        down = QuantisedWeight(tensors["down_value"], tensors["down_scale"])
        biases = (tensors.get("gate_up_bias"), tensors.get("down_bias"))
        return cls(format, gate_up, down, layout, *biases)

    @property
    def num_bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())


def quantise_experts(
    gate_up: Tensor,
    down: Tensor,
    format: str | ExpertFormat,
    *,
    layout: ExpertLayout = DEFAULT_LAYOUT,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    importance: tuple[Tensor, Tensor] | None = None,
) -> QuantisedExperts:
    """Quantise an experts layer of any layout, expert by expert: peak is the result and one expert.

    Args:
        gate_up: first matmul as `layout` says, floating-point.
        down: second matmul.
        format: fp8, fp8-w8a16, int4-32, int4-64, int4-128, or the record of one.
        layout: of the given weights and of the biases.
        gate_up_bias: in the column order of gate_up; stays as it is.
        down_bias: stays as it is.
        importance: mean squares of the inputs of both matmuls, [E, D] and [E, F]; rounding errors
            are then weighed by them.
    """
    chosen = expert_format(format)
    layout.sizes(gate_up, down)
    first, second = (gate_up.mT, down.mT) if layout.is_transposed else (gate_up, down)
    if gate_up_bias is not None:
        gate_up_bias = _rows_in_order(gate_up_bias[..., None], layout)[..., 0].contiguous()
    return QuantisedExperts(
        chosen,
        _quantise(first, chosen, layout, importance and importance[0]),
        _quantise(second, chosen, None, importance and importance[1]),
        replace(layout, is_transposed=False, is_concatenated=True),
        gate_up_bias,
        down_bias,
    )


def _rows_in_order(matrix: Tensor, layout: ExpertLayout) -> Tensor:
    """[..., 2F, C] with all gate rows before all up rows."""
    if layout.is_concatenated or not layout.has_gate:
        return matrix
    return torch.cat((matrix[..., ::2, :], matrix[..., 1::2, :]), dim=-2)


def _quantise(
    weight: Tensor,
    format: ExpertFormat,
    layout: ExpertLayout | None,
    importance_EC: Tensor | None,
) -> QuantisedWeight:
    parts: list[list[Tensor]] = []
    with torch.no_grad():
        for index, expert in enumerate(weight.detach().unbind()):
            rows = expert if layout is None else _rows_in_order(expert, layout)
            importance = None if importance_EC is None else importance_EC[index]
            if format.kind == "fp8":
                found = quantise_fp8_weight(rows, importance)
            else:
                found = quantise_int4(rows, format.group, importance)
            if not parts:
                parts = [[] for _ in found]
            for part, tensor in zip(parts, found, strict=True):
                part.append(tensor)
        stacked = [torch.stack(part) for part in parts]
    return QuantisedWeight(*stacked)


def dequantise_experts(experts: QuantisedExperts, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [E, 2F, D] and [E, D, F] in a floating-point dtype; gate rows before up rows."""
    every = slice(None)
    return (
        experts.gate_up.dequantise(experts.format, dtype, every),
        experts.down.dequantise(experts.format, dtype, every),
    )


class QuantisedForward(Protocol):
    """What a backend must accept: x and the experts on one device; int64 ids."""

    def __call__(
        self, x: Tensor, experts: QuantisedExperts, ids: Tensor, weights: Tensor, /
    ) -> Tensor:
        """Run the layer."""
        ...


class QuantisedFacts(NamedTuple):
    """What a backend's `why_not(**facts)` is told of a call."""

    device: torch.device
    dtype: torch.dtype
    format: ExpertFormat
    num_experts: int
    hidden_size: int
    expert_width: int
    layout: ExpertLayout


def _warn_of_dequantising(registry: Registry[Any], name: str, facts: QuantisedFacts) -> None:
    if name != "triton":
        log.warning(
            f"{facts.format.name} experts run on the {name} backend, which dequantises them: it "
            f"saves memory, not time (triton: {registry.reasons(**facts._asdict()).get('triton')})"
        )


MOE_QUANTISED: Registry[QuantisedForward] = Registry(
    "moe_forward_quantised", on_choice=_warn_of_dequantising
)


def moe_forward_quantised(
    x: Float[Tensor, "T D"],
    experts: QuantisedExperts,
    ids: Int[Tensor, "T K"],
    weights: Float[Tensor, "T K"],
    *,
    backend: str = "auto",
) -> Float[Tensor, "T D"]:
    """`moe_forward` with quantised experts, in the dtype of x; no gradient.

    fp8 multiplies e4m3 activations, scaled token by token while it runs, with e4m3 weights;
    fp8-w8a16 carries each activation as two numbers of e4m3; int4 multiplies x with the dequantised
    weights. A slot whose id is no expert has no row.

    Raises:
        ConfigError: shapes or devices that do not belong together, or a wanted gradient.
        BackendError: the forced backend cannot run this call, with the reason.
    """
    num_experts, hidden_size, inner = experts.sizes
    _check(x, experts, ids, weights, hidden_size)
    facts = QuantisedFacts(
        x.device, x.dtype, experts.format, num_experts, hidden_size, inner, experts.layout
    )
    run = MOE_QUANTISED.resolve(backend, facts)[1]
    return run(x, experts, ids.to(torch.int64), weights)


def _check(
    x: Tensor, experts: QuantisedExperts, ids: Tensor, weights: Tensor, hidden_size: int
) -> None:
    check_picks(x, ids, weights, hidden_size)
    check_devices(x, experts=experts.down.value, ids=ids, weights=weights)
    if torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad):
        raise ConfigError(
            "quantised experts have no gradient",
            fix="call them under torch.no_grad(), or train the unquantised model",
        )
