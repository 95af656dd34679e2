"""A short training in one call: model, batches and settings in, a record of what happened out.

The model's forward returns its whole loss (auxiliary losses included). Steps are those of
`step.py`, which recipes (`session.py`) run as well. One process on one device; a mesh of another
size is refused, not ignored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Int
from torch import Tensor, nn

from mogul.core.errors import ConfigError, MogulError
from mogul.core.log import ProgressBar, progress
from mogul.train.optimizer import TrainSettings, build_optimizer
from mogul.train.step import Gradients, Stepper

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
    refuse_mesh(mesh)
    stepper = Stepper(model, build_optimizer(model, settings), max_grad_norm=settings.max_grad_norm)
    model.train()
    # Progress counts what ends the run: seconds where given, else steps.
    total = settings.max_seconds if settings.max_seconds is not None else settings.max_steps
    try:
        with progress(description, total) as bar:
            return _run(stepper, batches, settings, bar)
    finally:
        stepper.clear()
        model.eval()


def refuse_mesh(mesh: DeviceMesh | None) -> None:
    """Raise ConfigError for a mesh of more than one device."""
    if mesh is not None and mesh.size() != 1:
        raise ConfigError(
            f"training on a mesh of {mesh.size()} devices is not built", fix="use one process"
        )


def _run(
    stepper: Stepper, batches: Iterator[Tensor], settings: TrainSettings, bar: ProgressBar
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
        gradients = stepper.gradients([batch])
        if not gradients.is_finite:
            raise not_finite(gradients, step)
        stepper.update(gradients, settings.lr_at(step))
        losses.append(gradients.loss)
        norms.append(gradients.norm)
        del gradients  # its tensors would lie beside those of the next step
        tokens += batch.numel()
        seconds = time.perf_counter() - start_s
        done = seconds if settings.max_seconds is not None else len(losses)
        note = f"step {len(losses)}, loss {losses[-1]:.3f}, {tokens / seconds:.0f} tokens/s"
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


def not_finite(gradients: Gradients, step: int) -> MogulError:
    """The error of a step whose loss or gradient is no number."""
    if not math.isfinite(gradients.loss):
        return MogulError(
            f"the loss is {gradients.loss} at step {step}; the weights before this step are kept",
            fix="lower the learning rate, raise warmup_steps, or look at the batch of this step",
        )
    return MogulError(
        f"the gradient norm is {gradients.norm} at step {step}; the weights before this step are "
        "kept",
        fix="lower the learning rate or raise warmup_steps",
    )
