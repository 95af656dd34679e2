"""The tables `mogul info` prints for people."""

from __future__ import annotations

from typing import Any

from mogul.cli.find_config import PRESET
from mogul.cli.info_facts import BATCH_TOKENS, DTYPES
from mogul.core.table import Table
from mogul.core.units import show_bytes, show_count
from mogul.spec.grouping import Grouping
from mogul.spec.model import ModelSpec


def model_tables(spec: ModelSpec, facts: dict[str, Any]) -> list[Table]:
    """Arrange the facts: summary, memory, devices, files, parts."""
    tables = [_summary(spec, facts), _memory(facts)]
    if spec.moe:
        tables.append(_devices(facts))
    if "on_disk" in facts:
        tables.append(_files(facts["on_disk"]))
    tables.append(Table("Parts", ("part", "parameters", "share"), _shares(facts), facts["notes"]))
    return tables


def _summary(spec: ModelSpec, facts: dict[str, Any]) -> Table:
    rows: list[tuple[Any, ...]] = [
        ("parameters", show_count(spec.params()), f"{spec.params():,}"),
        ("active a token", show_count(spec.active_params()), f"{spec.active_params():,}"),
    ]
    without = facts["active_params_without_input_embedding"]
    rows.append(("  without input embedding", show_count(without), f"{without:,}"))
    rows.append(("stored dtype", spec.dtype, ""))
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
    return Table(f"{facts['model']} ({spec.family})", ("", "value", "in detail"), rows)


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
            _equal_rows(row),
            row["experts_per_device"],
            row["imbalance_score_uniform_64_tokens"],
        )
        for row in facts["devices"]
    ]
    notes = [
        f"IS = (max - min rows) / tokens, mean of random picks for {BATCH_TOKENS} tokens a step",
        "real routers are less even than random picks",
        "equal rows are equal time where arithmetic decides, not in small decode batches",
    ]
    return Table("Expert parallelism", ("devices", "equal rows", "experts each", "IS"), rows, notes)


def _equal_rows(row: dict[str, Any]) -> str:
    if row["balanced_by_construction"]:
        return "yes, by construction"
    return "no, the router decides" if row["experts_per_device"] else "no, experts do not divide"


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


def preset_table(rows: list[dict[str, Any]]) -> Table:
    """List the presets; `rows` from `info_facts.list_presets`."""
    shown = []
    for row in rows:
        g = row["grouping"] or {}
        shown.append(
            (
                f"{PRESET}{row['preset']}",
                show_count(row["params"]),
                show_count(row["active_params"]),
                *(g.get(key) for key in ("num_experts", "top_k", "num_groups")),
            )
        )
    columns = ("preset", "parameters", "active", "experts", "picks", "groups")
    return Table("Presets", columns, shown, data={"presets": rows})
