"""fp8 checkpoints in the compressed-tensors format, which vLLM and others read and write.

Decides which of its schemes mogul knows: weights in e4m3 with one scale an output channel or one a
matrix, and inputs that are rounded by token as they come, or left in 16 bits. `config.json` says in
`quantization_config` what happens to inputs; which layers are quantised their tensors say: beside
`NAME.weight` [N, C] lies `NAME.weight_scale` [N, 1] or [1].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mogul.core.errors import ArtifactError
from mogul.core.files import read_object
from mogul.kernels.quant_format import FORMATS, ExpertFormat

KEY = "quantization_config"
METHOD = "compressed-tensors"
LAYOUTS = ("float-quantized", "naive-quantized")
"""Its names for numbers that lie in the file as they are multiplied."""
_UNQUANTISED = "open the unquantised checkpoint, with quantise='fp8' where memory is short"


def scale_of(weight: str) -> str:
    """The name of a weight's scale."""
    return f"{weight}_scale"


def method_of(folder: Path) -> str | None:
    """How a checkpoint says it is quantised, in its own word; None where it is not."""
    content = read_object(folder / "config.json").get(KEY)
    if content is None:
        return None
    return str(content.get("quant_method", "unnamed")) if isinstance(content, dict) else "unnamed"


def stored_format(folder: Path) -> ExpertFormat | None:
    """The format of a checkpoint's quantised weights; None where none are.

    Raises:
        ArtifactError: a scheme that mogul cannot run as it is meant, by name.
    """
    method = method_of(folder)
    if method is None:
        return None
    if method != METHOD:
        raise ArtifactError(
            f"{folder} is quantised by {method!r}, which mogul cannot read", fix=_UNQUANTISED
        )
    content: dict[str, Any] = read_object(folder / "config.json")[KEY]
    groups = content.get("config_groups")
    found = list(groups.values()) if isinstance(groups, dict) else []
    if not found or not all(isinstance(group, dict) for group in found):
        raise ArtifactError(f"{folder}: {KEY} has no config_groups", fix="fetch config.json again")
    formats = {_format_of(folder, content, group) for group in found}
    if len(formats) > 1:
        raise ArtifactError(
            f"{folder} quantises the inputs of some layers and not of others", fix=_UNQUANTISED
        )
    return formats.pop()


def _format_of(folder: Path, content: dict[str, Any], group: dict[str, Any]) -> ExpertFormat:
    layout = group.get("format") or content.get("format")
    weights, inputs = (_object(group, part) for part in ("weights", "input_activations"))
    if layout not in LAYOUTS or _numbers(weights) != ("float", 8):
        raise ArtifactError(
            f"{folder} stores weights as {layout}, {' '.join(map(str, _numbers(weights)))} bits; "
            "mogul reads float 8 (e4m3)",
            fix=_UNQUANTISED,
        )
    if weights.get("strategy") not in ("channel", "tensor") or weights.get("dynamic"):
        raise ArtifactError(
            f"{folder} scales weights by {weights.get('strategy')}; mogul reads one scale "
            "an output channel or one a matrix",
            fix=_UNQUANTISED,
        )
    if group.get("output_activations"):
        raise ArtifactError(f"{folder} rounds outputs; mogul leaves them", fix=_UNQUANTISED)
    if not inputs:
        return FORMATS["fp8-w8a16"]
    if _numbers(inputs) != ("float", 8) or inputs.get("strategy") != "token":
        raise ArtifactError(
            f"{folder} scales inputs by {inputs.get('strategy')}, "
            f"{' '.join(map(str, _numbers(inputs)))} bits; mogul rounds each token to e4m3",
            fix=_UNQUANTISED,
        )
    if inputs.get("dynamic") is not True:
        raise ArtifactError(
            f"{folder} has fixed scales of inputs; mogul takes each token's largest number",
            fix=_UNQUANTISED,
        )
    return FORMATS["fp8"]


def _object(group: dict[str, Any], part: str) -> dict[str, Any]:
    found = group.get(part)
    return found if isinstance(found, dict) else {}


def _numbers(part: dict[str, Any]) -> tuple[Any, Any]:
    return part.get("type"), part.get("num_bits")


def described(format: ExpertFormat, kept: Sequence[str]) -> dict[str, Any]:
    """What `quantization_config` says of weights with a scale an output channel.

    Args:
        format: fp8, or fp8-w8a16 (inputs are left in 16 bits).
        kept: names of the linear layers that stay as they are.
    """
    rounded = {"num_bits": 8, "type": "float", "symmetric": True}
    by_token = {**rounded, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": {**rounded, "strategy": "channel", "dynamic": False},
        "input_activations": None if format.weight_only else by_token,
        "output_activations": None,
    }
    return {
        "quant_method": METHOD,
        "format": LAYOUTS[0],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": list(kept),
        "kv_cache_scheme": None,
    }
