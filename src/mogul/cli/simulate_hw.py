"""`mogul simulate hw`: the machines mogul knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import Positional, arg

EXAMPLES = """
examples:
  mogul simulate hw                 all machines
  mogul simulate hw h100            one, with the source of every number
  mogul simulate hw my-machine.toml check your own file
"""


@dataclass(frozen=True)
class Options:
    """List the machines, or show one with the source of every number."""

    device: Annotated[Positional[str], arg(metavar="[DEVICE]")] = ""
    format: Literal["table", "json", "csv"] = "table"


def run(options: Options) -> int:
    """Print the library or one device."""
    from mogul.core.table import Table
    from mogul.spec.hardware import hardware, names

    if options.device:
        device = hardware(options.device)
        rows = []
        for field, source in sorted(device.sources.items()):
            head, _, dtype = field.partition(".")
            value = getattr(device, head)
            rows.append((field, value[dtype] if dtype else value, source))
        columns = ("number", "value", "source")
        Table(device.title, columns, rows, data=device.model_dump()).show(options.format)
        return 0
    rows = []
    for name in names():
        d = hardware(name)
        rows.append(
            (
                name,
                d.title,
                round(d.peak("bf16") / 1e12, 1),
                round(max(d.peak("fp8"), d.peak("int8")) / 1e12, 1),
                round(d.memory_bytes / 1e9),
                round(d.memory_bytes_per_s / 1e9),
                round(d.link_bytes_per_s / 1e9),
                d.link_devices,
                d.price_per_hour,
            )
        )
    columns = ("name", "machine", "bf16 TFLOP/s", "8 bit", "GB", "GB/s", "link GB/s", "domain",
               "$/h")  # fmt: skip
    Table("Machines (dense peaks)", columns, rows).show(options.format)
    return 0
