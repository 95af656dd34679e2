"""AdamW with decay groups and a learning-rate schedule: how parameters are stepped.

Matrices and stacks of matrices decay; vectors (norms, biases, scales) and embeddings do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec


class TrainSettings(Spec):
    """How a model is trained; what it is trained on comes as batches."""

    lr: float = Field(default=3e-4, gt=0)
    """Peak learning rate."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of AdamW's first and second moments."""

    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of AdamW's second moment."""

    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay of matrices; vectors and embeddings never decay."""

    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly to its peak."""

    schedule: Literal["constant", "cosine"] = "constant"
    """After the warm-up: stay, or fall to `final_lr_ratio` at `max_steps`."""

    final_lr_ratio: float = Field(default=0.1, ge=0, le=1)
    """Where the cosine ends, as a share of the peak."""

    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this norm over all parameters."""

    max_steps: int | None = Field(default=None, ge=1)
    """Stop after so many steps."""

    max_seconds: float | None = Field(default=None, gt=0)
    """Stop with the first step that ends after so many seconds."""

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.max_steps is None and self.max_seconds is None:
            raise ConfigError(
                "a training without max_steps and max_seconds never ends", fix="give one of them"
            )
        if self.schedule == "cosine" and self.max_steps is None:
            raise ConfigError(
                "a cosine schedule needs max_steps: it must know where it ends",
                fix="give max_steps, or use schedule 'constant'",
            )
        return self

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant" or self.max_steps is None:
            return self.lr
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return self.lr * (self.final_lr_ratio + (1 - self.final_lr_ratio) * cosine)


def build_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW over the parameters that ask for a gradient, in two decay groups.

    Call it before the first forward: a sharded model may swap its parameters in a forward.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError(
            "no parameter of the model asks for a gradient", fix="set requires_grad on some"
        )
    decays = [p for p in trained if p.ndim >= 2 and id(p) not in embeddings]
    stays = [p for p in trained if p.ndim < 2 or id(p) in embeddings]
    return torch.optim.AdamW(
        [
            {"params": decays, "weight_decay": settings.weight_decay},
            {"params": stays, "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )


def holds_parameters_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> bool:
    """Whether the optimizer steps exactly the model's current trained parameters."""
    held: Iterable[nn.Parameter] = (p for group in optimizer.param_groups for p in group["params"])
    current = {id(p) for p in model.parameters() if p.requires_grad}
    return {id(p) for p in held} == current
