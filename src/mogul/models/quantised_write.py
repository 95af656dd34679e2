"""Write a checkpoint with its experts and linear layers in fp8, tensor by tensor.

Decides which tensors on disk are quantised (those of the layers that `load_quantised` takes) and
that the numbers are the ones it would make: a row's scale depends on that row alone, so nothing is
fused first. Memory holds the quantised weights of one file at most. The folder appears whole or not
at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_folder, check_space, read_object
from mogul.core.units import GB
from mogul.kernels.quant_format import FP8, quantise_fp8_weight
from mogul.models.check_tensors import check_names
from mogul.models.compressed_tensors import KEY, described, method_of, scale_of
from mogul.models.input_stats import InputStats
from mogul.models.load import _skeleton, _stored, find_folder, load_config
from mogul.models.new_checkpoint import check_out, copy_files, write_weights
from mogul.models.quantise import Importance
from mogul.models.quantise_load import WeightFormat, _pieces, layers_to_quantise, weight_format
from mogul.models.tensor_file import NewTensor, StoredTensor, stored_tensors, write_tensor

STORED = ("fp8", "fp8-experts", "fp8-w8a16")
"""What a file can hold: other formats exist in memory alone."""
MAX_FILE_BYTES = 2 * GB


@dataclass(frozen=True, slots=True)
class QuantiseReport:
    """What was written."""

    folder: Path
    """The new checkpoint."""
    format: str
    """A name of `STORED`."""
    experts: int
    """Layers of experts that are quantised."""
    linears: int
    """Linear layers that are."""
    source_bytes: int
    """Bytes of the weights before."""
    num_bytes: int
    """Bytes of the weights now."""


def quantise_checkpoint(
    source: str | Path,
    out: str | Path,
    format: str = "fp8",
    *,
    importance: InputStats | None = None,
    device: str | torch.device = "cpu",
    max_file_bytes: int = MAX_FILE_BYTES,
    force: bool = False,
) -> QuantiseReport:
    """Stream a checkpoint folder into one with e4m3 weights, a scale an output channel.

    `load_stored`, the engine and others that read the format open it. Its numbers are those that
    `load_quantised` makes from the same arguments. Tokenizer, chat template, generation config and
    licence come along.

    Args:
        source: folder with config.json and safetensors, or a hub id.
        out: new folder; an existing one is refused unless `force`.
        format: fp8 (experts and linear layers of the decoder blocks; inputs are rounded by token),
            fp8-experts (experts alone), or fp8-w8a16 (experts alone, inputs stay in 16 bits).
        importance: from `read_stats` or `measure_stats`; weights that large inputs meet are then
            rounded better.
        device: where rows are rounded.
        max_file_bytes: largest weight file, unless one tensor is larger.
        force: replace an existing checkpoint folder at the end.

    Raises:
        ConfigError: nothing in the model quantises, it is quantised already, or a format that no
            file holds.
        ArtifactError: the source is damaged, stores several experts in one tensor, or is not what
            was calibrated; or the disk is full. Nothing is kept.
    """
    source, out = find_folder(source), Path(out)
    what = _format(format)
    check_out(source, out, force)
    if method_of(source) is not None:
        raise ConfigError(f"{source} is quantised already", fix="give the unquantised checkpoint")
    skeleton = _skeleton(load_config(source))
    check_names(source, skeleton, _stored(source))
    found = layers_to_quantise(skeleton, linears=what.linears)
    linears = sum(isinstance(module, nn.Linear) for module in found.values())
    if importance is not None:
        importance.check(found, f"the statistics for {source}")
    places = stored_tensors(source)
    todo = _todo(source, skeleton, found, importance)
    if absent := [name for name in todo if name not in places]:
        raise ArtifactError(
            f"{source}: {len(absent)} tensors are missing, first {absent[0]}",
            fix="fetch the files again",
        )
    entries = _entries(places, todo)
    num_bytes = sum(entry.num_bytes for entry in entries)
    with atomic_folder(out, force=force) as work:
        check_space(out, num_bytes)
        content = read_object(source / "config.json")
        content[KEY] = described(what.experts, _kept(places, todo))
        (work / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_files(source, work)
        (work / "README.md").write_text(_card(source.resolve().name, format), encoding="utf-8")
        write_weights(
            work,
            entries,
            _Rounder(places, todo, device).write,
            title="quantise",
            num_params=sum(prod(place.shape) for place in places.values()),
            max_file_bytes=max_file_bytes,
        )
    before = sum(place.num_bytes for place in places.values())
    return QuantiseReport(out, format, len(found) - linears, linears, before, num_bytes)


def _format(name: str) -> WeightFormat:
    what = weight_format(name)
    if name not in STORED:
        raise ConfigError(
            f"{name} has no form in a file that other programs read",
            fix=f"use one of {', '.join(STORED)}, or quantise={name!r} while loading",
        )
    return what


def _todo(
    folder: Path,
    skeleton: PreTrainedModel,
    found: Mapping[str, nn.Module],
    stats: InputStats | None,
) -> dict[str, Tensor | None]:
    """Names on disk of the matrices to quantise, with mean squares [C] of what they multiply."""
    todo: dict[str, Tensor | None] = {}
    for name, module in found.items():
        known = None if stats is None else stats.importance.get(name)
        for parameter, names in _pieces(folder, skeleton, name, module).items():
            if parameter.endswith("bias"):
                continue
            if isinstance(module, nn.Linear):
                todo |= dict.fromkeys(names, known if isinstance(known, Tensor) else None)
                continue
            experts = getattr(module, parameter).shape[0]
            if len(names) % experts:
                raise ArtifactError(
                    f"{folder}: {names[0]} holds several experts in one tensor, which the format "
                    "does not describe",
                    fix="quantise it while loading: Engine.from_pretrained(quantise='fp8')",
                )
            of = known if isinstance(known, Importance) else None
            rows = of and (of.down if parameter == "down_proj" else of.gate_up)
            todo |= {
                each: None if rows is None else rows[at % experts] for at, each in enumerate(names)
            }
    return todo


def _kept(places: Mapping[str, StoredTensor], todo: Mapping[str, Tensor | None]) -> list[str]:
    """Names of the matrices that stay as they are; the output head also where it is tied."""
    matrices = {name for name, place in places.items() if len(place.shape) == 2}
    names = {name for name in matrices - set(todo) if name.endswith(".weight")}
    return sorted({name.removesuffix(".weight") for name in names} | {"lm_head"})


def _entries(
    places: Mapping[str, StoredTensor], todo: Mapping[str, Tensor | None]
) -> list[NewTensor]:
    """All tensors of the new checkpoint, a scale behind its weight."""
    entries: list[NewTensor] = []
    for name, place in places.items():
        if name in todo:
            entries.append(NewTensor(name, place.shape, FP8))
            entries.append(NewTensor(scale_of(name), (place.shape[0], 1), torch.float32))
        else:
            entries.append(NewTensor(name, place.shape, place.dtype))
    return entries


class _Rounder:
    """Writes tensors; of a weight and its scale, which are made together, the later one is held."""

    def __init__(
        self,
        places: Mapping[str, StoredTensor],
        todo: Mapping[str, Tensor | None],
        device: str | torch.device,
    ) -> None:
        self.places, self.todo, self.device = places, todo, device
        self.weight_of = {scale_of(name): name for name in todo}
        self.held: dict[str, Tensor] = {}

    def write(self, file: BinaryIO, entry: NewTensor) -> None:
        """Append the bytes of one tensor."""
        weight = self.weight_of.get(entry.name, entry.name)
        if weight not in self.todo:
            for chunk in self.places[weight].chunks():
                file.write(chunk)
            return
        if entry.name not in self.held:
            known = self.todo[weight]
            known = None if known is None else known.to(self.device)
            value, scale = quantise_fp8_weight(self.places[weight].read().to(self.device), known)
            self.held |= {weight: value.cpu(), scale_of(weight): scale.float().cpu()}
        write_tensor(file, self.held.pop(entry.name))


def _card(source: str, format: str) -> str:
    return _CARD.format(source=source, format=format, inputs=_INPUTS[format])


_INPUTS = {
    "fp8": "Inputs of experts and linear layers are rounded by token as well.",
    "fp8-experts": "These are the experts'; their inputs are rounded by token as well.",
    "fp8-w8a16": "These are the experts'; their inputs stay in 16 bits.",
}
_CARD = """\
# {source} in {format}

Weights of {source}, rounded to e4m3 with one scale an output channel by mogul, in the
compressed-tensors format. {inputs} Embeddings, norms, routers and the output head are as they were.

```python
from mogul.serve import Engine

engine = Engine.from_pretrained("path/to/this")
```

Made with `mogul quantise {source} --to {format}`. The licence of the source holds for this
model as well.
"""
