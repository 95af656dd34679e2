"""Which checkpoint a trace or a placement belongs to: a hash that is cheap at any size.

Hashes names, dtypes and shapes of all tensors and 16 blocks of 4 KiB spread evenly over every
file, so that a fine-tuned or permuted copy differs, while a 1 TB checkpoint costs milliseconds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import read_object
from mogul.spec.checkpoint import read_checkpoint
from mogul.spec.families import model_spec
from mogul.spec.trace import ModelStamp

_BLOCK_BYTES = 4096
_NUM_BLOCKS = 16


def weights_hash(folder: str | Path) -> str:
    """First 32 hex digits over all headers and sampled blocks of data."""
    checkpoint = read_checkpoint(folder)
    if checkpoint is None:
        raise ArtifactError(
            f"{folder} has no safetensors files", fix="give the folder of a checkpoint"
        )
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    for name in checkpoint.files:
        path = checkpoint.folder / name
        first = min(t.first_byte for t in checkpoint.tensors.values() if t.file == name)
        room = max(0, path.stat().st_size - first - _BLOCK_BYTES)
        with path.open("rb") as file:
            for block in range(_NUM_BLOCKS):
                file.seek(first + room * block // (_NUM_BLOCKS - 1))
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:32]


def stamp_of_config(config: Mapping[str, Any], *, name: str, hash: str = "") -> ModelStamp:
    """The stamp of a model from its `config.json`; ConfigError for a dense model."""
    spec = model_spec(config)
    if spec.moe is None:
        raise ConfigError(
            f"{name} is a dense model: it has no experts", fix="give a mixture-of-experts model"
        )
    moe = spec.moe
    return ModelStamp(
        name=name,
        family=spec.family,
        num_layers=spec.num_layers,
        num_experts=moe.grouping.num_experts,
        top_k=moe.grouping.top_k,
        num_groups=moe.grouping.num_groups,
        limit_num_groups=moe.router.limit_num_groups if moe.router.limit_groups else 1,
        hidden_size=spec.hidden_size,
        expert_bytes=spec.expert_bytes_per_layer(spec.dtype) // moe.grouping.num_experts,
        weights_hash=hash,
    )


def stamp_of_folder(folder: str | Path) -> ModelStamp:
    """The stamp of a checkpoint folder."""
    path = Path(folder)
    config = read_object(path / "config.json")
    return stamp_of_config(config, name=str(folder), hash=weights_hash(path))
