"""Make a token folder: documents in, shards, manifest and tokenizer out, whole or not at all.

Two passes at most: one trains the tokenizer on the documents that are not held out, one encodes.
Which documents are held out depends on their content only, so it is the same whatever stands
beside them; `position` holds out the last share of each document instead, for few long ones.
Equal documents are kept once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from mogul.core.errors import ConfigError
from mogul.core.files import atomic_folder
from mogul.core.log import progress
from mogul.spec.base import Spec
from mogul.train.data.documents import documents, size_of
from mogul.train.data.shards import (
    MANIFEST,
    TOKEN_BYTES,
    TOKENIZER,
    Shard,
    TokenManifest,
    dtype_for,
    sha256_of,
)
from mogul.train.data.spec import Part
from mogul.train.data.tokenizing import (
    as_transformers,
    bytes_of_tokens,
    open_tokenizer,
    train_tokenizer,
)
from mogul.train.data.windows import split_by_position

ENCODED_AT_ONCE = 64


class BuildSpec(Spec):
    """What to build a token folder from, and how."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Files, folders, `shipped` or `hf:NAME`, read in this order."""

    tokenizer: str | None = None
    """Checkpoint folder or `tokenizer.json`; None: train one."""

    vocab_size: int = Field(default=16384, ge=2, le=1 << 20)
    """Tokens of the vocabulary that is trained."""

    text_key: str = "text"
    held_out: float = Field(default=0.01, ge=0, lt=1)
    """Share of the text that is never trained on."""

    held_out_by: Literal["document", "position"] = "document"
    shard_tokens: int = Field(default=64_000_000, ge=1)
    """Tokens after which the next document begins a new shard."""

    keep_duplicates: bool = False


def build(spec: BuildSpec, out: Path, *, force: bool = False) -> TokenManifest:
    """Write the token folder `out`; it appears when it is complete."""
    with atomic_folder(out, force=force) as work:
        tokenizer = _tokenizer(spec)
        tokenizer.save_pretrained(work / TOKENIZER)
        vocab_size = len(tokenizer)
        sizes = bytes_of_tokens(tokenizer, vocab_size)
        if sizes is not None:
            sizes.tofile(work / TOKEN_BYTES)
        writers: dict[Part, _Writer] = {
            part: _Writer(work, part, vocab_size, spec.shard_tokens)
            for part in ("train", "held_out")
        }
        reader, end = _Reader(spec, "tokens"), tokenizer.eos_token_id
        for batch in _batched(iter(reader), ENCODED_AT_ONCE):
            texts = [text for _, text in batch]
            # Names of special tokens in a text are text: no document can end itself.
            encoded = tokenizer(
                texts, add_special_tokens=False, split_special_tokens=True, verbose=False
            )["input_ids"]
            for (part, text), ids in zip(batch, encoded, strict=True):
                writers[part].add(ids if end is None else [*ids, end], len(text.encode()))
        shards = tuple(shard for writer in writers.values() for shard in writer.close())
        manifest = TokenManifest(
            vocab_size=vocab_size,
            end_of_text_id=end,
            byte_level=sizes is not None,
            shards=shards,
            sources=tuple(Path(source).name for source in spec.sources),
            held_out=spec.held_out,
            duplicates=reader.duplicates,
        )
        if not manifest.of("train"):
            raise ConfigError("the sources hold no text to train on", fix="name other sources")
        (work / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return manifest


def _tokenizer(spec: BuildSpec) -> Any:
    if spec.tokenizer is not None:
        return open_tokenizer(spec.tokenizer)
    reader = _Reader(spec, "vocabulary")
    texts = (text for part, text in reader if part == "train")
    return as_transformers(train_tokenizer(texts, spec.vocab_size))


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out part, by its content alone."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Reader:
    """(part, text) of every document, once each, with progress."""

    def __init__(self, spec: BuildSpec, description: str) -> None:
        self.spec, self.description = spec, description
        self.duplicates = 0

    def __iter__(self) -> Iterator[tuple[Part, str]]:
        seen: set[bytes] = set()
        self.duplicates = 0
        total = sum(size_of(source) for source in self.spec.sources)
        with progress(self.description, total or None) as bar:
            for source in self.spec.sources:
                for text in documents(source, self.spec.text_key, bar.advance):
                    key = hashlib.blake2b(text.encode(), digest_size=16).digest()
                    if key in seen and not self.spec.keep_duplicates:
                        self.duplicates += 1
                        continue
                    seen.add(key)
                    yield from self._parts(text)

    def _parts(self, text: str) -> Iterator[tuple[Part, str]]:
        share = self.spec.held_out
        if self.spec.held_out_by == "document":
            yield ("held_out" if is_held_out(text, share) else "train"), text
            return
        first, last = split_by_position(text, share) if share else (text, "")
        yield "train", first
        if last:
            yield "held_out", last


def _batched(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


class _Writer:
    """Writes one part, shard after shard."""

    def __init__(self, folder: Path, part: Part, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.part: Part = part
        self.dtype = dtype_for(vocab_size)
        self.shards: list[Shard] = []
        self._pieces: list[np.ndarray] = []
        self._tokens = self._documents = self._bytes = 0

    def add(self, ids: Sequence[int], text_bytes: int) -> None:
        """Append one document."""
        self._pieces.append(np.asarray(ids, dtype=self.dtype))
        self._tokens += len(ids)
        self._documents += 1
        self._bytes += text_bytes
        if self._tokens >= self.shard_tokens:
            self._flush()

    def close(self) -> list[Shard]:
        """Write the rest and return all shards."""
        if self._tokens:
            self._flush()
        return self.shards

    def _flush(self) -> None:
        name = f"{self.part}-{len(self.shards):05d}.bin"
        np.concatenate(self._pieces).tofile(self.folder / name)
        self.shards.append(
            Shard(
                file=name,
                part=self.part,
                tokens=self._tokens,
                documents=self._documents,
                text_bytes=self._bytes,
                sha256=sha256_of(self.folder / name),
            )
        )
        self._pieces, self._tokens, self._documents, self._bytes = [], 0, 0, 0
