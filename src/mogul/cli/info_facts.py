"""Every number `mogul info` knows about a model, as plain data in base units."""

from __future__ import annotations

from typing import Any

from mogul.cli.find_config import FoundConfig
from mogul.core.errors import ConfigError
from mogul.spec import presets
from mogul.spec.balance import monte_carlo_imbalance
from mogul.spec.checkpoint import Checkpoint, read_checkpoint
from mogul.spec.families import Family, family_of, model_spec, text_config
from mogul.spec.grouping import Grouping
from mogul.spec.model import ModelSpec

DTYPES = ("fp32", "bf16", "fp8", "int4")
BATCH_TOKENS = 64
POWERS_OF_TWO = (1, 2, 4, 8, 16, 32, 64)


def collect(found: FoundConfig, devices: tuple[int, ...]) -> tuple[ModelSpec, dict[str, Any]]:
    """Read the shape, judge the device counts and check the files, where there are some."""
    spec = model_spec(found.config)
    facts = describe(spec, found)
    if spec.moe:
        facts["balanced_devices"] = list(spec.moe.grouping.legal_devices())
        facts["devices"] = judge_devices(spec.moe.grouping, devices)
    if found.folder and (checkpoint := read_checkpoint(found.folder)):
        facts["on_disk"] = _on_disk(checkpoint, family_of(found.config))
    facts["notes"] = _notes(spec, found)
    return spec, facts


def describe(spec: ModelSpec, found: FoundConfig) -> dict[str, Any]:
    """Describe the shape alone."""
    facts: dict[str, Any] = {
        "model": found.name,
        "source": found.source,
        "family": spec.family,
        "params": spec.params(),
        "active_params": spec.active_params(),
        "active_params_without_input_embedding": spec.active_params(input_embedding=False),
        "params_by_part": spec.breakdown(),
        "num_layers": spec.num_layers,
        "num_moe_layers": len(spec.moe_layers),
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "stored_dtype": spec.dtype,
        "weight_bytes": {dtype: spec.weight_bytes(dtype) for dtype in DTYPES},
        "expert_bytes_per_layer": {dtype: spec.expert_bytes_per_layer(dtype) for dtype in DTYPES},
        "kv_bytes_per_token": {
            "bf16": spec.kv_bytes_per_token(2),
            "fp8": spec.kv_bytes_per_token(1),
        },
        "attention": spec.attention.model_dump(),
    }
    if spec.max_positions:
        facts["max_positions"] = spec.max_positions
        facts["kv_bytes_per_full_sequence_bf16"] = spec.kv_bytes(spec.max_positions)
    if spec.moe:
        facts["moe"] = spec.moe.model_dump()
    return facts


def judge_devices(grouping: Grouping, devices: tuple[int, ...]) -> list[dict[str, Any]]:
    """Say for each count whether equal rows are certain, and how unequal chance leaves them."""
    legal = grouping.legal_devices()
    fitting = (count for count in POWERS_OF_TWO if not grouping.num_experts % count)
    return [_judge(grouping, count) for count in sorted({*(devices or (*legal, *fitting))})]


def _judge(grouping: Grouping, count: int) -> dict[str, Any]:
    if count < 1:
        raise ConfigError(f"--devices {count} is no number of devices", fix="use 1 or more")
    is_balanced, fits = count in grouping.legal_devices(), grouping.num_experts % count == 0
    score = 0.0 if is_balanced else None
    if fits and not is_balanced:
        # about a million random numbers: two digits, in 0.1 s
        draws = max(20, min(300, 1_000_000 // (BATCH_TOKENS * grouping.num_experts)))
        scores = monte_carlo_imbalance(
            grouping, num_tokens=BATCH_TOKENS, num_devices=count, draws=draws
        )
        score = round(float(scores.mean()), 3)
    return {
        "devices": count,
        "balanced_by_construction": is_balanced,
        "experts_per_device": grouping.num_experts // count if fits else None,
        "imbalance_score_uniform_64_tokens": score,
    }


def _on_disk(checkpoint: Checkpoint, family: Family) -> dict[str, Any]:
    by_part: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        part = family.part_of(entry.name)
        by_part[part] = by_part.get(part, 0) + entry.num_bytes
    return {
        "files": len(checkpoint.files),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.num_bytes,
        "bytes_by_dtype": checkpoint.bytes_by_dtype,
        "bytes_by_part": by_part,
    }


def _notes(spec: ModelSpec, found: FoundConfig) -> list[str]:
    notes = [f"source: {found.source}"]
    if text_config(found.config) is not found.config:
        notes.append("the text decoder alone: other modalities are not counted")
    if spec.num_uncounted_mtp_layers:
        notes.append(
            f"{spec.num_uncounted_mtp_layers} multi-token-prediction layer(s) beside it not counted"
        )
    if spec.moe and spec.moe.router.has_selection_bias:
        notes.append("the router's selection bias is a buffer: not counted as parameters")
    return notes


def list_presets() -> list[dict[str, Any]]:
    """Describe every preset in a few numbers."""
    rows = []
    for name in presets.names():
        spec = model_spec(presets.config(name))
        rows.append(
            {
                "preset": name,
                "family": spec.family,
                "params": spec.params(),
                "active_params": spec.active_params(),
                "grouping": spec.grouping.model_dump() if spec.grouping else None,
                "source": presets.source(name),
            }
        )
    return rows
