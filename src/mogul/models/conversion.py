"""Tensor names on disk: one tensor an expert, both for our models and for released checkpoints.

Transformers fuses the experts on load and splits them again on save. Pangu Pro MoE keeps its
`router_scale` beside the router, as [1, E] or [E]: it is flattened on load, and saved in the
shape it had. Names that a Pangu checkpoint may hold but no model has are listed in `PANGU_SKIPPED`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
)

# Left-overs of the training code in released files; the first three are no part of the model.
PANGU_SKIPPED = re.compile(r"rotary_emb\.inv_freq|module|kv_cache_offset$")
RELEASED_SCALE_NAME, SCALE_NAME = "mlp.router_scale", "mlp.gate.router_scale"


class FlattenScale(ConversionOps):
    """Load `router_scale` [1, E] or [E] as [E], and leave a note of its shape at the router."""

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the flat tensor under the target's name."""
        scale = _only(input_dict)
        _router(kwargs).released_scale_shape = tuple(scale.shape)
        return {target_patterns[0]: scale[0] if scale.ndim == 2 and len(scale) == 1 else scale}

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation for saving."""
        return RestoreScale()


class RestoreScale(ConversionOps):
    """Save `router_scale` in the shape it was loaded with; [1, E] for a new model."""

    @torch.no_grad()
    def convert(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the tensor in its released shape."""
        scale = _only(input_dict)
        shape = getattr(_router(kwargs), "released_scale_shape", (1, scale.numel()))
        return {target_patterns[0]: scale.reshape(shape)}

    @property
    def reverse_op(self) -> ConversionOps:
        """The operation for loading."""
        return FlattenScale()


def _only(tensors: dict[str, Any]) -> Tensor:
    (value,) = tensors.values()
    return value[0] if isinstance(value, list) else value


def _router(kwargs: dict[str, Any]) -> Any:
    """The router whose scale is converted; the name is the released one when saving."""
    name: str = kwargs["full_layer_name"]
    if SCALE_NAME not in name:
        name = name.replace(RELEASED_SCALE_NAME, SCALE_NAME)
    model = kwargs["model"]
    try:
        return model.get_submodule(name.rpartition(".")[0])
    except AttributeError:  # the base model: its names lack the prefix of the language model
        return model.get_submodule(name.removeprefix("model.").rpartition(".")[0])


def _per_expert() -> list[WeightConverter | WeightRenaming]:
    return [
        WeightConverter(
            ["mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"],
            "mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            "mlp.experts.*.down_proj.weight",
            "mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def register() -> None:
    """Tell Transformers how our model types stand on disk; calling it again changes nothing."""
    scale = WeightConverter(RELEASED_SCALE_NAME, SCALE_NAME, operations=[FlattenScale()])
    register_checkpoint_conversion_mapping("moge", _per_expert(), overwrite=True)
    register_checkpoint_conversion_mapping("PanguProMoE", [*_per_expert(), scale], overwrite=True)
