"""Heal a regrouped model: teach only its routers to give the original's answers.

A module for the training loop: its loss is the KL of the original's next-token distribution
against the student's plus a share of the text's own loss, in nats a token. Everything but the
routers is frozen, so the experts, the groups and the shapes stay as they are.

Why the text's share: a pick that changes is a jump the gradient does not see, and for the KL the
copied routers stand near a minimum already; from there it takes back a tenth of the lost loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from mogul.core.errors import ConfigError


def routers_of(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model's routers."""
    return [
        parameter
        for module in model.modules()
        if type(module).__name__.endswith("Router")
        for parameter in module.parameters()
    ]


class Healing(nn.Module):
    """Student and original in one module; `parameters()` that ask for a gradient are routers'."""

    def __init__(self, student: nn.Module, original: nn.Module, label_weight: float = 0.5) -> None:
        """`label_weight`: the text's share of the loss; 0 asks for the original's answers only."""
        super().__init__()
        self.student = student
        self.label_weight = label_weight
        self._original = [original]  # in a list: no submodule, so not trained, saved or moved
        routers = {id(parameter) for parameter in routers_of(student)}
        if not routers:
            raise ConfigError("the model has no routers to heal", fix="heal a regrouped model")
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in routers)
        # Steps of a bf16 weight would be rounded away.
        self._dtypes = [parameter.dtype for parameter in routers_of(student)]
        for parameter in routers_of(student):
            parameter.data = parameter.data.float()

    def finish(self) -> None:
        """Give the routers their dtype back and let everything train again."""
        for parameter, dtype in zip(routers_of(self.student), self._dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
        self.student.requires_grad_(True)

    def train(self, mode: bool = True) -> Healing:
        """Switch the student alone; the original stays in evaluation mode."""
        super().train(mode)
        self._original[0].eval()
        return self

    def forward(
        self, input_ids: Int[Tensor, "B L"], labels: Tensor | None = None, use_cache: bool = False
    ) -> Any:
        """Return an object with `.loss`; the labels are the input itself."""
        student: Any = self.student(input_ids=input_ids, use_cache=use_cache)
        with torch.no_grad():
            original: Any = self._original[0](input_ids=input_ids, use_cache=False)
        log_BLV = student.logits.float().log_softmax(-1)
        want_BLV = original.logits.float().log_softmax(-1)
        divergence = F.kl_div(log_BLV, want_BLV, reduction="sum", log_target=True)
        loss = divergence / input_ids.numel()
        if self.label_weight:
            loss = loss + self.label_weight * F.nll_loss(
                log_BLV[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten()
            )
        return SimpleNamespace(loss=loss)


class BestRouters:
    """Keeps the routers that did best on windows neither trained on nor reported on.

    Wraps the batches: before every `every`-th the loss on the windows is taken. `restore` puts the
    best back, the routers before healing among them, so that healing cannot do harm there.
    """

    def __init__(
        self, healing: Healing, windows: Callable[[], Iterator[Tensor]], every: int
    ) -> None:
        self.healing, self.windows, self.every = healing, windows, every
        self.losses: list[float] = []
        self._best: list[Tensor] = []

    def batches(self, source: Iterator[Tensor]) -> Iterator[Tensor]:
        """The same batches."""
        for step, batch in enumerate(source):
            if step % self.every == 0:
                self.look()
            yield batch

    @torch.no_grad()
    def look(self) -> None:
        """Take the loss and keep the routers if it is the lowest."""
        was_training = self.healing.training
        self.healing.eval()
        device = next(self.healing.parameters()).device
        losses = [self.healing(input_ids=ids.to(device)).loss.item() for ids in self.windows()]
        self.healing.train(was_training)
        loss = sum(losses) / len(losses)
        if not self.losses or loss < min(self.losses):
            self._best = [p.detach().clone() for p in routers_of(self.healing.student)]
        self.losses.append(loss)

    @torch.no_grad()
    def restore(self) -> None:
        """Take a last loss and put the best routers back."""
        self.look()
        for parameter, best in zip(routers_of(self.healing.student), self._best, strict=True):
            parameter.copy_(best)
