"""Compare the tensors of a checkpoint with those its model has, by name and shape.

The expected names come from the model on the meta device with its conversions reversed, so the
comparison needs no weight. Left-overs that released Pangu files may hold are skipped, each with a
visible line.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mogul.core.errors import ArtifactError
from mogul.core.log import say
from mogul.models.conversion import PANGU_SKIPPED
from mogul.models.moge.configuration_moge import MogeConfig
from mogul.spec.checkpoint import TensorEntry

CACHE_SCALES = (".k_scale", ".v_scale")
"""Scales of an fp8 cache, which an engine reads by itself (`serve/kv_scales.py`)."""


def check_names(
    folder: Path, skeleton: PreTrainedModel, stored: Mapping[str, TensorEntry]
) -> set[str]:
    """Compare names and shapes; return the names to leave out, or raise naming the rest.

    For other families the files may follow an older layout that Transformers renames on load;
    there its own report, read after loading, is the judge.
    """
    if not isinstance(skeleton.config, MogeConfig):
        return set()
    expected = expected_shapes(skeleton)
    unknown = set(stored) - set(expected)
    skipped = unknown & mtp_copies(skeleton.config)
    skipped |= {name for name in unknown if name.endswith(CACHE_SCALES)}
    if skeleton.config.model_type == "PanguProMoE":
        skipped |= {n for n in unknown if PANGU_SKIPPED.search(n)}
    for name in sorted(skipped):
        say(f"{folder.name}: skipped {name}, which is no part of the model")
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    missing = sorted(set(expected) - set(stored) - tied)
    surplus = sorted(set(stored) - set(expected) - skipped)
    misshaped = [
        f"{name} {list(stored[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in stored and not _fits(name, stored[name].shape, shape)
    ]
    raise_if_any(folder, missing, surplus, misshaped)
    return skipped


def mtp_copies(config: MogeConfig) -> set[str]:
    """Names under which an MTP layer may hold copies of the embedding and the head it shares."""
    layer = f"model.layers.{config.num_hidden_layers}"
    shared = ("embed_tokens.weight", "shared_head.head.weight")
    return {f"{layer}.{name}" for name in shared} if config.num_nextn_predict_layers else set()


def expected_shapes(skeleton: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Names and shapes on disk of a model on the meta device."""
    on_disk = revert_weight_conversion(skeleton, skeleton.state_dict())
    return {name: tuple(tensor.shape) for name, tensor in on_disk.items()}


def _fits(name: str, given: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return given == expected or (name.endswith("mlp.router_scale") and given == expected[1:])


def raise_if_any(
    folder: Path, missing: list[str], surplus: list[str], misshaped: list[str]
) -> None:
    """Raise ArtifactError telling how many tensors are at fault, and the first of them."""
    faults = {"missing": missing, "surplus": surplus, "misshaped": misshaped}
    told = [f"{len(each)} {word} ({names(each)})" for word, each in faults.items() if each]
    if told:
        raise ArtifactError(
            f"{folder}: the tensors do not fit config.json: {'; '.join(told)}",
            fix="check that config.json belongs to these weights, or fetch the files again",
        )


def tell_casts(model: PreTrainedModel, stored: Mapping[str, TensorEntry]) -> None:
    """Say which stored dtypes the model does not hold: a saved copy would differ there."""
    held = {_short(tensor.dtype) for tensor in model.state_dict().values()}
    for dtype in sorted({tensor.dtype for tensor in stored.values()} - held):
        cast = sorted(name for name, tensor in stored.items() if tensor.dtype == dtype)
        say(f"stored as {dtype}, held as {model.dtype}: {names(cast)}")


def names(tensors: list[str], limit: int = 6) -> str:
    """The first few names, and how many more."""
    more = f" and {len(tensors) - limit} more" if len(tensors) > limit else ""
    return ", ".join(tensors[:limit]) + more


def _short(dtype: Any) -> str:
    words = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}
    name = str(dtype).removeprefix("torch.")
    return words.get(name, name)
