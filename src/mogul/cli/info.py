"""`mogul info`: what a model weighs and where it is balanced, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from mogul.cli.find_config import PRESET, FoundConfig, find_config
from mogul.core.table import Table
from mogul.core.units import show_bytes, show_count
from mogul.spec import presets
from mogul.spec.balance import monte_carlo_imbalance
from mogul.spec.checkpoint import Checkpoint, read_checkpoint
from mogul.spec.families import Family, family_of, model_spec, text_config
from mogul.spec.grouping import Grouping
from mogul.spec.model import ModelSpec

DTYPES = ("fp32", "bf16", "fp8", "int4")
DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)
BATCH_TOKENS = 64

EXAMPLES = """
examples:
  mogul info preset:                       list the presets
  mogul info preset:pangu-pro-moe-72b      a shape that ships with mogul
  mogul info ./my-checkpoint               a folder: also checks its files
  mogul info ./config.json --format json   a bare config, for scripts
  mogul info Qwen/Qwen3-30B-A3B            from the hub (config only)
"""


@dataclass(frozen=True)
class Options:
    """Show parameters, memory and balanced device counts of a model, without its weights."""

    model: Positional[str]
    """Checkpoint folder, config.json, preset:NAME or hub id; `preset:` alone lists the presets."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print: a table for people; json and csv in base units (bytes, counts)."""

    devices: Annotated[tuple[int, ...], "device counts"] = DEVICE_COUNTS
    """Device counts to judge; counts that do not divide the experts are left out."""


def run(options: Options) -> int:
    """Print what is known about the model."""
    if options.model == PRESET:
        _presets_table().show(options.format)
        return 0
    found = find_config(options.model)
    family, spec = family_of(found.config), model_spec(found.config)
    checkpoint = read_checkpoint(found.folder) if found.folder else None
    facts = describe(spec, found, options.devices)
    if checkpoint:
        facts["on_disk"] = _on_disk(checkpoint, family)
    if options.format == "json":
        Table("", (), (), data=facts).show("json")
    elif options.format == "csv":
        Table("", ("key", "value"), _flat(facts)).show("csv")
    else:
        for table in _tables(spec, facts, _notes(spec, found)):
            table.show()
    return 0


def describe(spec: ModelSpec, found: FoundConfig, devices: tuple[int, ...]) -> dict[str, Any]:
    """Collect every number in base units: the JSON face, and what the tables are made of."""
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
        "kv_bytes_per_token": {"bf16": spec.kv_bytes_per_token(2), "fp8": spec.kv_bytes_per_token(1)},
        "attention": spec.attention.model_dump(),
    }
    if spec.max_positions:
        facts["max_positions"] = spec.max_positions
        facts["kv_bytes_per_full_sequence_bf16"] = spec.kv_bytes(spec.max_positions)
    if spec.moe:
        facts["moe"] = spec.moe.model_dump()
        facts["balanced_devices"] = list(spec.moe.grouping.legal_devices())
        facts["devices"] = _judge_devices(spec.moe.grouping, devices)
    return facts


def _judge_devices(grouping: Grouping, devices: tuple[int, ...]) -> list[dict[str, Any]]:
    """Say for each device count whether equal rows are certain, and how unequal chance leaves them."""
    legal = grouping.legal_devices()
    counts = {count for count in (*devices, *legal) if not grouping.num_experts % count}
    # about a million random scores: enough for two digits, 0.1 s
    draws = max(20, min(300, 1_000_000 // (BATCH_TOKENS * grouping.num_experts)))
    judged = []
    for count in sorted(counts):
        is_balanced = count in legal
        score = 0.0
        if not is_balanced:
            scores = monte_carlo_imbalance(
                grouping, num_tokens=BATCH_TOKENS, num_devices=count, draws=draws
            )
            score = float(scores.mean())
        judged.append(
            {
                "devices": count,
                "balanced_by_construction": is_balanced,
                "experts_per_device": grouping.num_experts // count,
                "imbalance_score_uniform_64_tokens": round(score, 3),
            }
        )
    return judged


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


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{prefix}.{index}", item) for index, item in enumerate(value)]
    else:
        return [(prefix, value)]
    return [row for key, item in items for row in _flat(item, key)]


def _tables(spec: ModelSpec, facts: dict[str, Any], notes: list[str]) -> list[Table]:
    tables = [_summary(spec, facts), _memory(facts)]
    if spec.moe:
        tables.append(_devices(facts))
    if "on_disk" in facts:
        tables.append(_files(facts["on_disk"]))
    tables.append(Table("Parts", ("part", "parameters", "share"), _shares(facts), notes))
    return tables


def _summary(spec: ModelSpec, facts: dict[str, Any]) -> Table:
    rows = [
        ("parameters", show_count(spec.params()), f"{spec.params():,}"),
        ("active a token", show_count(spec.active_params()), f"{spec.active_params():,}"),
    ]
    without = facts["active_params_without_input_embedding"]
    rows.append(("  without input embedding", show_count(without), f"{without:,}"))
    rows.append(("layers", spec.num_layers, f"{len(spec.moe_layers)} with experts"))
    rows.append(("attention", spec.attention.kind.upper(), _attention_words(spec)))
    if spec.moe:
        g = spec.moe.grouping
        rows.append(("experts a layer", g.num_experts, _grouping_words(g)))
        rows.append(("router", spec.moe.router.score, _router_words(spec)))
    kv = facts["kv_bytes_per_token"]["bf16"]
    rows.append(("KV cache a token, bf16", show_bytes(kv), f"{kv:,} bytes"))
    if length := spec.max_positions:
        size = facts["kv_bytes_per_full_sequence_bf16"]
        rows.append(("KV cache, longest context", show_bytes(size), f"{length:,} tokens"))
    return Table(f"{facts['model']} ({spec.family})", ("", "value", "exactly"), rows)


def _attention_words(spec: ModelSpec) -> str:
    a = spec.attention
    if a.kind == "mla":
        return f"{a.num_heads} heads, latent {a.kv_lora_rank} + rotary {a.rope_dim}"
    return f"{a.num_heads} query and {a.num_kv_heads} key-value heads of {a.key_dim}"


def _grouping_words(g: Grouping) -> str:
    if g.num_groups == 1:
        return f"{g.top_k} picks a token, ungrouped"
    return f"{g.num_groups} groups of {g.group_size}, {g.picks_per_group} of each picked"


def _router_words(spec: ModelSpec) -> str:
    assert spec.moe is not None
    router = spec.moe.router
    words = [f"weights: {router.weighting.replace('_', ' ')}"]
    if router.has_expert_scale:
        words.append("times a learned scale an expert")
    if router.scaling_factor != 1:
        words.append(f"times {router.scaling_factor:g}")
    if router.has_selection_bias:
        words.append("selection bias")
    if router.limit_groups:
        words.append(f"inside the best {router.limit_groups} of {router.limit_num_groups} groups")
    if spec.moe.shared_width:
        words.append(f"shared expert {spec.moe.shared_width} wide")
    return ", ".join(words)


def _memory(facts: dict[str, Any]) -> Table:
    has_experts = facts["num_moe_layers"] > 0
    rows = [
        (
            dtype,
            show_bytes(facts["weight_bytes"][dtype]),
            *([show_bytes(facts["expert_bytes_per_layer"][dtype])] if has_experts else []),
        )
        for dtype in DTYPES
    ]
    columns = ("dtype", "all weights", *(["experts of one layer"] if has_experts else []))
    return Table("Memory", columns, rows, ["scales of quantised formats are not counted"])


def _devices(facts: dict[str, Any]) -> Table:
    rows = [
        (
            row["devices"],
            "yes, by construction" if row["balanced_by_construction"] else "no, the router decides",
            row["experts_per_device"],
            row["imbalance_score_uniform_64_tokens"],
        )
        for row in facts["devices"]
    ]
    return Table(
        "Expert parallelism",
        ("devices", "equal rows", "experts each", "IS"),
        rows,
        [
            f"IS = (max - min rows) / tokens, mean over uniform random picks of {BATCH_TOKENS} "
            "tokens; real routers are less even",
            "equal rows are equal time only where arithmetic decides; small decode batches follow "
            "the bytes of distinct experts",
        ],
    )


def _files(on_disk: dict[str, Any]) -> Table:
    rows = [("all tensors", show_bytes(on_disk["bytes"]), f"{on_disk['tensors']:,} tensors")]
    rows += [(part, show_bytes(size), "") for part, size in on_disk["bytes_by_part"].items()]
    dtypes = ", ".join(f"{show_bytes(n)} {name}" for name, n in on_disk["bytes_by_dtype"].items())
    notes = [f"{on_disk['files']} file(s), whole by their headers: {dtypes}"]
    return Table("On disk", ("", "bytes", ""), rows, notes)


def _shares(facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    parts = facts["params_by_part"]
    return [
        (name, f"{count:,}", f"{100 * count / facts['params']:.1f} %")
        for name, count in parts.items()
    ]


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


def _presets_table() -> Table:
    rows, data = [], []
    for name in presets.names():
        spec = model_spec(presets.config(name))
        g = spec.grouping
        active = spec.active_params()
        rows.append(
            (
                f"{PRESET}{name}",
                show_count(spec.params()),
                show_count(active),
                g.num_experts if g else None,
                g.top_k if g else None,
                g.num_groups if g else None,
            )
        )
        data.append(
            {
                "preset": name,
                "family": spec.family,
                "params": spec.params(),
                "active_params": active,
                "grouping": g.model_dump() if g else None,
                "source": presets.source(name),
            }
        )
    columns = ("preset", "parameters", "active", "experts", "picks", "groups")
    return Table("Presets", columns, rows, data={"presets": data})
