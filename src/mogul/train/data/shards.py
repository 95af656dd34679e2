"""Token shards on disk: raw little-endian ids in files, and `tokens.json` that vouches for them.

A folder has the parts `train` and `held_out`, each a run of documents with the end-of-text id
after each, cut into shards at document ends. Ids are uint16 where the vocabulary allows it, else
uint32. The manifest holds the checksum of every file, so a damaged shard is named before a model
sees it. Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from pydantic import Field

from mogul.core.errors import ArtifactError
from mogul.core.files import read_object
from mogul.core.log import progress
from mogul.spec.base import Spec
from mogul.train.data.spec import Part

MANIFEST = "tokens.json"
TOKEN_BYTES = "token_bytes.bin"
TOKENIZER = "tokenizer"
BLOCK_BYTES = 1 << 24


def dtype_for(vocab_size: int) -> np.dtype:
    """The narrowest unsigned type that holds every id below `vocab_size`."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


class Shard(Spec):
    """One file of token ids."""

    file: str = Field(pattern=r"^[\w.-]+$")
    part: Part
    tokens: int = Field(ge=1)
    documents: int = Field(ge=0)
    text_bytes: int = Field(ge=0)
    """Bytes of UTF-8 that these tokens stand for."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class TokenManifest(Spec):
    """What a token folder holds and where it came from."""

    version: int = Field(default=1, ge=1, le=1)
    vocab_size: int = Field(ge=2)
    end_of_text_id: int | None
    byte_level: bool
    """Every token stands for a fixed number of bytes, listed in `token_bytes.bin`."""
    shards: tuple[Shard, ...]
    sources: tuple[str, ...]
    """The names of the inputs, in the order they were read."""
    held_out: float
    duplicates: int = 0
    """Documents left out because an equal one stood before."""

    def of(self, part: Part) -> tuple[Shard, ...]:
        """The shards of one part, in order."""
        return tuple(shard for shard in self.shards if shard.part == part)


def read_manifest(folder: Path) -> TokenManifest:
    """Read `tokens.json`; ArtifactError where there is none, or a broken one."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ArtifactError(
            f"{folder} holds no {MANIFEST}" if folder.exists() else f"{folder} does not exist",
            fix=f"make it with `mogul data build TEXT --out {folder}`, or name one that is made",
        )
    content = read_object(file, fix="build the folder again")
    return TokenManifest.parse(content, where=str(file))


def open_shard(folder: Path, shard: Shard, vocab_size: int) -> np.ndarray:
    """Map one shard into memory; ArtifactError when it is missing or has another length."""
    file, dtype = folder / shard.file, dtype_for(vocab_size)
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", fix="copy or build the folder again")
    if (size := file.stat().st_size) != shard.tokens * dtype.itemsize:
        raise ArtifactError(
            f"{file} has {size} bytes instead of {shard.tokens * dtype.itemsize}: it is cut off "
            "or damaged",
            fix="copy or build the folder again",
        )
    return np.memmap(file, dtype=dtype, mode="r")


def sha256_of(file: Path) -> str:
    """The checksum of a file, read in blocks."""
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while block := handle.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def verify(folder: Path, manifest: TokenManifest, part: Part | None = None) -> None:
    """Compare the shards of one part (or of all) with their checksums; name the first bad one."""
    shards = manifest.shards if part is None else manifest.of(part)
    with progress(f"checking {folder.name}", sum(shard.tokens for shard in shards)) as bar:
        for shard in shards:
            open_shard(folder, shard, manifest.vocab_size)
            if sha256_of(folder / shard.file) != shard.sha256:
                raise ArtifactError(
                    f"{folder / shard.file} does not match its checksum in {MANIFEST}: it is "
                    "damaged",
                    fix="copy or build the folder again",
                )
            bar.advance(shard.tokens, shard.file)
