"""What a checkpoint folder holds, read from its headers: names, shapes, dtypes, bytes. No weights.

A safetensors file starts with its header's length (8 bytes, little endian) and the header (JSON);
the header says how long the file must be, so a truncated file is found without reading it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError
from mogul.core.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER_BYTES = 100_000_000
_INTERRUPTED = "it was cut off while being written or fetched: get it again"


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor."""

    name: str
    dtype: str
    """Name as safetensors writes it: "BF16", "F32", "F8_E4M3"..."""

    shape: tuple[int, ...]
    num_bytes: int
    file: str
    first_byte: int
    """Where the data starts, counted from the start of the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder, by name."""

    folder: Path
    tensors: Mapping[str, TensorEntry]

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.num_bytes for entry in self.tensors.values())

    @cached_property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes by stored dtype, largest first."""
        total: Counter[str] = Counter()
        for entry in self.tensors.values():
            total[entry.dtype] += entry.num_bytes
        return dict(total.most_common())

    @cached_property
    def files(self) -> list[str]:
        """The safetensors files, in order."""
        return sorted({entry.file for entry in self.tensors.values()})


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Read one file's header; ArtifactError names the file when it is damaged or cut off."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            file_bytes = path.stat().st_size
            if length > min(_MAX_HEADER_BYTES, max(0, file_bytes - 8)):
                raise ArtifactError(f"{path} is no whole safetensors file", fix=_INTERRUPTED)
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist", fix="fetch the missing file") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} has a damaged header: {error}", fix=_INTERRUPTED) from error
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}", fix="check the path"
        ) from error
    entries = _entries(header, path, data_start=8 + length)
    ends = [info["data_offsets"][1] for name, info in header.items() if name != "__metadata__"]
    needed_bytes = 8 + length + max(ends, default=0)
    if file_bytes != needed_bytes:
        raise ArtifactError(
            f"{path} has {file_bytes} bytes where its header promises {needed_bytes}",
            fix=_INTERRUPTED,
        )
    return entries


def _entries(header: Any, path: Path, *, data_start: int) -> dict[str, TensorEntry]:
    try:
        return {
            name: TensorEntry(
                name=name,
                dtype=info["dtype"],
                shape=tuple(info["shape"]),
                num_bytes=info["data_offsets"][1] - info["data_offsets"][0],
                file=path.name,
                first_byte=data_start + info["data_offsets"][0],
            )
            for name, info in header.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError, IndexError) as error:
        raise ArtifactError(
            f"{path} has a header that is none of safetensors", fix="is it another kind of file?"
        ) from error


def read_checkpoint(folder: str | Path) -> Checkpoint | None:
    """Read the headers of a folder's safetensors files and check them against the index.

    Returns None when the folder holds no safetensors weights (a config alone).

    Raises:
        ArtifactError: a file is missing, cut off or damaged, or the index names tensors that its
            files do not hold.
    """
    root = Path(folder)
    if not (root / INDEX).exists():
        if not (root / SINGLE).exists():
            return None
        return Checkpoint(root, read_header(root / SINGLE))
    weight_map = read_json(root / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ArtifactError(f"{root / INDEX} has no 'weight_map'", fix="fetch the index again")
    tensors: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        tensors.update(read_header(root / file))
    _check_index(root, weight_map, tensors)
    return Checkpoint(root, tensors)


def _check_index(
    root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]
) -> None:
    lost = [
        f"{name} (promised in {file})"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if lost:
        raise ArtifactError(
            f"{root}: the index names {len(lost)} tensors its files do not hold, "
            f"first {', '.join(lost[:3])}",
            fix="index and files are of different versions: fetch both again",
        )
    surplus = sorted(set(tensors) - set(weight_map))
    if surplus:
        raise ArtifactError(
            f"{root}: {len(surplus)} tensors are in no index entry, first {', '.join(surplus[:3])}",
            fix="index and files are of different versions: fetch both again",
        )
