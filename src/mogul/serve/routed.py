"""Which experts the tokens of a step were sent to, read where every family shows it.

The experts module of each layer is called with the picked ids; a hook keeps them, of one runner's
steps. Off until asked for: without a reader nothing is hooked and nothing is copied.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mogul.core.errors import BackendError
from mogul.observe.hooks import Picks, moe_blocks, watch
from mogul.serve import attention


class ExpertTap:
    """Keeps the picks of the last step, layer by layer."""

    def __init__(self, model: Any, owner: int) -> None:
        self.model = model
        self.owner = owner
        self._open: ExitStack | None = None
        self._picks: list[Tensor] = []
        try:
            self.num_layers = len(moe_blocks(model))
        except BackendError:
            self.num_layers = 0

    @property
    def is_open(self) -> bool:
        """Whether picks are being kept."""
        return self._open is not None

    def open(self) -> None:
        """Start keeping picks.

        Raises:
            BackendError: the model has no experts.
        """
        if self._open is None:
            stack = ExitStack()
            stack.enter_context(watch(self.model, self._see))
            self._open = stack

    def close(self) -> None:
        """Stop; the model is as it was."""
        if self._open is not None:
            self._open.close()
            self._open = None
        self._picks = []

    def _see(self, picks: Picks) -> None:
        if attention.running_slots(self.owner) is not None:
            self._picks.append(picks.ids)

    def start(self) -> None:
        """Forget the last step."""
        self._picks = []

    def picks(self) -> Tensor | None:
        """Picks of the last step, [T, layers, K] on the device; -1 where a layer picked fewer."""
        if not self._picks:
            return None
        width = max(ids.shape[1] for ids in self._picks)
        padded = [
            torch.nn.functional.pad(i, (0, width - i.shape[1]), value=-1) for i in self._picks
        ]
        return torch.stack(padded, dim=1)


def distinct_experts(picks_TLK: np.ndarray, num_tokens: int) -> np.ndarray:
    """Distinct experts of each layer among the first tokens of a step, [L]."""
    layers = picks_TLK[:num_tokens].transpose(1, 0, 2).reshape(picks_TLK.shape[1], -1)
    return np.array([len(np.unique(ids[ids >= 0])) for ids in layers])
