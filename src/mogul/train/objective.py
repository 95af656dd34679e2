"""The loss of a language model on packed tokens: mean nats of the next token.

`chunked_loss` multiplies hidden states by the head a chunk at a time, forward and gradient in one
pass, so that logits of all tokens never exist together. `model_loss` asks the model itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from mogul.core.errors import ConfigError
from mogul.train.narrow import add_wide_product, multiplies_wide

Objective = Callable[[nn.Module, Tensor], Tensor]
"""(model, ids [B, L]) -> mean loss in nats, with a gradient."""

PLAIN_HEADS = ("Moge", "PanguProMoE", "Llama", "Mistral", "Mixtral", "Qwen2", "Qwen3", "Olmoe")
"""Families whose logits are the head times the last hidden state, and nothing more."""
CHUNK_ELEMENTS = 1 << 28
"""Most logits alive at once on an accelerator (a CPU takes 1/128: they should stay in cache)."""


def model_loss(model: nn.Module, ids: Int[Tensor, "B L"]) -> Tensor:
    """What the model's own forward returns as loss, auxiliary losses included."""
    output: Any = model(input_ids=ids, labels=ids, use_cache=False)
    return output.loss


def has_plain_head(model: nn.Module) -> bool:
    """Whether `chunked_loss` computes this model's loss."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    name = type(model).__name__
    return (
        isinstance(head, nn.Linear)
        and head.bias is None
        and name.startswith(PLAIN_HEADS)
        and name.endswith("ForCausalLM")
    )


def choose_objective(model: nn.Module, kind: str = "auto", *, compile: bool = False) -> Objective:
    """`chunked`, `model`, or the first that fits; ConfigError when `chunked` cannot be."""
    if kind == "chunked" and not has_plain_head(model):
        raise ConfigError(
            f"run.loss='chunked' knows no {type(model).__name__}", fix="use run.loss='model'"
        )
    if kind == "model" or not has_plain_head(model):
        return model_loss
    return ChunkedLoss(compile=compile)


class ChunkedLoss:
    """The chunked objective of a model with a plain head."""

    def __init__(self, *, compile: bool = False) -> None:
        self.compile = compile
        self.parts: dict[str, Tensor] = {}
        """What the last loss was made of besides the next token, before its factor."""

    def __call__(self, model: nn.Module, ids: Int[Tensor, "B L"]) -> Tensor:
        """Mean nats of the next token over all positions but the last of each row."""
        lm: Any = model
        weight, more = lm.get_output_embeddings().weight, {}
        if trains_mtp := getattr(model, "trains_mtp", False):
            more["predict_next"] = True
        output = lm.base_model(input_ids=ids, use_cache=False, **more)
        loss = chunked_loss(output.last_hidden_state, weight, ids, compile=self.compile)
        if trains_mtp:  # the layer after the last is scored on the token after next
            ahead = chunked_loss(
                output.mtp_hidden_state, weight, ids, shift=2, compile=self.compile
            )
            self.parts["mtp_loss"] = ahead.detach()
            loss = loss + lm.config.mtp_loss_coef * ahead
        return loss


def chunked_loss(
    hidden: Float[Tensor, "B L D"],
    weight: Float[Tensor, "V D"],
    ids: Int[Tensor, "B L"],
    *,
    shift: int = 1,
    compile: bool = False,
) -> Float[Tensor, ""]:
    """Mean nats of the token `shift` places on; positions without one do not count."""
    target_BL = ids.roll(-shift, dims=1)
    target_BL[:, -shift:] = -1
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    count = ids.shape[0] * (ids.shape[1] - shift)
    loss: Any = _HeadLoss.apply(
        hidden.flatten(0, 1), weight, target_BL.flatten(), 1.0 / count, compile
    )
    return loss


class _HeadLoss(torch.autograd.Function):
    """sum of nats x scale; gradients are made in forward, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float, compile: bool
    ) -> Tensor:
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=x_TD.device)
        dx_TD = torch.empty_like(x_TD) if needs_x else None
        dweight = torch.zeros_like(weight_VD, dtype=wide) if needs_weight else None
        loss_and_grad = _softmax_step(compile)
        size = _chunk_size(x_TD, weight_VD)
        for first in range(0, len(x_TD), size):
            part = slice(first, first + size)
            logits_CV = x_TD[part] @ weight_VD.mT
            nats, dlogits_CV = loss_and_grad(logits_CV, target_T[part], scale)
            total += nats
            if dx_TD is not None:
                torch.mm(dlogits_CV, weight_VD, out=dx_TD[part])
            if dweight is not None:
                _add_product(dweight, dlogits_CV, x_TD[part])
        ctx.dtype = weight_VD.dtype
        ctx.save_for_backward(dx_TD, dweight)
        return total

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx_TD, dweight = ctx.saved_tensors
        dx = None if dx_TD is None else dx_TD * dloss.to(dx_TD.dtype)
        dw = None if dweight is None else (dweight * dloss).to(ctx.dtype)
        return dx, dw, None, None, None


def _chunk_size(x_TD: Tensor, weight_VD: Tensor) -> int:
    elements = CHUNK_ELEMENTS if x_TD.device.type != "cpu" else CHUNK_ELEMENTS // 128
    size = max(256, elements // len(weight_VD) // 256 * 256)
    chunks = -(-len(x_TD) // size)
    return -(-len(x_TD) // chunks)  # equal chunks: one shape for the compiler


def _add_product(total_VD: Tensor, dlogits_CV: Tensor, x_CD: Tensor) -> None:
    if total_VD.dtype == x_CD.dtype:
        total_VD.addmm_(dlogits_CV.mT, x_CD)
    elif multiplies_wide(dlogits_CV, x_CD):
        add_wide_product(total_VD, dlogits_CV.mT, x_CD)
    else:
        total_VD += dlogits_CV.mT @ x_CD


def _softmax(logits_CV: Tensor, target_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Scaled sum of nats, and its gradient in the dtype of the logits."""
    wide_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
    counts_C = target_C >= 0
    log_C = torch.logsumexp(wide_CV, dim=1)
    place_C1 = target_C.clamp(min=0)[:, None]
    nats_C = (log_C - wide_CV.gather(1, place_C1)[:, 0]).where(counts_C, 0.0)
    factor_C1 = torch.where(counts_C, scale, 0.0).to(wide_CV.dtype)[:, None]
    column_V = torch.arange(wide_CV.shape[1], device=wide_CV.device)
    chance_CV = (wide_CV - log_C[:, None]).exp()
    dlogits_CV = torch.where(column_V == place_C1, chance_CV - 1, chance_CV) * factor_C1
    return nats_C.sum() * scale, dlogits_CV.to(logits_CV.dtype)


def _softmax_eager(logits_CV: Tensor, target_C: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_softmax` with three passes over the logits and no copy: they are overwritten."""
    if logits_CV.dtype not in (torch.float32, torch.float64):
        return _softmax(logits_CV, target_C, scale)
    counts_C = target_C >= 0
    log_CV = F.log_softmax(logits_CV, dim=1)
    place_C1 = target_C.clamp(min=0)[:, None]
    nats_C = -log_CV.gather(1, place_C1)[:, 0].where(counts_C, torch.zeros_like(log_CV[:, 0]))
    factor_C1 = counts_C.to(log_CV.dtype)[:, None] * scale
    dlogits_CV = log_CV.exp_().mul_(factor_C1)
    dlogits_CV.scatter_add_(1, place_C1, -factor_C1)
    return nats_C.sum() * scale, dlogits_CV


@cache
def _softmax_step(compile: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_softmax, dynamic=False) if compile else _softmax_eager
