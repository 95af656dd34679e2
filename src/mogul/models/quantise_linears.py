"""Quantise the linear layers of a model's decoder blocks to fp8: attention, feed-forwards.

Decides which layers count: every `nn.Linear` inside the blocks that Transformers repeats, whose
sizes are multiples of 16, except routers and gates of single numbers. Embeddings, norms, routers
and the output head keep their dtype. Experts are `quantise.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mogul.core.log import say
from mogul.core.units import show_bytes
from mogul.kernels.quant_format import quantise_fp8_weight, quantise_rows
from mogul.kernels.triton.linear import linear_fp8
from mogul.models.expert_inputs import run_watched
from mogul.models.quantise import Packed, refuse_saving

_STEP = 16
_ROUTERS = ("gate", "router")


class PackedLinear(Packed):
    """Stands where an `nn.Linear` stood: e4m3 weights [N, C] with one fp32 scale a row.

    Rows of the input are rounded to e4m3 with a scale each, as fp8 experts do.
    """

    value: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, value: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = value.shape
        self.register_buffer("value", value)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)

    @classmethod
    def of(cls, linear: nn.Linear, importance: Tensor | None = None) -> PackedLinear:
        """The quantised twin of a linear layer; `importance` [C] are mean squares of its input."""
        with torch.no_grad():
            value, scale = quantise_fp8_weight(linear.weight.detach(), importance)
        return cls(value, scale, None if linear.bias is None else linear.bias.detach())

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B N"]:
        """As the layer it replaced."""
        rows, scale = quantise_rows(x.reshape(-1, self.in_features))
        out = linear_fp8(rows, scale, self.value, self.scale, x.dtype)
        if self.bias is not None:
            out = out + self.bias
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"fp8, {self.in_features} -> {self.out_features}"


def linear_modules(model: Any) -> Iterator[tuple[str, nn.Linear]]:
    """Names and modules of the unquantised linear layers of the decoder blocks."""
    repeated = set(getattr(model, "_no_split_modules", None) or ())
    for start, block in model.named_modules():
        if type(block).__name__ in repeated:
            yield from linears_of(block, start)


def linears_of(block: nn.Module, start: str = "") -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of one decoder block that can be quantised."""
    for name, module in block.named_modules():
        if type(module) is not nn.Linear or name.rpartition(".")[2] in _ROUTERS:
            continue
        if module.in_features % _STEP == 0 and module.out_features % _STEP == 0:
            yield f"{start}.{name}" if start else name, module


@torch.no_grad()
def linear_inputs(model: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Run batches of token ids [B, L]; mean squares of what each linear layer multiplies, [C]."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def watch(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            x_TC = args[0].detach().flatten(0, -2).float()
            sums[name] = sums.get(name, 0) + x_TC.square().sum(0)
            rows[name] = rows.get(name, 0) + len(x_TC)

        return hook

    hooks = [
        module.register_forward_pre_hook(watch(name)) for name, module in linear_modules(model)
    ]
    run_watched(model, batches, hooks, "measuring the inputs of linear layers")
    return {name: total / rows[name] for name, total in sums.items()}


def quantise_linears(model: nn.Module, importance: Mapping[str, Tensor] | None = None) -> int:
    """Replace the linear layers of all decoder blocks, one by one; returns how many.

    Args:
        model: any whose blocks Transformers names.
        importance: from `linear_inputs`; weights that large inputs meet are then rounded better.
    """
    before = after = 0
    found = list(linear_modules(model))
    for name, module in found:
        before += module.weight.nbytes
        packed = PackedLinear.of(module, (importance or {}).get(name))
        after += packed.value.nbytes + packed.scale.nbytes
        model.set_submodule(name, packed)
        module.weight = None  # type: ignore[assignment]  # let it go
    say(f"{len(found)} linear layers in fp8: {show_bytes(before)} became {show_bytes(after)}")
    refuse_saving(model)
    return len(found)
