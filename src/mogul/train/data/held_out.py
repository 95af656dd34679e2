"""The held-out part of a token folder as windows, with the bytes of every token.

Bits per byte need the bytes that each predicted token stands for. A byte-level tokenizer has a
fixed number for every token, listed in the folder; for others the mean of the part is used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mogul.core.errors import ArtifactError, ConfigError
from mogul.train.data.shards import TOKEN_BYTES, TokenManifest, read_manifest
from mogul.train.data.spec import DataSpec
from mogul.train.data.stream import Ring
from mogul.train.data.windows import Windows


def held_out_windows(spec: DataSpec, length: int, *, count: int | None = None) -> Windows:
    """Windows of the held-out part of every source that has one, in the order of the sources.

    Args:
        spec: the folders; its `part` and weights are not looked at.
        length: tokens a window (L).
        count: only so many, evenly spaced over all.

    Raises:
        ConfigError: no folder has a held-out part that fills one window.
    """
    folders = [Path(source.path) for source in spec.sources]
    holding = [folder for folder in folders if read_manifest(folder).of("held_out")]
    parts = [_windows_of(one, length, check=spec.verify) for one in holding or folders[:1]]
    windows = Windows(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.bytes_per_token for part in parts]),
    )
    if not len(windows):
        raise ConfigError(
            f"the held-out parts do not fill one window of {length} tokens",
            fix="use shorter windows, or build with a larger held-out share",
        )
    return windows if count is None else windows.spread(min(count, len(windows)))


def _windows_of(folder: Path, length: int, *, check: bool) -> Windows:
    ring = Ring(folder, "held_out", check=check)
    whole = len(ring) // length * length
    ids = ring.read(0, whole).reshape(-1, length)
    return Windows(ids, _bytes_of_token(folder, ring.manifest)[ids])


def _bytes_of_token(folder: Path, manifest: TokenManifest) -> np.ndarray:
    """Bytes each id stands for, [V]; float where only the mean is known."""
    if not manifest.byte_level:
        shards = manifest.of("held_out")
        mean = sum(shard.text_bytes for shard in shards) / sum(shard.tokens for shard in shards)
        return np.full(manifest.vocab_size, mean)
    file = folder / TOKEN_BYTES
    sizes = np.fromfile(file, dtype="<u4") if file.is_file() else np.empty(0)
    if len(sizes) != manifest.vocab_size:
        raise ArtifactError(
            f"{file} has {len(sizes)} entries for a vocabulary of {manifest.vocab_size}",
            fix="copy or build the folder again",
        )
    return sizes.astype(np.int64)
