"""What quantised weights cost in quality: SmolLM2, its upcycled form and nano, format by format.

Decides the measure: bits per byte of held-out text against the unquantised model, the share of
positions whose likeliest token stays, and, with a router, the share of picks that stay. The dense
model's FFN runs as one expert, so all forms go through the same arithmetic: that of the kernels,
simulated in fp32 (fp8 activations by row, int4 with bf16 scales). What an fp8 cache costs stands
in `kv_quality.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
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
from mogul.models.quantise_linears import linear_inputs, quantise_linears
from mogul.observe.hooks import Picks, watch
from mogul.spec.grouping import Grouping
from mogul.train.data import Windows

GROUPING = Grouping(num_experts=32, num_groups=8, top_k=8)
LINEARS = "+linears"
"""Behind a format's name: linear layers of the decoder blocks are fp8 too, as an engine has it."""


@dataclass(frozen=True)
class Subject:
    """A model to measure, made anew for every format, with the text it is measured on."""

    name: str
    build: Callable[[], Any]
    held_out: Windows
    calibration: Windows
    has_router: bool


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


def upcycled(dense: Any, grouping: Grouping = GROUPING) -> Any:
    """The dense model with experts in groups, run by mogul's kernels."""
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


def subjects_of(
    dense: Any, held_out: Windows, calibration: Windows, grouping: Grouping = GROUPING
) -> list[Subject]:
    """A dense model and its upcycled form, on the same text."""
    return [
        Subject("dense", lambda: as_one_expert(dense), held_out, calibration, has_router=False),
        Subject(
            "upcycled", lambda: upcycled(dense, grouping), held_out, calibration, has_router=True
        ),
    ]


def qualities(
    subject: Subject,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    calibrated: Sequence[bool] = (True, False),
) -> Iterator[Quality]:
    """Every format, with and without input statistics, one at a time."""
    model = subject.build()
    before = _look(model, subject.held_out, has_router=subject.has_router)
    yield Quality(subject.name, "none", False, before.bits_per_byte, 0.0, 1.0,
                  1.0 if subject.has_router else None, 32.0)  # fmt: skip
    importance, linears = {}, {}
    if any(calibrated):
        importance = expert_inputs(model, _batches(subject.calibration, 4))
        if any(name.endswith(LINEARS) for name in formats):
            linears = linear_inputs(model, _batches(subject.calibration, 4))
    del model
    for name in formats:
        for is_calibrated in calibrated:
            say(f"{subject.name} in {name}")
            quantised: Any = quantise_model(
                subject.build(),
                name.removesuffix(LINEARS),
                importance=importance if is_calibrated else None,
            )
            if name.endswith(LINEARS):
                quantise_linears(quantised, linears if is_calibrated else None)
            after = _look(quantised, subject.held_out, has_router=subject.has_router)
            yield Quality(
                subject.name,
                name,
                is_calibrated,
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
