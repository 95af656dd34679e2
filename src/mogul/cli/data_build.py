"""`mogul data build`: documents in, a folder of checksummed token shards out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

EXAMPLES = """
examples:
  mogul data build corpus/ --out tokens --vocab-size 16384
  mogul data build a.jsonl b.parquet --out tokens --tokenizer ./SmolLM2-135M --text-key content
  mogul data build shipped --out tokens --vocab-size 4096 --held-out-by position --held-out 0.1
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn text into token shards that `mogul train` reads.

    Sources are text files (one document each), JSONL, Parquet (also .gz and .xz), folders of
    them, `shipped` (1.3 MB of public-domain English) or hf:NAME with the package datasets.
    The held-out part depends on the documents' content only.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE...")]
    """Files, folders, shipped or hf:NAME, read in this order."""
    out: Path
    """Folder to write."""
    tokenizer: str | None = None
    """Checkpoint folder or tokenizer.json; without it a byte-level BPE is trained."""
    vocab_size: int = 16384
    """Tokens of the vocabulary that is trained."""
    text_key: str = "text"
    """Field or column with the text."""
    held_out: float = 0.01
    """Share of the text that is never trained on."""
    held_out_by: Literal["document", "position"] = "document"
    """Hold out whole documents, or the last part of each (for few long ones)."""
    shard_tokens: int = 64_000_000
    """Tokens a shard, roughly."""
    keep_duplicates: bool = False
    """Keep documents that are equal to an earlier one."""
    force: bool = False
    """Replace an existing folder."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Build and print what was made."""
    from mogul.cli.data_check import table_of
    from mogul.cli.flags import named_by_flags
    from mogul.train.data.build import BuildSpec, build

    o = options
    with named_by_flags(o):
        spec = BuildSpec(
            sources=o.sources,
            tokenizer=o.tokenizer,
            vocab_size=o.vocab_size,
            text_key=o.text_key,
            held_out=o.held_out,
            held_out_by=o.held_out_by,
            shard_tokens=o.shard_tokens,
            keep_duplicates=o.keep_duplicates,
        )
    manifest = build(spec, o.out, force=o.force)
    table_of(o.out, manifest).show(o.format)
    return 0
