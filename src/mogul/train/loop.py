"""The training loop. There is one.

It takes a model whose forward returns its whole loss (auxiliary losses included), an iterator of
token batches and settings; it steps until the settings say stop and returns a record of what
happened. It runs in one process on one device; a mesh of another size is refused, not ignored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mogul.core.errors import ConfigError, MogulError
from mogul.core.log import ProgressBar, progress
from mogul.train.optimizer import TrainSettings, build_optimizer, holds_parameters_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """What one training did."""

    steps: int
    tokens: int
    """Tokens in the batches seen; padding does not occur."""
    seconds: float
    losses: tuple[float, ...]
    """The model's whole loss before each step, auxiliary losses included."""
    grad_norms: tuple[float, ...]
    """Norm over all parameters before clipping."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens seen over wall-clock seconds."""
        return self.tokens / self.seconds if self.seconds else 0.0


def train(
    model: nn.Module,
    batches: Iterator[Int[Tensor, "B L"]],
    settings: TrainSettings,
    *,
    mesh: DeviceMesh | None = None,
    description: str = "train",
) -> TrainRecord:
    """Train in place until `settings` say stop; the model is left in evaluation mode.

    Args:
        model: A causal language model of Transformers: `model(input_ids, labels=...)` has `.loss`.
        batches: Token ids; each batch is input and label at once.
        settings: Optimizer, schedule and the end.
        mesh: Devices to train on; only one device is built today.
        description: What the progress line calls this training.

    Raises:
        ConfigError: A mesh of more than one device, or nothing to train.
        MogulError: The loss stopped being finite, naming the step, or the batches ran out.
    """
    if mesh is not None and mesh.size() != 1:
        raise ConfigError(
            f"training on a mesh of {mesh.size()} devices is not built", fix="use one process"
        )
    optimizer = build_optimizer(model, settings)
    assert holds_parameters_of(optimizer, model)
    model.train()
    # Progress counts what ends the run: seconds where given, else steps.
    total = settings.max_seconds if settings.max_seconds is not None else settings.max_steps
    try:
        with progress(description, total) as bar:
            return _run(model, optimizer, batches, settings, bar)
    finally:
        optimizer.zero_grad(set_to_none=True)
        model.eval()


def _run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    settings: TrainSettings,
    bar: ProgressBar,
) -> TrainRecord:
    losses: list[float] = []
    norms: list[float] = []
    tokens = 0
    start_s = time.perf_counter()
    seconds = 0.0
    while not _is_over(settings, len(losses), seconds):
        step = len(losses)
        batch = next(batches, None)
        if batch is None:
            raise MogulError(f"the batches ran out at step {step}", fix="give more text or steps")
        loss, norm = _step(model, optimizer, batch, settings, step)
        losses.append(loss)
        norms.append(norm)
        tokens += batch.numel()
        seconds = time.perf_counter() - start_s
        done = seconds if settings.max_seconds is not None else len(losses)
        note = f"step {len(losses)}, loss {loss:.3f}, {tokens / seconds:.0f} tokens/s"
        bar.update(min(done, bar.total or done), note)
    return TrainRecord(
        steps=len(losses),
        tokens=tokens,
        seconds=seconds,
        losses=tuple(losses),
        grad_norms=tuple(norms),
    )


def _is_over(settings: TrainSettings, steps: int, seconds: float) -> bool:
    if settings.max_steps is not None and steps >= settings.max_steps:
        return True
    return settings.max_seconds is not None and seconds >= settings.max_seconds


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Tensor,
    settings: TrainSettings,
    step: int,
) -> tuple[float, float]:
    """One forward, backward and update; returns the loss and the gradient norm."""
    for group in optimizer.param_groups:
        group["lr"] = settings.lr_at(step)
    ids_BL = batch.to(next(model.parameters()).device)
    loss: Any = model(input_ids=ids_BL, labels=ids_BL, use_cache=False).loss
    value = float(loss.detach())
    if not math.isfinite(value):
        raise MogulError(
            f"the loss is {value} at step {step}; the weights before this step are kept",
            fix="lower the learning rate, raise warmup_steps, or look at the batch of this step",
        )
    loss.backward()
    # A wrapper that swaps parameters in the forward would train copies nobody reads.
    assert step or holds_parameters_of(optimizer, model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm))
    if not math.isfinite(norm):
        raise MogulError(
            f"the gradient norm is {norm} at step {step}; the weights before this step are kept",
            fix="lower the learning rate or raise warmup_steps",
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return value, norm
