"""Write the simulator's newer kernel tables from the ledger's device runs.

Question: what do kernels take that changed since `mogul simulate calibrate` last ran? The newest
row of a case counts, rows that say they are of an earlier state do not. Each table names the
commits of its rows, each row its case; `load_shipped` lets them replace what the calibration
measured of the same calls. A newer calibration makes these files superfluous.

    python benchmarks/sim/tables_from_ledger.py
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

from mogul.bench import ledger
from mogul.core.files import atomic_write
from mogul.core.log import say
from mogul.kernels.triton.paged import fp8_tiles
from mogul.simulate.measurements import NEWER, SHIPPED_DIR

Dims = dict[str, float]
Found = tuple[str, str, Dims]
"""Kind, format and dimensions of a call; kinds that end in JOINED do neighbours' work as well."""

JOINED = "-joined"
"""Calls as mogul's engine joins them: they count for no other engine."""

FORMATS = {None: "bf16", "int4-64": "int4"}
"""The simulator's name of a format of experts, where it is another one."""

DEVICES = {"NVIDIA H100 80GB HBM3": "h100", "NVIDIA H200": "h200"}
UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
SHAPES = {"A": (5120, 1344, 64, 8), "B": (5120, 1344, 64, 8),
          "C": (2048, 768, 128, 8), "D": (1536, 256, 128, 8)}  # fmt: skip
"""Hidden, width, experts, picks of the layers' benchmarks (`gpu/common.py`)."""

PRODUCTS = {
    "query, key, value of Qwen3-30B-A3B": (5120, 2048), "qwen qkv": (5120, 2048),
    "output of Qwen3-30B-A3B": (2048, 4096), "qwen out": (2048, 4096),
    "router of Qwen3-30B-A3B": (128, 2048), "qwen router": (128, 2048),
    "pangu router": (64, 5120), "pangu qkv": (7168, 5120), "pangu out": (5120, 5120),
    "dense down": (5120, 25600),
    "pangu-pro heads": (7168, 5120), "pangu-pro output": (5120, 5120),
    "pangu-pro head": (153376, 5120),
}  # fmt: skip
"""Columns and contracted numbers of the products the ledger names."""


def experts(match: re.Match[str]) -> Found:
    """A layer of routed experts under uniform picks."""
    hidden, width, count, picks = SHAPES[match["shape"]]
    tokens = int(match["tokens"])
    dims = {"rows": tokens * picks, "distinct": count * (1 - (1 - picks / count) ** tokens)}
    kind = FORMATS.get(match["format"], match["format"])
    return "moe", kind, {**dims, "hidden": hidden, "width": width}


def beside(match: re.Match[str]) -> Found:
    """Pangu Pro's experts with router and shared expert: four more that every token picks."""
    hidden, width, count, picks = SHAPES["A"]
    tokens, shared = int(match["tokens"]), 4
    distinct = count * (1 - (1 - picks / count) ** tokens) + shared
    dims = {"rows": tokens * (picks + shared), "distinct": distinct}
    return "moe" + JOINED, "fp8", {**dims, "hidden": hidden, "width": width}


def product(match: re.Match[str]) -> Found | None:
    """A product as the engine calls it: with the norm, the rounding or the sum beside it."""
    if match["name"] not in PRODUCTS:
        return None
    n, k = PRODUCTS[match["name"]]
    return (
        "gemm" + JOINED,
        match.groupdict().get("format", "fp8"),
        {"m": int(match["tokens"]), "n": n, "k": k},
    )


def decode(match: re.Match[str]) -> Found:
    """Decode over pages; the call writes the new token too."""
    dims: Dims = {"batch": int(match["batch"]), "context": int(match["context"])}
    dims |= {"heads": int(match["heads"]), "kv_heads": int(match["kv_heads"])}
    dims |= {"key_dim": 128, "value_dim": 128, "kv_bytes": 1 if match["format"] == "fp8" else 2}
    return "attention_decode", match["format"], dims


def decode_trial(match: re.Match[str]) -> Found | None:
    """A trial of tiles over fp8 pages of Pangu Pro, where its tile is the one taken now."""
    batch = int(match["batch"])
    tile = next(tile for most, tile in fp8_tiles if batch <= most)
    tried = tuple(int(match[name]) for name in ("block", "per_sm", "warps", "stages"))
    least = int(match.groupdict().get("least", tile.min_blocks))  # some trials do not say it
    if (*tried, least) != (tile.block, tile.per_sm, tile.warps, tile.stages, tile.min_blocks):
        return None
    dims: Dims = {"batch": batch, "context": int(match["context"].replace(",", ""))}
    dims |= {"heads": 40, "kv_heads": 8, "key_dim": 128, "value_dim": 128, "kv_bytes": 1}
    return "attention_decode", "fp8", dims


FORMAT, TOKENS, LAYER = (
    "(?P<format>bf16|fp8)",
    r"(?P<tokens>\d+)",
    r"(?P<shape>[ABCD])(?: (?P<format>fp8|fp8-w8a16|int4-64))? forward (?P<tokens>\d+)",
)
TILE = ("block", "per_sm", "warps", "stages")
TRIAL = r"{}: .*; {} keys, {} programs a multiprocessor, {} warps, {} stages"
BLOCKS = (
    r"{}: blocks of {} keys, {} programs a multiprocessor, (?P<least>\d+) .*, {} warps, {} stages"
)
LISTED = r"{}, \[keys, workers, least blocks, warps, stages\] \[{}, {}, (?P<least>\d+), {}, {}\]"
OVER = r"fp8 pages, (?P<batch>\d+) sequences of (?P<context>[\d,]+)"
EACH = r"pangu, (?P<batch>\d+) x (?P<context>\d+) keys, fp8 pages of 16"
CALL = r"\((?P<heads>\d+), (?P<kv_heads>\d+), 128\), cache (?P<format>bf16|fp8)"


def numbered(pattern: str, first: str) -> str:
    """A pattern with its sequences and the four numbers of a tile."""
    return pattern.format(first, *(rf"(?P<{name}>\d+)" for name in TILE))


RULES: tuple[tuple[str, str, Callable[[re.Match[str]], Found | None]], ...] = (
    ("moe_layer", LAYER, experts),
    ("quant_layer", LAYER, experts),
    ("fp8_token", rf"pangu-pro experts, {TOKENS} rows, (plain sums|rounded)", beside),
    ("fp8_token", rf"(?P<name>.*), {TOKENS} rows, (plain sums|rounded)", product),
    ("fp8_token", rf"(?P<name>pangu-pro head), {TOKENS} rows, {FORMAT}", product),
    ("linear_one", rf"(?P<name>.*), {FORMAT}, {TOKENS} rows, plain sums by tile.*", product),
    ("linear_few", rf"(?P<name>.*), {FORMAT}, {TOKENS} rows", product),
    ("paged_attention", rf"decode, \w+ {CALL}, batch {{}}, context {{}}, page \d+".format(
        r"(?P<batch>\d+)", r"(?P<context>\d+)"), decode),
    ("paged_attention_ideas", numbered(TRIAL, rf"pangu, {OVER} keys"), decode_trial),
    ("paged_attention_ideas", numbered(BLOCKS, EACH), decode_trial),
    ("paged_attention_ideas", numbered(LISTED, f"pangu-pro decode attention, {OVER}"),
     decode_trial),
)  # fmt: skip
"""Benchmark, form of a case, and what call that was."""


def measured() -> dict[tuple[str, str, str], dict[str, tuple[Dims, float, Mapping[str, Any]]]]:
    """By device, kind and format: the newest row of each call, the faster of two of one run."""
    tables: dict[tuple[str, str, str], dict[str, tuple[Dims, float, Mapping[str, Any]]]] = {}
    for row in ledger.read():
        device = DEVICES.get(row["device"])
        if device is None or not row["metric"].startswith("time") or _is_earlier(row):
            continue
        for bench, pattern, reader in RULES:
            if row["bench"] != bench or not (match := re.fullmatch(pattern, row["case"])):
                continue
            if not (call := reader(match)):
                continue
            kind, dtype, dims = call
            table = tables.setdefault((device, kind, dtype), {})
            key = f"{match.groupdict().get('shape', '')} {dims}"
            seconds, known = row["value"] * UNIT_S[row["unit"]], table.get(key)
            if known and known[2]["commit"] == row["commit"] and known[1] < seconds:
                continue
            table[key] = (dims, seconds, row)
    return tables


def _is_earlier(row: Mapping[str, Any]) -> bool:
    """Whether a row is of kernels that were replaced, by its own note."""
    return "before" in row.get("note", "") or "cut off" in row.get("note", "")


def write(device: str, kind: str, dtype: str, rows: list[tuple[Dims, float, Any]]) -> None:
    """One table, in order of its dimensions."""
    commits = sorted({row["commit"] for _, _, row in rows})
    benches = sorted({row["bench"] for _, _, row in rows})
    versions = rows[-1][2]["versions"]
    source = (
        f"mogul's own run, {max(row['date'] for _, _, row in rows)}, {rows[0][2]['device']}, torch "
        f"{versions['torch']}, triton {versions['triton']}: benchmarks/ledger.jsonl, "
        f"{', '.join(benches)}, commits {', '.join(commits)}"
    )
    plain = kind.removesuffix(JOINED)
    head = {"kind": plain, "device": device, "engine": "mogul", "dtype": dtype, "source": source}
    if plain != kind:
        head["role"] = "reference"
    text = io.StringIO()
    text.writelines(f"# {key} = {value}\n" for key, value in head.items())
    names = list(rows[0][0])
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "seconds", "case"])
    for dims, seconds, row in sorted(rows, key=lambda one: list(reversed(one[0].values()))):
        values = [f"{value:.6g}" for value in (*dims.values(), seconds)]
        writer.writerow([*values, f"{row['bench']} {row['case']} @{row['commit']}"])
    path = SHIPPED_DIR / f"{device}-{plain}-{dtype}-mogul{kind.removeprefix(plain)}{NEWER}.csv"
    atomic_write(path, text.getvalue())
    say(f"{path.name}: {len(rows)} calls")


def main() -> None:
    """Write every table."""
    for (device, kind, dtype), found in sorted(measured().items()):
        write(device, kind, dtype, list(found.values()))


if __name__ == "__main__":
    main()
