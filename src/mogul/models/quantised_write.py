"""Write a checkpoint with its experts and linear layers in fp8, tensor by tensor.

Decides which tensors on disk are quantised (those of the layers that `load_quantised` takes) and
that the numbers are the ones it would make: a row's scale depends on that row alone, so nothing is
fused first. Memory holds one file of the new checkpoint. The folder appears whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_folder, check_space, read_object
from mogul.core.log import progress
from mogul.core.units import GB
from mogul.kernels.quant_format import quantise_fp8_weight
from mogul.models.check_tensors import check_names
from mogul.models.compressed_tensors import KEY, described, method_of, scale_of
from mogul.models.input_stats import InputStats
from mogul.models.load import _skeleton, _stored, find_folder, load_config
from mogul.models.new_checkpoint import check_out, copy_files
from mogul.models.quantise import Importance, experts_modules, no_experts
from mogul.models.quantise_linears import linear_modules
from mogul.models.quantise_load import WeightFormat, _pieces, weight_format
from mogul.models.tensor_file import StoredTensor, stored_tensors
from mogul.spec.checkpoint import INDEX, SINGLE

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

    `load_stored`, the engine and vLLM open it. Its numbers are those that `load_quantised` makes
    from the same arguments. Tokenizer, chat template, generation config and licence come along.

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
    found: dict[str, nn.Module] = dict(experts_modules(skeleton))
    num_experts = len(found)
    if what.linears:
        found |= dict(linear_modules(skeleton))
    if not found:
        raise no_experts(skeleton)
    if importance is not None:
        importance.check(found, f"the statistics for {source}")
    places = stored_tensors(source)
    todo = _todo(source, skeleton, found, importance)
    if absent := [name for name in todo if name not in places]:
        raise ArtifactError(
            f"{source}: {len(absent)} tensors are missing, first {absent[0]}",
            fix="fetch the files again",
        )
    num_bytes = _bytes_after(places, todo)
    with atomic_folder(out, force=force) as work:
        check_space(out, num_bytes)
        content = read_object(source / "config.json")
        content[KEY] = described(what.experts, _kept(places, todo))
        (work / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        copy_files(source, work)
        (work / "README.md").write_text(_card(source.resolve().name, format), encoding="utf-8")
        _write(work, places, _tensors(places, todo, device), max_file_bytes)
    before = sum(place.num_bytes for place in places.values())
    return QuantiseReport(out, format, num_experts, len(found) - num_experts, before, num_bytes)


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


def _bytes_after(places: Mapping[str, StoredTensor], todo: Mapping[str, Tensor | None]) -> int:
    total = 0
    for name, place in places.items():
        rows, columns = place.shape if name in todo else (0, 0)
        total += rows * columns + 4 * rows if name in todo else place.num_bytes
    return total


def _tensors(
    places: Mapping[str, StoredTensor],
    todo: Mapping[str, Tensor | None],
    device: str | torch.device,
) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the new checkpoint, a scale behind its weight."""
    for name, place in places.items():
        tensor = place.read()
        if name not in todo:
            yield name, tensor
            continue
        known = todo[name]
        known = None if known is None else known.to(device)
        value, scale = quantise_fp8_weight(tensor.to(device), known)
        yield name, value.cpu()
        yield scale_of(name), scale.float().cpu()[:, None]


def _write(
    work: Path,
    places: Mapping[str, StoredTensor],
    tensors: Iterator[tuple[str, Tensor]],
    max_file_bytes: int,
) -> None:
    """Fill files in order; they get their names when it is known how many there are."""
    parts: list[list[str]] = []
    held: dict[str, Tensor] = {}

    def put() -> None:
        part = work / f"part-{len(parts)}"
        save_file(held, part, metadata={"format": "pt"})
        part.chmod((work / "config.json").stat().st_mode)  # the library writes for the owner alone
        parts.append(list(held))
        held.clear()

    total = 0
    with progress("quantise", total=sum(place.num_bytes for place in places.values())) as bar:
        for name, tensor in tensors:
            if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > max_file_bytes:
                put()
            held[name] = tensor.contiguous()
            total += tensor.nbytes
            if name in places:
                bar.advance(places[name].num_bytes, note=name.removeprefix("model."))
        put()
    if len(parts) == 1:
        (work / "part-0").rename(work / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        (work / f"part-{number}").rename(work / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (work / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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
