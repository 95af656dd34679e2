"""What tensors a checkpoint folder holds, read from the safetensors headers alone.

A truncated file, a shard the index names but the folder lacks, a name that stands in another
shard than the index says: each is an ArtifactError before any weight is read. Pickled weights
(`.bin`, `.pt`) are refused, because reading them runs code.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mogul.core.errors import ArtifactError
from mogul.core.files import read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLED = ("*.bin", "*.pt", "*.pth")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file describes it; `dtype` in the words of safetensors ("BF16")."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def read_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint folder by name, from the index or the single file."""
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    if (folder / SINGLE).is_file():
        return _read_file(folder / SINGLE)
    if any(file for pattern in PICKLED for file in folder.glob(pattern)):
        raise ArtifactError(
            f"{folder} holds pickled weights only; reading them would run code from the file",
            fix="convert them to safetensors first",
        )
    raise ArtifactError(
        f"{folder} holds neither {SINGLE} nor {INDEX}", fix="check the path of the checkpoint"
    )


def _read_sharded(folder: Path) -> dict[str, StoredTensor]:
    index = read_json(folder / INDEX)
    if not isinstance(index, dict) or not isinstance(weight_map := index.get("weight_map"), dict):
        raise ArtifactError(f"{folder / INDEX} has no weight_map", fix="write the index again")
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise ArtifactError(f"{folder / INDEX} names a file outside the folder: {file!r}")
        if not (folder / file).is_file():
            raise ArtifactError(f"{folder / file} is missing; the index names it", fix="fetch it")
        tensors |= _read_file(folder / file)
    if lost := [name for name, file in weight_map.items() if _file_of(tensors, name) != file]:
        raise ArtifactError(
            f"{folder / INDEX}: {names(lost)} not in the file the index names",
            fix="write the index again, or fetch the files again",
        )
    if extra := sorted(set(tensors) - set(weight_map)):
        raise ArtifactError(
            f"{folder / INDEX} lacks {names(extra)}, which the files hold",
            fix="write the index again",
        )
    return tensors


def _file_of(tensors: dict[str, StoredTensor], name: str) -> str | None:
    return tensors[name].file if name in tensors else None


def _read_file(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(path.name, view.get_dtype(), tuple(view.get_shape()))
                for name, view in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path} is damaged or truncated: {error}", fix="fetch or write the file again"
        ) from error


def names(tensors: list[str], limit: int = 6) -> str:
    """The first few names, and how many more."""
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(tensors[:limit]) + more
