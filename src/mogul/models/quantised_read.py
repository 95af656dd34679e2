"""Open a checkpoint whose weights are quantised already, with its own numbers and scales.

Decides how what lies on disk becomes packed modules: matrices and scales of one layer are read,
fused as the model's class wants them, and go to the device; nothing is rounded again. Which layers
are packed, their scales on disk say. All other tensors go through Transformers' loader.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.log import progress, say
from mogul.kernels import ExpertFormat, QuantisedExperts
from mogul.kernels.quant_format import FP8, dequantise_fp8
from mogul.models.check_tensors import check_names, names
from mogul.models.compressed_tensors import KEY, method_of, scale_of, stored_format
from mogul.models.experts import layout_of
from mogul.models.load import _dtype, _load, _skeleton, _stored, find_folder, load_config
from mogul.models.quantise import PackedExperts, experts_modules, refuse_saving
from mogul.models.quantise_linears import PackedLinear, linear_modules
from mogul.models.quantise_load import _fused, _pieces, _settle, _without
from mogul.models.tensor_file import WITH_FP8, StoredTensor, stored_tensors

_AGAIN = "fetch the files again"


def is_quantised(path: str | Path) -> bool:
    """Whether a checkpoint's weights are quantised, in whatever way."""
    return method_of(find_folder(path)) is not None


def load_stored(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
) -> PreTrainedModel:
    """Load a checkpoint that is quantised already, as `mogul quantise` and others write them.

    Experts and linear layers multiply e4m3 by the scales on disk. Linear layers whose inputs stay
    in 16 bits are widened instead: only experts multiply such rows.

    Args:
        path: a folder with `config.json` and safetensors, or a hub id.
        dtype: of everything else; "auto" is as stored.
        device: where the model goes. None is the CPU.

    Raises:
        ArtifactError: a scheme that mogul does not read, a damaged file, tensors or scales
            missing, surplus or misshaped, by name.
        ConfigError: the checkpoint is not quantised.
    """
    folder = find_folder(path)
    format = stored_format(folder)
    if format is None:
        raise ConfigError(
            f"{folder} is not quantised", fix="use load_model, or load_quantised with a format"
        )
    config = unquantised(load_config(folder))
    skeleton = _skeleton(config)
    places = stored_tensors(folder, WITH_FP8)
    layers = _packed_layers(folder, skeleton, places)
    scales = {scale_of(name) for pieces in layers.values() for name in _names(pieces)}
    entries = {name: entry for name, entry in _stored(folder).items() if name not in scales}
    skipped = check_names(folder, skeleton, entries) | scales
    with _without(type(skeleton), list(layers)):
        model = _load(folder, config, skipped, dtype=_dtype(dtype), experts={})
    target = torch.device(device or "cpu")
    model = model.to(target)  # pyright: ignore[reportArgumentType]
    found = dict(skeleton.named_modules())
    with progress(f"reading {format.name}", len(layers)) as bar:
        for name, pieces in layers.items():
            reader = _Reader(folder, places, target, model.dtype)
            model.set_submodule(name, reader.module(found[name], pieces, format))
            _settle(model.get_submodule(name))
            bar.advance()
    say(f"{len(layers)} layers in {format.name} as stored")
    refuse_saving(model)
    return model.eval()


def unquantised(config: PreTrainedConfig) -> PreTrainedConfig:
    """A config that no longer asks Transformers to open quantised weights itself."""
    if hasattr(config, KEY):
        delattr(config, KEY)
    return config


def _names(pieces: Mapping[str, list[str]]) -> Iterator[str]:
    return chain.from_iterable(pieces.values())


def _packed_layers(
    folder: Path, skeleton: PreTrainedModel, places: Mapping[str, StoredTensor]
) -> dict[str, dict[str, list[str]]]:
    """Names of the layers that are stored with scales, and their tensors by parameter."""
    layers: dict[str, dict[str, list[str]]] = {}
    for name, module in (*experts_modules(skeleton), *linear_modules(skeleton)):
        pieces = _pieces(folder, skeleton, name, module)
        if any(scale_of(tensor) in places for tensor in _names(pieces)):
            layers[name] = pieces
    packed = {tensor for pieces in layers.values() for tensor in _names(pieces)}
    short = sorted(name for name, place in places.items() if place.dtype == FP8)
    if alone := [name for name in short if scale_of(name) not in places]:
        raise ArtifactError(
            f"{folder}: {len(alone)} weights have no scale ({names(alone)})", fix=_AGAIN
        )
    if odd := [name for name in short if name not in packed]:
        raise ArtifactError(
            f"{folder} stores {len(odd)} weights in 8 bits that mogul keeps in 16 ({names(odd)})",
            fix="leave embeddings, routers and the output head unquantised",
        )
    if not layers:
        raise ArtifactError(f"{folder}: no weight has a scale", fix=_AGAIN)
    return layers


class _Reader:
    """Reads one layer of a checkpoint after the other."""

    def __init__(
        self, folder: Path, places: Mapping[str, StoredTensor], device: torch.device, dtype: Any
    ) -> None:
        self.folder, self.places = folder, places
        self.device, self.dtype = device, dtype

    def module(
        self, module: nn.Module, pieces: Mapping[str, list[str]], format: ExpertFormat
    ) -> nn.Module:
        """What stands in the place of `module` (of the meta device)."""
        if isinstance(module, nn.Linear):
            return self._linear(module, pieces, format)
        layout = layout_of(module)
        if layout.is_transposed or not layout.is_concatenated:
            raise ArtifactError(
                f"{self.folder}: experts of {type(module).__name__} are not stored by rows",
                fix="open the unquantised checkpoint",
            )
        tensors: dict[str, Tensor] = {}
        first = "gate_up_proj" if layout.has_gate else "up_proj"
        for parameter, of in ((first, "gate_up"), ("down_proj", "down")):
            shape = getattr(module, parameter).shape
            tensors[f"{of}_value"], tensors[f"{of}_scale"] = self._matrix(pieces[parameter], shape)
            if f"{parameter}_bias" in pieces:
                tensors[f"{of}_bias"] = self._plain(module, f"{parameter}_bias", pieces)
        return PackedExperts(QuantisedExperts.of_tensors(tensors, format, layout))

    def _linear(
        self, module: nn.Linear, pieces: Mapping[str, list[str]], format: ExpertFormat
    ) -> nn.Module:
        shape = torch.Size((1, *module.weight.shape))
        value, scale = (each[0] for each in self._matrix(pieces["weight"], shape))
        bias = self._plain(module, "bias", pieces) if "bias" in pieces else None
        if not format.weight_only:
            return PackedLinear(value, scale, bias)
        wide = nn.Linear(module.in_features, module.out_features, bias is not None, device="meta")
        wide.weight = nn.Parameter(dequantise_fp8(value, scale, self.dtype), requires_grad=False)
        if bias is not None:
            wide.bias = nn.Parameter(bias, requires_grad=False)
        return wide

    def _plain(self, module: nn.Module, name: str, pieces: Mapping[str, list[str]]) -> Tensor:
        shape = getattr(module, name).shape
        fused = _fused(self.folder, self.places, pieces[name], shape)
        return fused.to(self.device, self.dtype)

    def _matrix(self, found: list[str], shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Values [E, N, C] and scales [E, N]: a tensor an expert and part on disk."""
        experts, rows, columns = shape
        parts = max(1, len(found) // experts)
        height = rows // parts
        values = torch.empty(shape, dtype=FP8, device=self.device)
        scales = torch.empty((experts, rows), dtype=torch.float32, device=self.device)
        for at, name in enumerate(found):
            part, expert = divmod(at, experts)
            where = slice(part * height, (part + 1) * height)
            value, scale = self._pair(name, (height, columns))
            values.view(torch.uint8)[expert, where] = value.view(torch.uint8).to(self.device)
            scales[expert, where] = scale.to(self.device)
        return values, scales

    def _pair(self, name: str, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        if absent := [one for one in (name, scale_of(name)) if one not in self.places]:
            raise ArtifactError(f"{self.folder}: {absent[0]} is missing", fix=_AGAIN)
        value, scale = (self.places[one].read() for one in (name, scale_of(name)))
        if value.dtype != FP8 or value.shape != shape:
            raise ArtifactError(
                f"{self.folder}: {name} is {value.dtype} {list(value.shape)}, not e4m3 "
                f"{list(shape)}",
                fix=_AGAIN,
            )
        if scale.numel() not in (1, shape[0]):
            raise ArtifactError(
                f"{self.folder}: {scale_of(name)} has {scale.numel()} numbers for {shape[0]} "
                "channels",
                fix=_AGAIN,
            )
        scale = scale.float().flatten()
        if not bool((scale.isfinite() & (scale >= 0)).all()):
            raise ArtifactError(
                f"{self.folder}: {scale_of(name)} holds numbers that are no scales",
                fix=_AGAIN,
            )
        return value, scale.expand(shape[0])
