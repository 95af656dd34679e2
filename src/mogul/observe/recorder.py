"""Record which experts a model picks, forward by forward, as plain ids.

For short looks at a model; `observe.tracer` counts what long runs do. Ids stay on their device
until the recording is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from mogul.core.errors import MogulError
from mogul.observe.hooks import Picks, watch


class Recording:
    """Picked ids of every layer, one array a forward; read it any time."""

    def __init__(self) -> None:
        self._ids: dict[int, list[Tensor]] = {}

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers with experts."""
        return tuple(self._ids)

    def forwards(self, layer: int) -> list[Int[np.ndarray, "T K"]]:
        """The picks of one layer, one array for each forward."""
        return [ids.cpu().numpy().astype(np.int64) for ids in self._ids[layer]]

    def ids(self) -> Int[np.ndarray, "layers T K"]:
        """All picks, the tokens of all forwards in a row.

        Raises:
            MogulError: Nothing was recorded.
        """
        if not all(self._ids.values()):
            raise MogulError(
                "nothing was recorded: no forward ran inside record_routing",
                fix="run the model inside the with block",
            )
        return np.stack([np.concatenate(self.forwards(layer)) for layer in self._ids])

    def clear(self) -> None:
        """Forget what was recorded so far; the hooks stay."""
        for ids in self._ids.values():
            ids.clear()


@contextmanager
def record_routing(model: nn.Module) -> Iterator[Recording]:
    """Record the picks of every forward inside the `with` block; hooks go when it ends.

    Recordings may be nested; each sees every forward that runs while it is open. Under gradient
    checkpointing a layer runs twice in training and is recorded twice.

    Raises:
        BackendError: The model has no experts, or shows its picks nowhere.
    """
    recording = Recording()

    def keep(picks: Picks) -> None:
        recording._ids[picks.layer].append(picks.ids.to(torch.int16))

    with watch(model, keep) as blocks:
        recording._ids.update({block.layer: [] for block in blocks})
        yield recording
