"""Read AIConfigurator's measured tables from its installed wheel; nothing of it is kept here.

`pip install --no-deps aiconfigurator-core==0.12.0` gives the tables (Apache-2.0, NVIDIA); pyarrow
reads them. Their dimensions are turned into mogul's: a balanced run of T tokens on one of D expert
ranks has T*K/D rows over min(E/D, rows) experts.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mogul.core.errors import ArtifactError
from mogul.simulate.collectives import CollectiveTables
from mogul.simulate.measurements import KernelTable
from mogul.spec.quant import bytes_of

DEVICES = {
    "h100": "h100_sxm",
    "h200": "h200_sxm",
    "b200": "b200_sxm",
    "b300": "b300_sxm",
    "gb200": "gb200",
    "gb300": "gb300",
    "a100": "a100_sxm",
    "l40s": "l40s",
}
ENGINES = ("vllm", "sglang", "trtllm")
_FORMATS = {
    "bfloat16": ("bf16", 2.0),
    "float16": ("bf16", 2.0),
    "fp8": ("fp8", 1.0),
    "fp8_block": ("fp8_block", 1.0),
    "nvfp4": ("fp4", 0.5),
    "w4a8_mxfp4_mxfp8": ("mxfp4", 1.0),
    "w4a16_mxfp4": ("mxfp4", 2.0),
    "int4_wo": ("int4", 2.0),
}
"""Their name of a format -> (ours, bytes of one input number)."""


def wheel_dir() -> Path | None:
    """Folder of the installed package; None if it is not installed."""
    found = importlib.util.find_spec("aiconfigurator_core")
    return Path(found.origin).parent if found and found.origin else None


def require_wheel() -> Path:
    """Folder of the installed package.

    Raises:
        ArtifactError: it or pyarrow is not installed.
    """
    folder = wheel_dir()
    if folder is None or importlib.util.find_spec("pyarrow") is None:
        raise ArtifactError(
            "AIConfigurator's tables are not installed here",
            fix="pip install pyarrow && pip install --no-deps aiconfigurator-core==0.12.0",
        )
    return folder


def _columns(path: Path) -> dict[str, np.ndarray]:
    from pyarrow import parquet  # type: ignore[import-not-found]

    table = parquet.read_table(path)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def _versions(folder: Path, device: str, room: str, engine: str, file: str) -> list[Path]:
    """A table's versions, newest first."""
    found = (folder / "systems" / "data" / DEVICES[device] / room / engine).glob(f"*/{file}")
    return sorted(found, key=lambda path: _version(path.parent.name), reverse=True)


def _newest(folder: Path, device: str, room: str, engine: str, file: str) -> Path | None:
    return next(iter(_versions(folder, device, room, engine, file)), None)


def _version(text: str) -> tuple[int, ...]:
    digits = "".join(char if char.isdigit() else " " for char in text)
    return tuple(int(part) for part in digits.split())


def tables(device: str, engine: str) -> tuple[KernelTable, ...]:
    """All tables of one device and engine that mogul can use.

    Of several versions the newest that has the arithmetic counts.
    """
    return tuple(_tables(str(require_wheel()), device, engine))


@cache
def _tables(folder: str, device: str, engine: str) -> tuple[KernelTable, ...]:
    found: list[KernelTable] = []
    for room, file, convert in _SOURCES:
        best: dict[tuple[str, str, float], KernelTable] = {}
        for path in _versions(Path(folder), device, room, engine, file):
            for table in filter(len, _split(path, device, engine, convert)):
                width = float(table.dims["input_bytes"][0]) if table.kind == "moe" else 0.0
                key = (table.kind, table.dtype, width)
                if key not in best:
                    best[key] = table  # newest first
        found.extend(best.values())
    return tuple(found)


def _split(
    path: Path, device: str, engine: str, convert: Callable[[dict[str, np.ndarray]], Any]
) -> Iterator[KernelTable]:
    columns = _columns(path)
    kind, dtype_column, dims, groups = convert(columns)
    source = f"aiconfigurator-core 0.12.0: {'/'.join(path.parts[-5:])}"
    seconds = columns["latency"].astype(float) * 1e-3
    for name in np.unique(dtype_column):
        if name not in _FORMATS:
            continue
        dtype, input_bytes = _FORMATS[name]
        chosen = (dtype_column == name) & (seconds > 0)
        table = KernelTable(kind, device, engine, dtype, source, dims, seconds, groups)
        table = table.only(chosen)
        width = np.full(len(table), bytes_of(dtype))
        extra = {"weight_bytes": width, "input_bytes": np.full(len(table), input_bytes)}
        if kind.endswith("decode"):
            extra = {"kv_bytes": width}
        yield KernelTable(
            kind, device, engine, dtype, source, {**table.dims, **extra}, table.seconds,
            table.groups,
        )  # fmt: skip


def _gemm(c: dict[str, np.ndarray]) -> Any:
    dims = {name: c[name].astype(float) for name in ("m", "n", "k")}
    return "gemm", c["gemm_dtype"], dims, None


def _moe(c: dict[str, np.ndarray]) -> Any:
    ranks = c["moe_ep_size"].astype(float)
    rows = c["num_tokens"] * c["topk"] / ranks
    local = c["num_experts"] / ranks
    dims = {
        "rows": rows,
        "distinct": np.minimum(local, rows),
        "hidden": c["hidden_size"].astype(float),
        "width": c["inter_size"] / c["moe_tp_size"].astype(float),
    }
    keys = ("hidden_size", "inter_size", "topk", "num_experts")
    labels = np.array(["x".join(map(str, row)) for row in zip(*(c[k] for k in keys), strict=True)])
    # Only balanced rows: a skewed row's counts of rows and experts are not in the table.
    dtype = np.where(c["distribution"] == "balanced", c["moe_dtype"].astype(object), "skewed")
    return "moe", dtype.astype(str), dims, labels


def _attention_decode(c: dict[str, np.ndarray]) -> Any:
    heads = c["num_heads"].astype(float)
    kv = np.where(c["num_key_value_heads"] == 0, heads, c["num_key_value_heads"])
    width = c["head_dim"].astype(float)
    context = (c["step"] + 1).astype(float)
    dims = {"batch": c["batch_size"].astype(float), "context": context, "heads": heads}
    dims |= {"kv_heads": kv.astype(float), "key_dim": width, "value_dim": width}
    dtype = np.where(_window(c) == 0, c["kv_cache_dtype"].astype(object), "windowed")
    return "attention_decode", dtype.astype(str), dims, None


def _window(c: dict[str, np.ndarray]) -> np.ndarray:
    """Older tables have no windows."""
    return c.get("window_size", np.zeros(len(c["step"])))


def _attention_prefill(c: dict[str, np.ndarray]) -> Any:
    _, _, dims, _ = _attention_decode(c)
    dims["tokens"] = c["isl"].astype(float)
    del dims["context"]
    plain = (_window(c) == 0) & (c["kv_cache_dtype"] == "bfloat16") & (c["step"] == 0)
    dtype = np.where(plain, "bfloat16", "other")
    return "attention_prefill", dtype, dims, None


def _mla_decode(c: dict[str, np.ndarray]) -> Any:
    dims = {
        "batch": c["batch_size"].astype(float),
        "context": (c["step"] + 1).astype(float),
        "heads": c["num_heads"].astype(float),
        "latent": np.full(len(c["step"]), 512.0),
        "rope": np.full(len(c["step"]), 64.0),
    }
    return "mla_decode", c["kv_cache_dtype"], dims, None


_SOURCES = (
    ("gemm", "gemm_perf.parquet", _gemm),
    ("moe", "moe_perf.parquet", _moe),
    ("attention", "generation_attention_perf.parquet", _attention_decode),
    ("attention", "context_attention_perf.parquet", _attention_prefill),
    ("mla", "generation_mla_perf.parquet", _mla_decode),
)


def collective_tables(device: str, engine: str) -> CollectiveTables:
    """Measured collectives of one domain: NCCL's, and the engine's own all-reduce in a graph.

    Their sizes count numbers of 2 bytes.
    """
    return _collectives(str(require_wheel()), device, engine)


@cache
def _collectives(folder: str, device: str, engine: str) -> CollectiveTables:
    curves: dict[tuple[str, str, int], tuple[np.ndarray, np.ndarray]] = {}
    nccl = _newest(Path(folder), device, "comm", "nccl", "nccl_perf.parquet")
    own = _newest(Path(folder), device, "comm", engine, "custom_allreduce_perf.parquet")
    used = []
    for path, wanted in ((nccl, "nccl_dtype"), (own, "allreduce_dtype")):
        if path is None:
            continue
        used.append("/".join(path.parts[-5:]))
        c = _columns(path)
        keep = np.isin(c[wanted], ("half", "bfloat16", "float16"))
        keep &= np.array(["eager" not in str(name) for name in c["kernel_source"]])
        for key in {*zip(c["op_name"][keep], c["num_gpus"][keep], strict=True)}:
            chosen = keep & (c["op_name"] == key[0]) & (c["num_gpus"] == key[1])
            sizes = c["message_size"][chosen].astype(float) * 2
            order = np.argsort(sizes)
            name = "all_to_all" if key[0] == "alltoall" else str(key[0])
            seconds = c["latency"][chosen].astype(float) * 1e-3
            curves[device, name, int(key[1])] = (sizes[order], seconds[order])
    return CollectiveTables(curves, f"aiconfigurator-core 0.12.0: {', '.join(used)}")
