"""Safetensors files read and written one tensor at a time.

The library that owns the format reads lazily but can only write a whole file from memory, so the
writer here puts down the header first, which is known before any data, and then the tensors in
that order. Reading goes through plain seeks, not a memory map: what is resident is what is held.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from mogul.core.errors import ArtifactError
from mogul.core.units import MIB
from mogul.spec.checkpoint import INDEX, SINGLE, read_checkpoint

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Dtypes that are read, by their name in the format."""
WITH_FP8 = DTYPES | {"F8_E4M3": torch.float8_e4m3fn}
"""Those of checkpoints whose weights have scales."""
DTYPE_NAMES = {dtype: name for name, dtype in WITH_FP8.items()}

CHUNK_BYTES = 8 * MIB


@dataclass(frozen=True, slots=True)
class StoredTensor:
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
        filled = 0
        for chunk in self.chunks():
            data[filled : filled + len(chunk)] = chunk
            filled += len(chunk)
        return torch.frombuffer(data, dtype=self.dtype).view(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Read the bytes in pieces of at most CHUNK_BYTES."""
        left_bytes = self.num_bytes
        with self.file.open("rb") as file:
            file.seek(self.first_byte)
            while left_bytes:
                chunk = file.read(min(left_bytes, CHUNK_BYTES))
                if not chunk:
                    raise ArtifactError(
                        f"{self.file} became shorter while it was read",
                        fix="leave the checkpoint alone until it is done",
                    )
                left_bytes -= len(chunk)
                yield chunk


def stored_tensors(
    folder: Path, dtypes: Mapping[str, torch.dtype] = DTYPES
) -> dict[str, StoredTensor]:
    """List every tensor of a checkpoint folder, one file or many; headers are checked.

    Args:
        folder: of the checkpoint.
        dtypes: what its tensors may be.

    Raises:
        ArtifactError: no safetensors, a truncated or damaged file, or another dtype.
    """
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise ArtifactError(
            f"{folder} holds neither {SINGLE} nor {INDEX}",
            fix="save the model as safetensors (`model.save_pretrained`)",
        )
    if odd := sorted(set(checkpoint.bytes_by_dtype) - dtypes.keys()):
        raise ArtifactError(
            f"{folder} holds tensors of dtype {', '.join(odd)}",
            fix=f"save the model in one of {', '.join(dtypes)}",
        )
    return {
        name: StoredTensor(folder / entry.file, entry.first_byte, entry.shape, dtypes[entry.dtype])
        for name, entry in checkpoint.tensors.items()
    }


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor still to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize


def header_of(entries: Sequence[NewTensor]) -> bytes:
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
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def split_in_files(entries: Sequence[NewTensor], max_file_bytes: int) -> dict[str, list[NewTensor]]:
    """Share tensors out to files in order; wide dtypes first in a file, so that all are aligned."""
    parts: list[list[NewTensor]] = [[]]
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
        return {SINGLE: parts[0]}
    return {
        f"model-{number:05d}-of-{len(parts):05d}.safetensors": part
        for number, part in enumerate(parts, 1)
    }
