"""Scales of an fp8 cache: where they come from, in this order.

1. `kv_scales.safetensors` beside the checkpoint, as `KvScales.save` writes it: one number a
   key-value head of every layer.
2. `k_scale` and `v_scale` of the checkpoint's own attention layers: one number a layer or a head.
3. Nothing: scale 1. e4m3 keeps three bits from 2^-6 to 448, so only keys or values outside need
   another; what is larger than 448 times its scale is cut off.

A file says which weights it was measured on, and is refused beside others.

`measure_scales` finds the largest key and value of every head in a short text and takes the power
of two that leaves half as much room again above it, or more: numbers that scale 1 holds well are
rounded just as with scale 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_write
from mogul.core.log import say
from mogul.models.load import find_folder
from mogul.serve.params import SamplingParams
from mogul.spec.fingerprint import weights_hash

if TYPE_CHECKING:
    from mogul.serve.attention import LayerShape
    from mogul.serve.engine import Engine

FILE = "kv_scales.safetensors"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
_WEIGHTS = "weights"
_AGAIN = "measure them anew: mogul calibrate MODEL"
ROOM = 1.5
"""Times the largest number seen that fits at least."""

_NAME = re.compile(r"\.layers\.(\d+)\..*\b([kv])_scale$")


@dataclass(frozen=True)
class KvScales:
    """Factors of an fp8 cache, fp32: stored is the key or value over its factor."""

    keys: tuple[Tensor, ...]
    """Of each layer, one number or one a key-value head."""

    values: tuple[Tensor, ...]

    weights: str = ""
    """`weights_hash` of the checkpoint; empty where a model in memory was measured."""

    def of_rank(self, rank: int, ranks: int) -> KvScales:
        """Those of the heads that one of some ranks keeps; a number for all heads is everybody's.

        Raises:
            ConfigError: the heads of a layer cannot be dealt out evenly.
        """

        def share(scale: Tensor) -> Tensor:
            if scale.numel() == 1:
                return scale
            if scale.numel() % ranks:
                raise ConfigError(
                    f"scales of {scale.numel()} heads cannot be cut for {ranks} ranks"
                )
            return scale.chunk(ranks)[rank]

        keys, values = (tuple(map(share, part)) for part in (self.keys, self.values))
        return KvScales(keys, values, self.weights)

    def save(self, folder: str | Path) -> Path:
        """Write them where `read_scales` finds them, beside the checkpoint."""
        path = Path(folder) / FILE
        named = {
            f"model.layers.{layer}.self_attn.{kind}_scale": scale.contiguous()
            for kind, scales in (("k", self.keys), ("v", self.values))
            for layer, scale in enumerate(scales)
        }
        atomic_write(path, save(named, {_WEIGHTS: self.weights}))
        return path


def find_scales(path: str | Path, statistics: str | Path | None = None) -> KvScales | None:
    """What an engine takes for a checkpoint: scales beside named statistics, or its own.

    Raises:
        ArtifactError: see `read_scales`.
    """
    scales = None
    if statistics is not None:
        named = Path(statistics)
        folder = find_folder(named.parent if named.suffix == ".safetensors" else named)
        if (folder / FILE).exists():  # its own tensors, if it has some, belong to other weights
            scales = read_scales(folder, checkpoint=path)
    scales = scales or read_scales(path, checkpoint=path)
    known = f"{len(scales.keys)} layers' own scales" if scales is not None else "scale 1"
    say(f"fp8 keys and values with {known}")
    return scales


def measured_scales(folder: Path) -> KvScales | None:
    """The scales that were measured for a checkpoint and lie beside it; None where none do.

    Raises:
        ArtifactError: as `read_scales`.
    """
    return read_scales(folder, checkpoint=folder) if (folder / FILE).exists() else None


def carry_scales(scales: KvScales, folder: Path) -> None:
    """Write a checkpoint's scales beside another one that was made from it."""
    replace(scales, weights=weights_hash(folder)).save(folder)


def read_scales(path: str | Path, *, checkpoint: str | Path | None = None) -> KvScales | None:
    """The scales in a folder; None where it has none.

    Args:
        path: a checkpoint folder, hub id, or a folder with the file alone.
        checkpoint: folder of the weights they must belong to; None asks nothing.

    Raises:
        ArtifactError: a damaged file, scales of other weights, some layers have scales and others
            none, or a scale is no positive number.
    """
    folder = find_folder(path)
    try:
        found, weights = _file_scales(folder / FILE) or (_own_scales(folder), "")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(
            f"the scales in {folder} cannot be read: {error}",
            fix="measure them anew with `mogul calibrate`",
        ) from error
    if weights and checkpoint is not None and weights != weights_hash(find_folder(checkpoint)):
        raise ArtifactError(f"{folder / FILE} was measured on other weights", fix=_AGAIN)
    return _settle(folder, found, weights) if found else None


def _file_scales(file: Path) -> tuple[dict[str, Tensor], str] | None:
    """Those that were measured, and on which weights, where it is known; None without a file."""
    if not file.exists():
        return None
    with safe_open(file, "pt") as opened:
        named = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return named, (opened.metadata() or {}).get(_WEIGHTS, "")


def _own_scales(folder: Path) -> dict[str, Tensor]:
    """Those among the checkpoint's own tensors."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if _NAME.search(name)]  # noqa: SIM118
            found |= {name: opened.get_tensor(name) for name in names}
    return found


def _settle(folder: Path, found: dict[str, Tensor], weights: str) -> KvScales:
    parts: dict[str, dict[int, Tensor]] = {"k": {}, "v": {}}
    for name, scale in found.items():
        if (match := _NAME.search(name)) is None:
            raise ArtifactError(
                f"{folder}: {name} is no scale of a layer's keys or values",
                fix="measure them anew with `mogul calibrate`",
            )
        scale = scale.float().reshape(-1)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ArtifactError(
                f"{folder}: {name} is {scale.tolist()}, which scales nothing",
                fix="measure them anew with `mogul calibrate`",
            )
        parts[match[2]][int(match[1])] = scale
    layers = range(max(map(len, parts.values())))
    if any(sorted(part) != list(layers) for part in parts.values()):
        raise ArtifactError(
            f"{folder}: keys of {len(parts['k'])} layers and values of {len(parts['v'])} have "
            "scales, not one layer after the other",
            fix=f"measure all of them anew, or remove {FILE}",
        )
    keys, values = (tuple(part[layer] for layer in layers) for part in parts.values())
    return KvScales(keys, values, weights)


def scales_for(
    shapes: Sequence[LayerShape], scales: KvScales | None, device: torch.device
) -> Iterator[tuple[Tensor, ...]]:
    """Each layer's scales on its device; none at all is scale 1.

    Raises:
        ConfigError: they belong to another model.
    """
    if scales is None:
        yield from ((),) * len(shapes)
        return
    if len(scales.keys) != len(shapes):
        raise ConfigError(f"scales of {len(scales.keys)} layers for a model of {len(shapes)}")
    for layer, (shape, *pair) in enumerate(zip(shapes, scales.keys, scales.values, strict=True)):
        for scale in pair:
            if scale.numel() not in (1, shape.num_kv_heads):
                raise ConfigError(
                    f"{scale.numel()} scales for the {shape.num_kv_heads} key-value heads of "
                    f"layer {layer}",
                    fix="give one number, or one a head",
                )
        yield tuple(scale.to(device) for scale in pair)


def measure_scales(
    engine: Engine,
    prompts: Sequence[str | Sequence[int]],
    *,
    checkpoint: str | Path | None = None,
) -> KvScales:
    """Scales from the keys and values of some prompts, one a key-value head.

    Args:
        engine: a fresh one with a cache in the model's own dtype that holds all prompts at once.
        prompts: text like that to be served; a few thousand tokens are enough.
        checkpoint: folder of the model's weights, which the scales are then tied to.

    Raises:
        ConfigError: the engine's cache is fp8 already, or has too little room.
    """
    if engine.runner.kv_dtype is not None:
        raise ConfigError(
            "scales are measured on a cache of the model's own dtype", fix='open it with "auto"'
        )
    ids = [engine.encode(prompt) for prompt in prompts]
    if sum(map(len, ids)) + len(ids) * engine.sizes.page_size > engine.pool.num_available * (
        engine.sizes.page_size
    ):
        raise ConfigError("the cache is too small for these prompts", fix="give fewer prompts")
    engine.generate(ids, SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    largest = [
        [cache.abs().amax((0, 1, 3)).float() for cache in (layer.key, layer.value)]
        for layer in engine.runner.caches
    ]
    keys, values = (tuple(_scale(one[i]) for one in largest) for i in (0, 1))
    weights = weights_hash(find_folder(checkpoint)) if checkpoint is not None else ""
    return KvScales(keys, values, weights)


def _scale(largest_N: Tensor) -> Tensor:
    """The power of two for heads with these largest numbers; 1 for one that was always 0."""
    scale_N = torch.exp2((largest_N * (ROOM / LARGEST)).log2().ceil())
    return torch.where(largest_N > 0, scale_N, 1.0).cpu()
