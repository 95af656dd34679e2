"""One optimizer step: micro-batches in, summed gradients, one look at loss and norm, update.

The host waits for the device once a step, between gradients and update: what it launches next is
the update, long enough for it to get ahead again. A step whose loss or norm is no number changes
nothing: neither weights nor optimizer state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mogul.train.muon_adamw import MuonAdamW
from mogul.train.objective import Objective, model_loss
from mogul.train.optimizer import refuse_stale


@dataclass(frozen=True)
class Gradients:
    """What the backward passes of one step left."""

    loss: float
    """Mean over the micro-batches, before the update."""
    norm: float
    """Over all parameters, before clipping."""
    tensors: tuple[Tensor | None, ...]
    """One a parameter of the optimizer, in its order."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Stepper:
    """Runs the steps of one model and one optimizer.

    Args:
        model: stays in the mode it is in.
        optimizer: over the model's parameters; refused once they are not the model's any more.
        objective: what is minimised.
        max_grad_norm: gradients above are scaled down to it.
        wide_sums: sum the gradients of low-precision weights over micro-batches in float32.
        around: opened around every forward (autocast, attention kernels).
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: MuonAdamW,
        objective: Objective = model_loss,
        *,
        max_grad_norm: float = 1.0,
        wide_sums: bool = True,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        refuse_stale(optimizer, model)
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.max_grad_norm, self.wide_sums, self.around = max_grad_norm, wide_sums, around
        self.device = next(model.parameters()).device
        self._checked = False

    def gradients(self, micro_batches: Sequence[Int[Tensor, "B L"]]) -> Gradients:
        """Forward and backward over all micro-batches; their mean is differentiated."""
        share = 1.0 / len(micro_batches)
        sums = _WideSums(self.optimizer.parameters, self._sums_wide(len(micro_batches)))
        total: Tensor | float = 0.0
        try:
            for batch in micro_batches:
                ids_BL = batch.to(self.device, non_blocking=True)
                with self.around():
                    loss = self.objective(self.model, ids_BL)
                (loss * share).backward() if share < 1 else loss.backward()
                total = total + loss.detach() * share
        finally:
            tensors = sums.close()
        if not self._checked:  # a wrapper may swap parameters in its first forward
            refuse_stale(self.optimizer, self.model)
            self._checked = True
        norm = _norm([one for one in tensors if one is not None])
        loss_value, norm_value = torch.stack(
            [torch.as_tensor(total, device=norm.device, dtype=norm.dtype), norm]
        ).tolist()
        return Gradients(loss_value, norm_value, tensors)

    def _sums_wide(self, num_batches: int) -> bool:
        return self.wide_sums and num_batches > 1

    def update(self, gradients: Gradients, lr: float) -> None:
        """Clip and step at this learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        factor = min(1.0, self.max_grad_norm / (gradients.norm + 1e-6))
        self.optimizer.update(gradients.tensors, factor)
        self.clear()

    def clear(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class _WideSums:
    """Takes each low-precision gradient as soon as it is whole, and adds it in float32."""

    def __init__(self, parameters: Sequence[nn.Parameter], is_on: bool) -> None:
        self.parameters = parameters
        self.sums: dict[nn.Parameter, Tensor] = {}
        low = [p for p in parameters if p.dtype in (torch.bfloat16, torch.float16)] * is_on
        self.handles = [p.register_post_accumulate_grad_hook(self._take) for p in low]

    def _take(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        if parameter in self.sums:
            self.sums[parameter] += parameter.grad
        else:
            self.sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def close(self) -> tuple[Tensor | None, ...]:
        """The gradients of all parameters."""
        for handle in self.handles:
            handle.remove()
        return tuple(self.sums.get(p, p.grad) for p in self.parameters)


@torch.no_grad()
def _norm(tensors: list[Tensor]) -> Tensor:
    """Root of the sum of all squares, in at least float32."""
    norms: list[Tensor] = []  # one launch a dtype, not one a tensor
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):  # a set has no order
        wide = torch.promote_types(dtype, torch.float32)
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        each: Any = torch.ops.aten._foreach_norm.Scalar(same, 2.0, wide)
        norms.append(torch.stack(list(each)).double())
    return torch.linalg.vector_norm(torch.cat(norms))
