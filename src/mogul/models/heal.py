"""Heal a regrouped model: teach only its routers to give the original's answers.

A module for the training loop: its loss is the KL of the original's next-token distribution
against the student's, in nats a token; everything but the routers is frozen, so the experts, the
groups and the shapes stay as they are.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from mogul.core.errors import ConfigError


class Healing(nn.Module):
    """Student and original in one module; `parameters()` that ask for a gradient are routers'."""

    def __init__(self, student: nn.Module, original: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._original = [original]  # in a list: no submodule, so not trained, saved or moved
        routers = {
            id(parameter)
            for module in student.modules()
            if type(module).__name__.endswith("Router")
            for parameter in module.parameters()
        }
        if not routers:
            raise ConfigError("the model has no routers to heal", fix="heal a regrouped model")
        for parameter in student.parameters():
            parameter.requires_grad_(id(parameter) in routers)

    def train(self, mode: bool = True) -> Healing:
        """Switch the student alone; the original stays in evaluation mode."""
        super().train(mode)
        self._original[0].eval()
        return self

    def forward(
        self, input_ids: Int[Tensor, "B L"], labels: Tensor | None = None, use_cache: bool = False
    ) -> Any:
        """Return an object with `.loss`; labels are not used."""
        student: Any = self.student(input_ids=input_ids, use_cache=use_cache)
        with torch.no_grad():
            original: Any = self._original[0](input_ids=input_ids, use_cache=False)
        log_BLV = student.logits.float().log_softmax(-1)
        want_BLV = original.logits.float().log_softmax(-1)
        divergence = F.kl_div(log_BLV, want_BLV, reduction="sum", log_target=True)
        return SimpleNamespace(loss=divergence / input_ids.numel())
