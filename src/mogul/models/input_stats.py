"""What the layers of a checkpoint multiply, in a file beside it: quantising rounds better by it.

`input_stats.safetensors` holds the mean square of every input of experts and linear layers, under
the layers' own names, and says which weights they were measured on. Decides when such a file is
refused: another model's, one of weights that have changed since, or one that lacks a layer which
runs. Layers that a plain forward does not run (multi-token prediction) have no statistics.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from mogul.core.errors import ArtifactError, ConfigError
from mogul.core.files import atomic_write
from mogul.models.expert_inputs import expert_inputs
from mogul.models.load import find_folder
from mogul.models.quantise import Importance, experts_modules
from mogul.models.quantise_linears import linear_inputs, linear_modules
from mogul.spec.fingerprint import weights_hash

FILE = "input_stats.safetensors"
FORMAT = "1"
_PARTS = ("gate_up_inputs", "down_inputs", "inputs")
_AGAIN = "measure them anew: mogul calibrate MODEL"


@dataclass(frozen=True)
class InputStats:
    """Mean squares of the inputs of a model's experts and linear layers."""

    importance: Mapping[str, Importance | Tensor]
    """By the name of the module: of both matmuls of experts, or [C] of a linear layer."""

    num_tokens: int
    weights: str
    """`weights_hash` of the checkpoint; empty where a model in memory was measured."""

    unseen: tuple[str, ...] = ()
    """Layers that no forward ran."""

    sources: tuple[str, ...] = ()
    """Names of the texts, with the start of their hashes."""

    def save(self, folder: str | Path) -> Path:
        """Write the file where `read_stats` finds it, beside the checkpoint."""
        tensors: dict[str, Tensor] = {}
        for name, found in self.importance.items():
            parts = (found,) if isinstance(found, Tensor) else found
            ends = _PARTS[2:] if isinstance(found, Tensor) else _PARTS[:2]
            for end, part in zip(ends, parts, strict=True):
                tensors[f"{name}.{end}"] = part.detach().to("cpu", torch.bfloat16).contiguous()
        about = {
            "format": FORMAT,
            "weights": self.weights,
            "num_tokens": str(self.num_tokens),
            "unseen": json.dumps(self.unseen),
            "sources": json.dumps(self.sources),
        }
        path = Path(folder) / FILE
        atomic_write(path, save(tensors, about))
        return path

    def check(self, found: Mapping[str, nn.Module], where: str) -> None:
        """Refuse statistics that do not fit the layers which shall be quantised.

        Args:
            found: names and modules, of any device.
            where: for the error.

        Raises:
            ArtifactError: a layer lacks, or has inputs of another shape.
        """
        lacking = [name for name in found if name not in {*self.importance, *self.unseen}]
        if lacking:
            raise ArtifactError(
                f"{where} says nothing of {len(lacking)} layers, first {lacking[0]}", fix=_AGAIN
            )
        for name, module in found.items():
            if name in self.importance and (words := _misfit(module, self.importance[name])):
                raise ArtifactError(f"{where}: {name} {words}", fix=_AGAIN)


def _misfit(module: Any, found: Importance | Tensor) -> str:
    """What is wrong with a layer's statistics; nothing where they fit."""
    if isinstance(module, nn.Linear):
        want: list[tuple[int, ...]] = [(module.in_features,)]
    else:
        from mogul.models.experts import layout_of

        layout = layout_of(module)
        first = getattr(module, "gate_up_proj" if layout.has_gate else "up_proj")
        experts, width, inner = layout.sizes(first, module.down_proj)
        want = [(experts, width), (experts, inner)]
    have = [tuple(part.shape) for part in ((found,) if isinstance(found, Tensor) else found)]
    if have != want:
        return f"has inputs {want}, but statistics of {have}"
    parts = (found,) if isinstance(found, Tensor) else found
    if not all(bool((part.isfinite() & (part >= 0)).all()) for part in parts):
        return "has statistics that are no mean squares"
    return ""


def read_stats(path: str | Path, *, checkpoint: str | Path | None = None) -> InputStats | None:
    """The statistics in a folder or file; None where a folder has none.

    Args:
        path: a checkpoint folder, hub id, or the file itself.
        checkpoint: folder of the weights they must belong to; None asks nothing.

    Raises:
        ArtifactError: a damaged file, a file that lacks, or statistics of other weights.
    """
    file = Path(path)
    if file.suffix != ".safetensors":
        file = find_folder(path) / FILE
        if not file.exists():
            return None
    try:
        with safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}", fix=_AGAIN) from error
    if about.get("format") != FORMAT:
        raise ArtifactError(f"{file} holds no input statistics that this mogul reads", fix=_AGAIN)
    try:
        num_tokens, weights = int(about["num_tokens"]), about["weights"]
        unseen, sources = (tuple(json.loads(about[key])) for key in ("unseen", "sources"))
    except (KeyError, ValueError, TypeError) as error:
        raise ArtifactError(
            f"{file} says not what it was measured on: {error}", fix=_AGAIN
        ) from error
    stats = InputStats(_settle(file, tensors), num_tokens, weights, unseen, sources)
    if checkpoint is not None and stats.weights not in ("", weights_hash(find_folder(checkpoint))):
        raise ArtifactError(f"{file} was measured on other weights", fix=_AGAIN)
    return stats


def _settle(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Importance | Tensor]:
    found: dict[str, Importance | Tensor] = {}
    for key in tensors:
        name, _, end = key.rpartition(".")
        if end not in _PARTS:
            raise ArtifactError(f"{file}: {key} is no statistic of inputs", fix=_AGAIN)
        if end == "inputs":
            found[name] = tensors[key]
            continue
        pair = [f"{name}.{part}" for part in _PARTS[:2]]
        if not all(part in tensors for part in pair):
            raise ArtifactError(f"{file}: {name} has statistics of one matmul only", fix=_AGAIN)
        found[name] = Importance(*(tensors[part] for part in pair))
    return found


def measure_stats(
    model: Any,
    batches: Iterable[Tensor],
    *,
    checkpoint: str | Path | None = None,
    sources: Sequence[str] = (),
) -> InputStats:
    """Run batches of token ids [B, L] through an unquantised model.

    Args:
        model: of any family; experts, linear layers of its decoder blocks, or both are measured.
        batches: a few thousand tokens of text like that to be served.
        checkpoint: folder of the model's weights, which the statistics are then tied to.
        sources: what text it was.

    Raises:
        ConfigError: nothing in the model can be quantised, or there is no token.
    """
    todo = [batch.to(model.device) for batch in batches]
    num_tokens = sum(batch.numel() for batch in todo)
    if not num_tokens:
        raise ConfigError("no tokens to measure inputs on", fix="give more text")
    experts = [name for name, _ in experts_modules(model)]
    linears = [name for name, _ in linear_modules(model)]
    if not experts and not linears:
        raise ConfigError(
            f"{type(model).__name__} has no layer that quantises",
            fix="calibrate a model with experts or linear layers",
        )
    found: dict[str, Importance | Tensor] = {}
    if experts:
        found.update(expert_inputs(model, todo))
    if linears:
        found.update(linear_inputs(model, todo))
    unseen = tuple(name for name in (*experts, *linears) if name not in found)
    weights = weights_hash(find_folder(checkpoint)) if checkpoint is not None else ""
    return InputStats(found, num_tokens, weights, unseen, tuple(sources))
