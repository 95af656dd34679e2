"""The order in which a run sees its data: a pure function of seed, window length and position.

A source is a ring of tokens. In epoch e it is cut into windows that start at an offset drawn for
(seed, source, e) and are visited in a permutation drawn for the same: each token is seen once an
epoch, but for the last tokens // L rest. Sources are interleaved so that after every window each
has its share to within one window. A state is the number of windows taken from each source, so a
run goes on inside an epoch, with another batch size or number of ranks if need be.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.data.shards import TokenManifest, open_shard, read_manifest, verify
from mogul.train.data.spec import DataSpec, Part

STATE_VERSION = 1


class Ring:
    """The tokens of one part of one folder, end joined to start."""

    def __init__(self, folder: Path, part: Part, *, check: bool) -> None:
        self.folder = folder
        self.manifest: TokenManifest = read_manifest(folder)
        if check:
            verify(folder, self.manifest, part)
        shards = self.manifest.of(part)
        if not shards:
            raise ConfigError(
                f"{folder} has no tokens in its part {part!r}",
                fix="build it with a larger held-out share, or read another part",
            )
        self._arrays = [open_shard(folder, shard, self.manifest.vocab_size) for shard in shards]
        self._ends = np.cumsum([len(array) for array in self._arrays])
        self.checksums = [shard.sha256 for shard in shards]

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, start: int, length: int) -> Int[np.ndarray, " L"]:
        """`length` ids from `start` on, past the end into the start."""
        out = np.empty(length, dtype=np.int64)
        done = 0
        while done < length:
            position = (start + done) % len(self)
            shard = int(np.searchsorted(self._ends, position, side="right"))
            array = self._arrays[shard]
            first = position - int(self._ends[shard]) + len(array)
            piece = array[first : first + length - done]
            out[done : done + len(piece)] = piece
            done += len(piece)
        return out


class _Order:
    """Which window of a ring comes n-th."""

    def __init__(self, ring: Ring, number: int, length: int, seed: int) -> None:
        self.ring, self.length = ring, length
        self._key = (seed, number)
        self.windows_per_epoch = len(ring) // length
        if not self.windows_per_epoch:
            raise ConfigError(
                f"{ring.folder} has {len(ring)} tokens, fewer than one window of {length}",
                fix="use shorter windows or more text",
            )
        self._epoch = -1
        self._offset = 0
        self._permutation = np.empty(0, np.int64)

    def window(self, taken: int) -> Int[np.ndarray, " L"]:
        """The window that follows `taken` others."""
        epoch, position = divmod(taken, self.windows_per_epoch)
        if epoch != self._epoch:
            rng = np.random.default_rng((*self._key, epoch))
            self._offset = int(rng.integers(len(self.ring)))
            self._permutation = rng.permutation(self.windows_per_epoch)
            self._epoch = epoch
        start = self._offset + int(self._permutation[position]) * self.length
        return self.ring.read(start % len(self.ring), self.length)


class TokenStream:
    """Endless batches of token ids [B, L]; open one with `open_stream`."""

    def __init__(
        self,
        rings: Sequence[Ring],
        weights: Sequence[float],
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        self.batch_size, self.sequence_length, self.seed = batch_size, sequence_length, seed
        self.rank, self.num_ranks = rank, num_ranks
        self.vocab_size = max(ring.manifest.vocab_size for ring in rings)
        self._rings = rings
        self._orders = [_Order(r, i, sequence_length, seed) for i, r in enumerate(rings)]
        self._share = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._taken = np.zeros(len(rings), dtype=np.int64)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Int[Tensor, "B L"]:
        rows = []
        for place in range(self.batch_size * self.num_ranks):
            source = self._next_source()
            if place // self.batch_size == self.rank:
                rows.append(self._orders[source].window(int(self._taken[source])))
            self._taken[source] += 1
        return torch.from_numpy(np.stack(rows))

    def _next_source(self) -> int:
        """The source that is furthest behind its share; the first of equals."""
        behind = self._share * (self._taken.sum() + 1) - self._taken
        return int(behind.argmax())

    @property
    def epochs(self) -> float:
        """How often the least repeated source has been read."""
        per_epoch = np.array([order.windows_per_epoch for order in self._orders])
        return float((self._taken / per_epoch).min())

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens in the windows of one epoch of every source."""
        return sum(order.windows_per_epoch * self.sequence_length for order in self._orders)

    def state(self) -> dict[str, Any]:
        """Where the stream stands, for JSON."""
        return {
            "version": STATE_VERSION,
            "seed": self.seed,
            "sequence_length": self.sequence_length,
            "shares": [float(share) for share in self._share],
            "checksums": [ring.checksums for ring in self._rings],
            "taken": [int(count) for count in self._taken],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; ConfigError when it belongs to other data or order."""
        own = self.state()
        for key in ("version", "seed", "sequence_length", "shares", "checksums"):
            if state.get(key) != own[key]:
                raise ConfigError(
                    f"the data of the checkpoint differ in {key!r}"
                    + (f": {state.get(key)} there, {own[key]} here" if key != "checksums" else ""),
                    fix="resume with the recipe and the token folders of the checkpoint",
                )
        taken = state.get("taken")
        if not isinstance(taken, list) or len(taken) != len(self._taken) or min(taken) < 0:
            raise ArtifactError(f"the state of the data is damaged: taken = {taken!r}")
        self._taken = np.asarray(taken, dtype=np.int64)


def open_stream(
    spec: DataSpec,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
) -> TokenStream:
    """Open the token folders of a run.

    Args:
        spec: folders, weights and the part to read.
        batch_size: windows a batch (B), on this rank.
        sequence_length: tokens a window (L), at least 2; windows run over document ends.
        seed: fixes offsets and permutations.
        rank: this process; every rank draws from one global order.
        num_ranks: processes that share the data.

    Raises:
        ArtifactError: a shard is missing or damaged, by name.
        ConfigError: too little text for a window, or folders of different vocabularies.
    """
    if batch_size < 1 or sequence_length < 2 or not 0 <= rank < num_ranks:
        raise ConfigError(
            f"batches of {batch_size} windows of {sequence_length} tokens for rank {rank} of "
            f"{num_ranks} cannot be",
            fix="use at least 1 window of at least 2 tokens",
        )
    rings = [Ring(Path(source.path), spec.part, check=spec.verify) for source in spec.sources]
    sizes = {ring.manifest.vocab_size: ring.folder for ring in rings}
    if len(sizes) > 1:
        told = ", ".join(f"{folder} has {size}" for size, folder in sizes.items())
        raise ConfigError(
            f"the token folders have different vocabularies: {told}",
            fix="build them with one tokenizer",
        )
    weights = [
        float(len(ring)) if source.weight is None else source.weight
        for ring, source in zip(rings, spec.sources, strict=True)
    ]
    return TokenStream(
        rings,
        weights,
        batch_size=batch_size,
        sequence_length=sequence_length,
        seed=seed,
        rank=rank,
        num_ranks=num_ranks,
    )
