"""An even random sample of tokens with all their picks: bottom-k by random key.

Keys are drawn on the host, so only the few tokens that enter are fetched from the device. The
smallest keys of two samples together are the sample of both, so samples merge exactly.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor


class TokenSample:
    """The `limit` tokens with the smallest keys so far."""

    def __init__(self, limit: int, *, seed: int, salt: str = "") -> None:
        self.limit = limit
        digest = hashlib.sha256(f"{seed} {salt}".encode()).digest()
        self._rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
        self._keys = np.zeros(0, dtype=np.uint64)
        self._tasks = np.zeros(0, dtype=np.int64)
        self._ids: list[Tensor] = []

    def add(self, ids: Int[Tensor, "L T K"], task: np.ndarray | None = None) -> None:
        """Draw a key for every token and keep those that belong in the sample."""
        num_tokens = ids.shape[1]
        key_T = self._rng.integers(0, 2**62, num_tokens, dtype=np.uint64)
        bound = np.partition(self._keys, self.limit - 1)[self.limit - 1] if self._is_full else None
        chosen = np.arange(num_tokens) if bound is None else np.flatnonzero(key_T < bound)
        if not len(chosen):
            return
        index = torch.from_numpy(chosen).to(ids.device)
        self._ids.append(ids.index_select(1, index).transpose(0, 1).to(torch.int16))
        self._keys = np.concatenate([self._keys, key_T[chosen]])
        tasks = np.zeros(len(chosen), np.int64) if task is None else task[chosen]
        self._tasks = np.concatenate([self._tasks, tasks])
        if len(self._keys) > 4 * self.limit:
            self._cut()

    @property
    def _is_full(self) -> bool:
        return len(self._keys) >= self.limit

    def _cut(self) -> None:
        order = np.argsort(self._keys, kind="stable")[: self.limit]
        ids = torch.cat(self._ids)
        self._ids = [ids.index_select(0, torch.from_numpy(order).to(ids.device))]
        self._keys, self._tasks = self._keys[order], self._tasks[order]

    def arrays(self, num_layers: int, top_k: int) -> dict[str, np.ndarray]:
        """The sample, smallest key first."""
        if not self._ids:
            ids = np.zeros((0, num_layers, top_k), dtype=np.int64)
        else:
            self._cut()
            ids = self._ids[0].cpu().numpy().astype(np.int64)
        return {"sample_key": self._keys, "sample_ids": ids, "sample_task": self._tasks}
