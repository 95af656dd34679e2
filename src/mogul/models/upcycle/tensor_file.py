"""Safetensors files read and written one tensor at a time.

The library that owns the format reads lazily but can only write a whole file from memory, so the
writer here puts down the header first, which is known before any data, and then the tensors in
that order. Reading goes through plain seeks, not a memory map: what is resident is what is held.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mogul.core.errors import ArtifactError
from mogul.core.files import read_json
from mogul.core.units import MIB

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that are read and written, by their name in the format."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
CHUNK_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where a tensor's bytes are, and what they are."""

    file: Path
    first_byte: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor into fresh memory."""
        data = bytearray(self.num_bytes)
        with self.file.open("rb") as file:
            file.seek(self.first_byte)
            if file.readinto(data) != self.num_bytes:
                raise ArtifactError(f"{self.file} ended early", fix="fetch the checkpoint again")
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Read the bytes in pieces of at most CHUNK_BYTES."""
        left = self.num_bytes
        with self.file.open("rb") as file:
            file.seek(self.first_byte)
            while left:
                chunk = file.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise ArtifactError(
                        f"{self.file} ended early", fix="fetch the checkpoint again"
                    )
                left -= len(chunk)
                yield chunk


def find_tensors(folder: Path) -> dict[str, TensorPlace]:
    """List every tensor of a checkpoint folder, one file or many.

    Raises:
        ArtifactError: no safetensors, a truncated or damaged file, or an index that does not
            agree with the files.
    """
    if (folder / INDEX_NAME).exists():
        try:
            file_of = dict(read_json(folder / INDEX_NAME)["weight_map"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"{folder / INDEX_NAME} holds no weight_map", fix="fetch the checkpoint again"
            ) from error
    elif (folder / SINGLE_NAME).exists():
        file_of = {}
    else:
        raise ArtifactError(
            f"{folder} holds no {SINGLE_NAME} and no {INDEX_NAME}",
            fix="save the model with safetensors (`model.save_pretrained`)",
        )
    places: dict[str, TensorPlace] = {}
    for name in sorted(set(file_of.values())) or [SINGLE_NAME]:
        places |= _tensors_of_file(folder / name)
    if missing := sorted(file_of.keys() - places.keys()):
        raise ArtifactError(
            f"{folder / INDEX_NAME} names tensors that no file holds: {', '.join(missing[:5])}",
            fix="fetch the checkpoint again",
        )
    return places


def _tensors_of_file(path: Path) -> dict[str, TensorPlace]:
    try:
        with safe_open(path, framework="pt"):  # checks the header, the offsets and the length
            pass
        with path.open("rb") as file:
            header_bytes = struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(header_bytes))
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"{path} is missing, truncated or damaged: {error}", fix="fetch the checkpoint again"
        ) from error
    header.pop("__metadata__", None)
    if odd := {entry["dtype"] for entry in header.values()} - DTYPES.keys():
        raise ArtifactError(
            f"{path} holds tensors of dtype {', '.join(sorted(odd))}",
            fix=f"save the model in one of {', '.join(DTYPES)}",
        )
    return {
        name: TensorPlace(
            path,
            8 + header_bytes + entry["data_offsets"][0],
            tuple(entry["shape"]),
            DTYPES[entry["dtype"]],
        )
        for name, entry in header.items()
    }


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor still to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def header_of(entries: Sequence[TensorEntry]) -> bytes:
    """Build the head of a file that holds `entries` in this order, length field included."""
    head: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        head[entry.name] = {
            "dtype": DTYPE_NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.num_bytes],
        }
        offset += entry.num_bytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    """Append a tensor's bytes."""
    file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


def split_in_files(
    entries: Sequence[TensorEntry], max_file_bytes: int
) -> dict[str, list[TensorEntry]]:
    """Share tensors out to files in order; wide dtypes first in a file, so that all are aligned."""
    parts: list[list[TensorEntry]] = [[]]
    filled_bytes = 0
    for entry in entries:
        if parts[-1] and filled_bytes + entry.num_bytes > max_file_bytes:
            parts.append([])
            filled_bytes = 0
        parts[-1].append(entry)
        filled_bytes += entry.num_bytes
    for part in parts:
        part.sort(key=lambda entry: -entry.dtype.itemsize)
    if len(parts) == 1:
        return {SINGLE_NAME: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, 1)
    }
