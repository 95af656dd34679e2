"""`mogul bench devices`: how long devices wait for each other, by router and dispatch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

EXAMPLES = """
examples:
  mogul bench devices                                       a small layer on this machine's devices
  mogul bench devices --ranks 4 --cpu                       on 4 processes of the processor
  mogul bench devices --shape preset:pangu-pro-moe-72b --out ./devices
  mogul bench devices --shape 64x8x5120x1344x8 --tokens 16 456 4096 --train-layers 2
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Spread one experts layer over devices and time it: grouped or top-k, static or exchanged.

    Prints the layer's time, the slowest rank's experts, how long ranks wait, exposed communication,
    the floor at the limits measured in the same run, bytes sent, rho and delta.
    """

    shape: str = "32x8x576x192x8"
    """ExKxDxFxM (experts, picks, model width, expert width, groups), or a model as `mogul info`
    takes it."""

    groups: int | None = None
    """Groups of the grouped router, where the shape or model has none."""

    ranks: int | None = None
    """Processes. Default: the accelerators of this machine, or 2 without any."""

    cpu: bool = False
    """Run on processes of the processor even where there are accelerators."""

    tokens: tuple[int, ...] = ()
    """Tokens of all ranks together. Default: 16, 64, 456, 4096, 16384 (a processor: 16, 64)."""

    routing: tuple[Literal["uniform", "skewed"], ...] = ("uniform", "skewed")
    """How experts are picked."""

    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    """Default: bf16 on accelerators, fp32 on a processor."""

    train_layers: int = 0
    """Also time a training step of a slice of so many layers of this shape, on one rank and on
    all."""

    length: int = 1024
    """Tokens of a sequence in that step."""

    out: Path | None = None
    """Folder for devices.html and devices.json."""

    record: bool = False
    """Append the results to the ledger."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print."""


def run(options: Options) -> int:
    """Start the ranks, measure, show."""
    import json

    from mogul.bench import ledger
    from mogul.bench.devices_report import ledger_rows, table, write_page
    from mogul.bench.devices_run import measure_on_ranks
    from mogul.parallel.owners import contiguous

    request, training = _request(options)
    ranks, on_cpu = _place(options)
    contiguous(request.shape.experts, ranks)  # refuses ranks that cannot share them
    found = measure_on_ranks(request, training, ranks, on_cpu=on_cpu)
    shown = table(found["rows"], found["facts"])
    shown.show(options.format)
    tables = [shown]
    if found["training"]:
        tables.append(_training_table(found["training"]))
        tables[-1].show(options.format)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_page(options.out, tables, found["phases"])
        (options.out / "devices.json").write_text(json.dumps(found, indent=1) + "\n")
    if options.record:
        ledger.append(ledger_rows(found["rows"], found["facts"], found["device"]))
    return 0


def _place(options: Options) -> tuple[int, bool]:
    """Number of ranks, and whether they run on the processor."""
    import torch

    from mogul.core.errors import ConfigError

    if options.ranks is not None and options.ranks < 1:
        raise ConfigError(f"{options.ranks} ranks hold no expert", fix="use 1 or more")
    on_cpu = options.cpu or torch.accelerator.current_accelerator() is None
    count = 2 if on_cpu else torch.accelerator.device_count()
    return options.ranks or count, on_cpu


def _request(options: Options) -> tuple[Any, Any]:
    from mogul.bench.devices import Request
    from mogul.bench.devices_run import slice_of
    from mogul.bench.kernels import LayerShape, layer_shape
    from mogul.cli.bench_kernels import _model_shape

    _, on_cpu = _place(options)
    shape = layer_shape(options.shape, _model_shape)
    if options.groups is not None:
        shape = LayerShape(shape.experts, shape.picks, shape.width, shape.inner, options.groups)
    tokens = options.tokens or ((16, 64) if on_cpu else (16, 64, 456, 4096, 16384))
    request = Request(
        shape=shape,
        tokens=tokens,
        routings=options.routing,
        dtype=options.dtype or ("fp32" if on_cpu else "bf16"),
        budget_s=0.05 if on_cpu else 0.1,
        traced_tokens=tokens[-1:],
    )
    return request, slice_of(request, options.train_layers, options.length)


def _training_table(steps: list[dict[str, Any]]) -> Any:
    from mogul.core.table import Table
    from mogul.core.units import show_bytes, show_s

    one = steps[0]["tokens_per_s"]
    rows = [
        [s["ranks"], s["tokens"], show_s(s["step_s"]), round(s["tokens_per_s"]),
         f"{s['tokens_per_s'] / one:.2f}", show_bytes(s["peak_bytes"])]
        for s in steps
    ]  # fmt: skip
    columns = ("ranks", "tokens", "step", "tokens/s", "x one rank", "peak memory")
    return Table("training step of a slice", columns, rows)
