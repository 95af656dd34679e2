"""`mogul place`: a trace in, `placement.json` out; exports and permuted checkpoints on request."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from mogul.core.table import Table
    from mogul.spec.placement import Placement

EXAMPLES = """
examples:
  mogul place trace/ --devices 8
  mogul place trace/ --devices 32 --nodes 4 --replicas 32 --export sglang --export-out experts.json
  mogul place trace/ --devices 8 --method ilp --apply ./Qwen3-30B-A3B --out ./Qwen3-placed
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Choose which device holds which expert, so that no device waits for another.

    Writes a placement with the balance it predicts, the bound no placement can beat and the gap.
    A MoGE is placed in whole groups; a device count that does not divide its groups is refused.
    """

    trace: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE")]
    """Trace folder (`mogul trace`)."""
    devices: int
    """Devices that share the experts of every layer."""
    slots: int | None = None
    """Experts a device has room for, in one layer; by default as few as suffice."""
    replicas: int = 0
    """Extra copies of busy experts, in one layer, over all devices."""
    nodes: int = 1
    """Machines the devices stand in; an expert's replicas stay within one."""
    method: Literal["auto", "contiguous", "greedy", "swap", "coactivation", "ilp"] = "auto"
    """`coactivation` gathers experts that are picked together; `ilp` proves the gap (HiGHS)."""
    memory: str | None = None
    """Most a device may spend on experts, all layers together, like "40 GiB"."""
    batch: int = 64
    """Tokens of the batches that delta is predicted for."""
    allow_imbalance: bool = False
    """Place a MoGE expert by expert, giving up its balance by construction."""
    placement: Path | None = None
    """File to write; by default placement.json in the trace folder."""
    export: Literal["sglang", "vllm", "vllm-ascend"] | None = None
    """Also write the placement in a serving engine's format."""
    export_out: Path | None = None
    """File of the export; by default FORMAT.json beside the placement."""
    apply: str | None = None
    """Also write a copy of this checkpoint with its experts in the new order (to --out)."""
    out: Path | None = None
    """Folder of the permuted checkpoint."""
    force: bool = False
    """Replace an existing checkpoint folder."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Place, write and print."""
    from mogul.core.errors import ConfigError
    from mogul.core.log import say
    from mogul.core.units import parse_bytes
    from mogul.place.solve import Wish, place
    from mogul.spec.trace import load_trace

    if (options.apply is None) != (options.out is None):
        raise ConfigError("--apply CHECKPOINT and --out FOLDER belong together", fix="give both")
    wish = Wish(
        num_devices=options.devices,
        slots=options.slots,
        replicas=options.replicas,
        num_nodes=options.nodes,
        method=options.method,
        allow_imbalance=options.allow_imbalance,
        batch_tokens=options.batch,
        memory_bytes=None if options.memory is None else parse_bytes(options.memory),
    )
    found = place(load_trace(options.trace), wish)
    exported = _export(options, found)
    target = options.placement or options.trace / "placement.json"
    found.save(target)
    _table(found).show(options.format)
    say(f"wrote {target}" + (f" and {exported}" if exported else ""))
    if options.apply is not None and options.out is not None:
        _apply(options.apply, options.out, found, force=options.force)
    return 0


def _export(options: Options, found: Placement) -> Path | None:
    if options.export is None:
        return None
    import json

    from mogul.core.files import atomic_write
    from mogul.place.export import export

    content = export(found, options.export)
    target = options.export_out or options.trace / f"{options.export}.json"
    atomic_write(target, json.dumps(content) + "\n")
    return target


def _apply(model: str, out: Path, found: Placement, *, force: bool) -> None:
    from mogul.core.log import say
    from mogul.models.load import find_folder
    from mogul.models.permute import permute_checkpoint

    permute_checkpoint(find_folder(model), out, found, force=force)
    say(f"wrote {out}: the same model, its experts in the order of the placement")


def _table(found: Placement) -> Table:
    from mogul.core.table import Table

    layers = found.layers
    rows = []
    for name, before, after in (
        ("rho", [one.rho_before for one in layers], [one.rho for one in layers]),
        ("rho, no less possible", None, [one.rho_bound for one in layers]),
        ("gap", None, [one.gap for one in layers]),
        (
            f"delta, batch of {found.batch_tokens}",
            [one.delta_before for one in layers if one.delta_before is not None],
            [one.delta for one in layers if one.delta is not None],
        ),
    ):
        if after:
            rows.append((name, *_mean_and_worst(before), *_mean_and_worst(after)))
    notes = [f"per layer: {_methods(found)}"]
    if found.num_nodes > 1:
        notes.append(f"{found.num_devices} devices on {found.num_nodes} nodes")
    return Table(
        f"{found.model.name} on {found.num_devices} devices, {found.slots_per_device} experts each",
        ("over layers", "contiguous", "worst", "placed", "worst placed"),
        rows,
        notes,
        data=found.model_dump(),
    )


def _mean_and_worst(values: list[float] | None) -> tuple[float | None, float | None]:
    if not values:
        return None, None
    return round(sum(values) / len(values), 4), round(max(values), 4)


def _methods(found: Placement) -> str:
    from collections import Counter

    counts = Counter(one.method for one in found.layers)
    return ", ".join(f"{name} {count}" for name, count in counts.items())
