"""Read documents from text, JSONL, Parquet or a `datasets` data set, one string each, in order.

A source is a file, a folder (every readable file below it, by name), `shipped` (the public-domain
text in the package) or `hf:NAME[:SPLIT]` where the package `datasets` is installed. Files may be
compressed with gzip or xz. A file that cannot be read is named, with the line at fault.
"""

from __future__ import annotations

import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from mogul.core.errors import ArtifactError, ConfigError, nearest
from mogul.core.files import read_json_line
from mogul.train.data.shards import MANIFEST
from mogul.train.data.windows import shipped_text

SHIPPED = "shipped"
HUB = "hf:"
PACKED = {".gz": gzip.open, ".xz": lzma.open}
TEXT = (".txt", ".md", ".text", ".rst")
TABLES = (".jsonl", ".json", ".parquet")


def find_files(source: str) -> list[Path]:
    """The files of one source in a fixed order; ConfigError when there are none."""
    path = Path(source)
    if path.is_file():
        _kind(path)
        return [path]
    if not path.is_dir():
        raise ConfigError(
            f"{source} is no file and no folder",
            fix=f"name text, JSONL or Parquet files, {SHIPPED!r}, or hf:NAME",
        )
    if (path / MANIFEST).is_file():
        raise ConfigError(
            f"{source} is a token folder already", fix="name it in [data] sources of a recipe"
        )
    files = sorted(file for file in path.rglob("*") if file.is_file() and _is_readable(file))
    if not files:
        raise ConfigError(
            f"{source} holds no text, JSONL or Parquet file",
            fix=f"readable endings are {', '.join((*TEXT, *TABLES))}, also with .gz or .xz",
        )
    return files


def size_of(source: str) -> int:
    """Bytes on disk, for progress; 0 where unknown."""
    if source == SHIPPED or source.startswith(HUB):
        return 0
    return sum(file.stat().st_size for file in find_files(source))


def documents(source: str, key: str, seen_bytes: Callable[[int], None]) -> Iterator[str]:
    """Every document of a source that is not empty.

    Args:
        source: as the module says.
        key: the field or column with the text, in JSONL, Parquet and data sets.
        seen_bytes: called with the size of each file on disk after it was read.
    """
    for text in _raw(source, key, seen_bytes):
        if text.strip():
            yield text


def _raw(source: str, key: str, seen_bytes: Callable[[int], None]) -> Iterator[str]:
    if source == SHIPPED:
        yield from (a + b for a, b in zip(*_shipped_parts(), strict=True))
    elif source.startswith(HUB):
        yield from _from_datasets(source.removeprefix(HUB), key)
    else:
        for file in find_files(source):
            kind = _kind(file)
            if kind == ".parquet":
                yield from _from_parquet(file, key)
            elif kind in TEXT:
                yield "".join(_lines(file))
            else:
                yield from _from_jsonl(file, key)
            seen_bytes(file.stat().st_size)


def _shipped_parts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    corpus = shipped_text()
    return corpus.train, corpus.held_out


def _kind(file: Path) -> str:
    """The ending that says how to read a file; ConfigError for an unknown one."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    kind = next((s for s in reversed(suffixes) if s not in PACKED), "")
    if kind not in (*TEXT, *TABLES):
        raise ConfigError(
            f"{file}: cannot tell from its name what it holds",
            fix=nearest(kind or file.name, [*TEXT, *TABLES]),
        )
    return kind


def _is_readable(file: Path) -> bool:
    try:
        return bool(_kind(file))
    except ConfigError:
        return False


def _lines(file: Path) -> Iterator[str]:
    """Lines as they stand, each with its end; ArtifactError when the file cannot be read."""
    try:
        with PACKED.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8", newline="") as f:
            yield from f
    except (OSError, EOFError, lzma.LZMAError, zlib.error, UnicodeDecodeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", fix="mend or leave it out") from None


def _from_jsonl(file: Path, key: str) -> Iterator[str]:
    for number, line in enumerate(_lines(file), 1):
        if not line.strip():
            continue
        fix = "mend it (one object a line), or leave the file out"
        record = read_json_line(line, file, number, fix=fix)
        if not isinstance(record, dict) or not isinstance(record.get(key), str):
            known = sorted(record) if isinstance(record, dict) else []
            raise ArtifactError(
                f"{file}, line {number} has no text under {key!r}",
                fix=f"name the field with --text-key; there are {', '.join(known) or 'none'}",
            )
        yield record[key]


def _from_parquet(file: Path, key: str) -> Iterator[str]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.ParquetFile(file)
    except (ArrowException, OSError) as error:
        raise ArtifactError(f"{file} is no Parquet file: {error}", fix="fetch it again") from None
    if key not in (names := table.schema_arrow.names):
        raise ArtifactError(
            f"{file} has no column {key!r}",
            fix=f"name the column with --text-key: {nearest(key, names)}",
        )
    for batch in table.iter_batches(columns=[key]):
        yield from (value for value in batch.column(0).to_pylist() if isinstance(value, str))


def _from_datasets(name: str, key: str) -> Iterator[str]:
    from importlib import import_module

    try:
        datasets = import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"hf:{name} needs the package datasets", fix="pip install datasets"
        ) from error
    path, _, split = name.partition(":")
    local = Path(path).is_dir()
    table = datasets.load_from_disk(path) if local else datasets.load_dataset(path, split=split)
    if key not in table.column_names:
        raise ArtifactError(
            f"hf:{name} has no column {key!r}",
            fix=f"name the column with --text-key: {nearest(key, table.column_names)}",
        )
    yield from (row[key] for row in table)
