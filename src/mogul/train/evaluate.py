"""Held-out loss: mean cross-entropy of the next token, without auxiliary losses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mogul.core.log import progress
from mogul.train.data import Windows


@dataclass(frozen=True, kw_only=True)
class HeldOutLoss:
    """The loss of a model on text it was not trained on."""

    nats_per_token: float
    bits_per_byte: float
    """Independent of the tokenizer."""
    tokens: int
    """Tokens predicted: all but the first of each window."""


def held_out_loss(
    model: nn.Module, windows: Windows, *, batch_size: int = 4, description: str = "held-out loss"
) -> HeldOutLoss:
    """Mean next-token loss over windows, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    nats = 0.0
    device = next(model.parameters()).device
    try:
        with torch.inference_mode(), progress(description, len(windows)) as bar:
            for first in range(0, len(windows), batch_size):
                rows = windows.ids[first : first + batch_size]
                ids_BL = torch.from_numpy(rows).to(device)
                model_output: Any = model(input_ids=ids_BL, use_cache=False)
                logits_BLV = model_output.logits[:, :-1].float()
                target_BL = ids_BL[:, 1:]
                nats += float(
                    functional.cross_entropy(
                        logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="sum"
                    )
                )
                bar.advance(len(rows))
    finally:
        model.train(was_training)
    tokens = windows.ids[:, 1:].size
    num_bytes = int(windows.bytes_per_token[:, 1:].sum())
    return HeldOutLoss(
        nats_per_token=nats / tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        tokens=tokens,
    )
