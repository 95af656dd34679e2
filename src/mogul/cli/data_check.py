"""`mogul data check`: what a token folder holds, every shard compared with its checksum."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from mogul.core.table import Table
    from mogul.train.data.shards import TokenManifest

EXAMPLES = """
examples:
  mogul data check tokens
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Read every shard of a token folder and compare it with its checksum."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder that `mogul data build` wrote."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Check and print; a damaged shard is an error that names it."""
    from mogul.train.data.shards import read_manifest, verify

    manifest = read_manifest(options.folder)
    verify(options.folder, manifest)
    whole = f"all {len(manifest.shards)} shards have their checksums"
    table_of(options.folder, manifest, whole).show(options.format)
    return 0


def table_of(folder: Path, manifest: TokenManifest, *said: str) -> Table:
    """The parts of a token folder, one row each; `said` are notes of the verb's own."""
    from mogul.core.table import Table

    rows, notes = [], list(said)
    if manifest.duplicates:
        notes.append(f"{manifest.duplicates} equal documents left out")
    if not manifest.of("held_out"):
        notes.append("nothing is held out; of few documents take parts: --held-out-by position")
    for part in ("train", "held_out"):
        shards = manifest.of(part)
        tokens = sum(shard.tokens for shard in shards)
        text = sum(shard.text_bytes for shard in shards)
        documents = sum(shard.documents for shard in shards)
        each = round(text / tokens, 3) if tokens else None
        rows.append((part, len(shards), documents, tokens, text, each))
    return Table(
        title=f"{folder}: vocabulary {manifest.vocab_size}",
        columns=("part", "shards", "documents", "tokens", "text bytes", "bytes a token"),
        rows=rows,
        notes=notes,
    )
