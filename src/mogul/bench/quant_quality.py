"""What quantised experts cost in quality: SmolLM2 and its upcycled form, format by format.

Decides the measure: bits per byte of held-out text against the unquantised model, the share of
positions whose likeliest token stays, and, with a router, the share of picks that stay. The dense
model's FFN runs as one expert, so both forms go through the same arithmetic: that of the kernels,
simulated in fp32 (fp8 activations by row, int4 with bf16 scales).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations import moe as transformers_moe

from mogul.core.log import say
from mogul.kernels import FORMATS
from mogul.models import upcycle
from mogul.models.expert_inputs import expert_inputs
from mogul.models.quantise import quantise_model
from mogul.observe.hooks import Picks, watch
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows

GROUPING = Grouping(num_experts=32, num_groups=8, top_k=8)


@dataclass(frozen=True)
class Quality:
    """One model in one format."""

    model: str
    format: str
    calibrated: bool
    """Whether rounding knew the mean squares of the experts' inputs."""
    bits_per_byte: float
    loss: float
    """Bits per byte over that of the unquantised model, less 1."""
    same_top1: float
    """Share of positions whose likeliest next token is that of the unquantised model."""
    same_picks: float | None
    """Share of picks that are those of the unquantised model; None without a router."""
    expert_bits: float
    """Bits an expert weight takes, all scales included."""


class OneExperts(nn.Module):
    """A dense SwiGLU as an experts module of one expert."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True
    _apply_gate = transformers_moe._default_apply_gate

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self.gate_up_proj = nn.Parameter(gate_up.detach()[None], requires_grad=False)
        self.down_proj = nn.Parameter(mlp.down_proj.weight.detach()[None], requires_grad=False)
        self.act_fn = mlp.act_fn

    def forward(self, x_TD: Tensor, _ids: Tensor, _weights: Tensor) -> Tensor:
        """The dense product."""
        gate, up = functional.linear(x_TD, self.gate_up_proj[0]).chunk(2, -1)
        return functional.linear(self.act_fn(gate) * up, self.down_proj[0])


class OneExpertBlock(nn.Module):
    """Every token to the one expert, with weight 1."""

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.experts = OneExperts(mlp)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] to [..., D]."""
        x_TD = x.flatten(0, -2)
        ids_T1 = torch.zeros(len(x_TD), 1, dtype=torch.int64, device=x.device)
        return self.experts(x_TD, ids_T1, x_TD.new_ones(len(x_TD), 1)).view_as(x)


def as_one_expert(dense: Any) -> Any:
    """A copy of a dense Llama-like model whose FFNs are experts modules."""
    model = copy.deepcopy(dense)
    for layer in model.model.layers:
        layer.mlp = OneExpertBlock(layer.mlp)
    return model


def _upcycled(dense: Any, grouping: Grouping) -> Any:
    model = upcycle(dense, num_experts=grouping.num_experts, num_groups=grouping.num_groups)
    model.set_experts_implementation("mogul")
    return model.eval()


@dataclass(frozen=True)
class _Seen:
    """What a model said about the held-out windows."""

    bits_per_byte: float
    top1: Tensor
    picks: list[Tensor]


def _batches(windows: Windows, size: int) -> Iterator[Tensor]:
    for first in range(0, len(windows), size):
        yield torch.from_numpy(windows.ids[first : first + size])


@torch.no_grad()
def _look(model: Any, windows: Windows, *, has_router: bool) -> _Seen:
    nats, top1, picks = 0.0, [], []

    def see(pick: Picks) -> None:
        picks.append(pick.ids.sort(dim=-1).values)

    def run(ids_BL: Tensor) -> Tensor:
        if not has_router:
            return model(input_ids=ids_BL, use_cache=False).logits
        with watch(model, see):
            return model(input_ids=ids_BL, use_cache=False).logits

    for ids_BL in _batches(windows, 4):
        logits_BLV = run(ids_BL)[:, :-1].float()
        nats += float(
            functional.cross_entropy(
                logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten(), reduction="sum"
            )
        )
        top1.append(logits_BLV.argmax(-1).flatten())
    num_bits = nats / float(torch.log(torch.tensor(2.0)))
    return _Seen(num_bits / int(windows.bytes_per_token[:, 1:].sum()), torch.cat(top1), picks)


def _same_picks(before: Sequence[Tensor], after: Sequence[Tensor]) -> float | None:
    """Share of a token's picks that stay, over all layers."""
    if not before:
        return None
    kept = total = 0
    for old_TK, new_TK in zip(before, after, strict=True):
        kept += int((old_TK[:, :, None] == new_TK[:, None, :]).any(2).sum())
        total += old_TK.numel()
    return kept / total


def qualities(
    dense: Any,
    held_out: Windows,
    calibration: Windows,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    uncalibrated: bool = True,
    grouping: Grouping = GROUPING,
) -> Iterator[Quality]:
    """Every format on the dense model and on its upcycled form, one at a time."""
    builders = {
        "dense": lambda: as_one_expert(dense),
        "upcycled": lambda: _upcycled(dense, grouping),
    }
    for name, build in builders.items():
        has_router = name == "upcycled"
        model = build()
        before = _look(model, held_out, has_router=has_router)
        yield Quality(name, "none", False, before.bits_per_byte, 0.0, 1.0,
                      1.0 if has_router else None, 32.0)  # fmt: skip
        importance = expert_inputs(model, _batches(calibration, 4))
        for format_name in formats:
            for calibrated in (True, False) if uncalibrated else (True,):
                say(f"{name} in {format_name}")
                quantised = quantise_model(
                    copy.deepcopy(model), format_name, importance=importance if calibrated else None
                )
                after = _look(quantised, held_out, has_router=has_router)
                yield Quality(
                    name,
                    format_name,
                    calibrated,
                    after.bits_per_byte,
                    after.bits_per_byte / before.bits_per_byte - 1,
                    float((after.top1 == before.top1).float().mean()),
                    _same_picks(before.picks, after.picks),
                    _expert_bits(quantised),
                )
                del quantised


def _expert_bits(model: nn.Module) -> float:
    """Bits a weight, from the memory that is really held."""
    records: list[Any] = [m.experts for m in model.modules() if type(m).__name__ == "PackedExperts"]
    num_bytes = sum(record.num_bytes for record in records)
    values = sum(
        3 * experts * width * inner for experts, width, inner in (r.sizes for r in records)
    )
    return num_bytes * 8 / values
