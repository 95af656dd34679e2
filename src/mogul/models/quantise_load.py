"""Open a model with quantised weights, layer by layer: the whole model never exists.

Decides how the tensors of what is quantised are found: Transformers' own conversions, reversed on
the meta device, name the tensors on disk of every fused one; they are read, fused and quantised one
layer at a time. All other tensors go through Transformers' loader. Random weights are drawn and
quantised as each decoder block is built. Peak: the quantised model and one layer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mogul.core.errors import ArtifactError, ConfigError, nearest
from mogul.core.log import progress
from mogul.kernels import ExpertFormat, expert_format
from mogul.kernels.quant_format import FORMATS
from mogul.models.check_tensors import check_names
from mogul.models.compressed_tensors import method_of
from mogul.models.input_stats import InputStats
from mogul.models.load import _dtype, _load, _skeleton, _stored, find_folder, load_config
from mogul.models.quantise import (
    Importance,
    PackedExperts,
    experts_modules,
    no_experts,
    quantise_module,
    refuse_saving,
)
from mogul.models.quantise_head import quantise_head
from mogul.models.quantise_linears import (
    PackedLinear,
    linear_modules,
    linears_of,
)
from mogul.models.tensor_file import StoredTensor, stored_tensors

WEIGHTS = ("fp8", "fp8-all", "fp8-experts", *(name for name in FORMATS if name != "fp8"))
"""What a model's weights can be quantised to: `fp8` takes experts and linear layers, `fp8-all` the
output head too (`quantise_head.py`), the others experts alone."""


class WeightFormat(NamedTuple):
    """What is quantised."""

    experts: ExpertFormat
    linears: bool
    head: bool


def weight_format(name: str) -> WeightFormat:
    """What a name of `WEIGHTS` quantises.

    Raises:
        ConfigError: no such format.
    """
    if name not in WEIGHTS:
        raise ConfigError(f"quantise {name!r} is unknown", fix=nearest(name, WEIGHTS))
    experts = expert_format(name.removesuffix("-experts").removesuffix("-all"))
    return WeightFormat(experts, name in ("fp8", "fp8-all"), name == "fp8-all")


def layers_to_quantise(skeleton: nn.Module, *, linears: bool) -> dict[str, nn.Module]:
    """Experts, and where asked linear layers of the decoder blocks, by name.

    Raises:
        ConfigError: the model has neither.
    """
    found: dict[str, nn.Module] = dict(experts_modules(skeleton))
    if linears:
        found |= dict(linear_modules(skeleton))
    if not found:
        raise no_experts(skeleton)
    return found


def packed_format(model: nn.Module) -> str | None:
    """In what a model's quantised weights are held; None where it has none."""
    modules = list(model.modules())
    experts = (module.format.name for module in modules if isinstance(module, PackedExperts))
    linear = "fp8" if any(isinstance(module, PackedLinear) for module in modules) else None
    return next(experts, linear)


def load_quantised(
    path: str | Path,
    format: str | ExpertFormat,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    importance: InputStats | Mapping[str, Importance | Tensor] | None = None,
    linears: bool = False,
    head: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint and quantise its experts, and its linear layers, on the way.

    Args:
        path: a folder with `config.json` and safetensors, or a hub id.
        format: of the experts: fp8, fp8-w8a16, int4-32, int4-64 or int4-128.
        dtype: of everything else; "auto" is as stored.
        device: where the model goes; each layer is quantised there. None is the CPU.
        importance: from `read_stats` or `measure_stats` of the unquantised model, or a mapping
            from `expert_inputs` and `linear_inputs`.
        linears: make linear layers of the decoder blocks fp8; a dense model then needs no experts.
        head: make the output head whole numbers of 8 bits.

    Raises:
        ArtifactError: a damaged file, or tensors missing, surplus or misshaped, by name; statistics
            of another model.
        ConfigError: no experts, an unknown format, or a checkpoint that is quantised already.
    """
    chosen, folder = expert_format(format), find_folder(path)
    if method_of(folder) is not None:
        raise ConfigError(
            f"{folder} is quantised already", fix="leave quantise out, or use load_stored"
        )
    config = load_config(folder)
    skeleton = _skeleton(config)
    skipped = check_names(folder, skeleton, _stored(folder))
    found = layers_to_quantise(skeleton, linears=linears)
    if isinstance(importance, InputStats):
        importance.check(found, f"the statistics for {folder}")
        importance = importance.importance
    places = stored_tensors(folder)
    pieces = {name: _pieces(folder, skeleton, name, module) for name, module in found.items()}
    with _without(type(skeleton), list(found)):
        model = _load(folder, config, skipped, dtype=_dtype(dtype), experts={})
    target = torch.device(device or "cpu")
    model = model.to(target)  # pyright: ignore[reportArgumentType]
    with progress(f"quantising to {chosen.name}", len(found)) as bar:
        for name, module in found.items():
            for parameter, names in pieces[name].items():
                weight = _fused(folder, places, names, getattr(module, parameter).shape)
                kept = weight.to(target, model.dtype)
                setattr(module, parameter, nn.Parameter(kept, requires_grad=False))
            model.set_submodule(name, _packed(module, chosen, (importance or {}).get(name)))
            for parameter in pieces[name]:
                setattr(module, parameter, None)  # let the unquantised layer go
            _settle(model.get_submodule(name))
            bar.advance()
    if head:
        quantise_head(model)
    refuse_saving(model)
    return model.eval()


def _packed(
    module: nn.Module, format: ExpertFormat, importance: Importance | Tensor | None = None
) -> nn.Module:
    is_linear = isinstance(importance, Tensor)
    if isinstance(module, nn.Linear):
        return PackedLinear.of(module, importance if is_linear else None)
    return quantise_module(module, format, None if is_linear else importance)


def _settle(module: nn.Module) -> None:
    """Move what is kept out of the blocks that quantising took: those then go back whole.

    An accelerator's allocator otherwise leaves holes beside every kept tensor, 20 GiB for 72
    billion weights.
    """
    device = next(chain(module.buffers(), module.parameters())).device
    if device.type not in ("cpu", "meta"):
        torch.accelerator.empty_cache()
        module._apply(torch.clone)


@contextmanager
def _without(model_class: type[PreTrainedModel], names: list[str]) -> Iterator[None]:
    """Models of this class are built without these modules; nobody misses their tensors."""
    build = model_class.__init__
    ignored = model_class._keys_to_ignore_on_load_unexpected

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        for name in names:
            self.set_submodule(name, nn.Identity())

    model_class.__init__ = init  # type: ignore[method-assign]
    patterns = [re.escape(name) for name in names]
    model_class._keys_to_ignore_on_load_unexpected = [*(ignored or ()), *patterns]
    try:
        yield
    finally:
        model_class.__init__ = build  # type: ignore[method-assign]
        model_class._keys_to_ignore_on_load_unexpected = ignored


@contextmanager
def quantised_as_built(
    skeleton: PreTrainedModel, format: ExpertFormat, *, linears: bool
) -> Iterator[None]:
    """Decoder blocks of this model's classes draw random weights and are quantised when built."""
    std = float(getattr(skeleton.config, "initializer_range", None) or 0.02)
    repeated = set(getattr(skeleton, "_no_split_modules", None) or ())
    builders = {
        kind: kind.__init__
        for kind in {type(module) for module in skeleton.modules()}
        if kind.__name__ in repeated
    }

    def wrapped(build: Any) -> Any:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            build(self, *args, **kwargs)
            found: list[tuple[str, nn.Module]] = list(experts_modules(self))
            found += linears_of(self) if linears else ()
            for name, module in found:
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter.normal_(0.0, std)
                self.set_submodule(name, _packed(module, format))
            names = [name for name, _ in found]
            found.clear()
            module = None  # the unquantised layer is let go
            for name in names:
                _settle(self.get_submodule(name))

        return init

    for kind, build in builders.items():
        kind.__init__ = wrapped(build)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for kind, build in builders.items():
            kind.__init__ = build  # type: ignore[method-assign]


def _pieces(
    folder: Path, skeleton: PreTrainedModel, name: str, module: nn.Module
) -> dict[str, list[str]]:
    """For every parameter of an experts module its tensors on disk, in the order of fusing."""
    found = {}
    for parameter, tensor in module.named_parameters():
        on_disk = revert_weight_conversion(skeleton, {f"{name}.{parameter}": tensor})
        count = sum(piece.numel() for piece in on_disk.values())
        if count != tensor.numel():
            raise ArtifactError(
                f"{folder}: {name}.{parameter} is stored in a way that cannot be read by layers",
                fix="open the unquantised checkpoint whole, and quantise_model",
            )
        found[parameter] = list(on_disk)
    return found


def _fused(
    folder: Path, places: Mapping[str, StoredTensor], names: list[str], shape: torch.Size
) -> Tensor:
    """One parameter [E, ...]: stored as it is, or one tensor an expert and part."""
    if absent := [name for name in names if name not in places]:
        raise ArtifactError(
            f"{folder}: {len(absent)} tensors of the experts are missing, first {absent[0]}",
            fix="fetch the files again",
        )
    if len(names) == 1:
        return places[names[0]].read().view(shape)
    experts = shape[0]
    tensors = [places[name].read() for name in names]
    parts = [
        torch.stack(tensors[first : first + experts]) for first in range(0, len(names), experts)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(shape)
