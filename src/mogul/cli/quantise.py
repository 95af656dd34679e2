"""`mogul quantise`: a checkpoint folder in, one with fp8 weights out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

EXAMPLES = """
examples:
  mogul calibrate ./moge                                measure first what its layers multiply
  mogul quantise ./moge --to fp8 --out ./moge-fp8       experts and linear layers
  mogul quantise ./Qwen3-30B-A3B --to fp8-w8a16 --out ./qwen3-w8a16
  mogul generate ./moge-fp8 --prompt "Once"             half the bytes to read from disk
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Round the weights of a checkpoint to 8-bit floats, one scale an output channel.

    The folder is in the compressed-tensors format: `mogul generate`, `chat` and the engine open
    it, and so do other programs that read the format. Where `mogul calibrate` has left statistics
    beside the checkpoint, weights are rounded by them.
    """

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Folder of the unquantised checkpoint (config.json and safetensors), or a hub id."""

    out: Path
    """Folder to write; it appears whole or not at all."""

    to: Literal["fp8", "fp8-experts", "fp8-w8a16"] = "fp8"
    """fp8: experts and linear layers, inputs rounded by token as well. fp8-experts: experts alone.
    fp8-w8a16: experts alone, inputs stay in 16 bits."""

    statistics: str | None = None
    """Folder or file that `mogul calibrate` wrote. Default: beside the checkpoint, if there."""

    device: str = "auto"
    """Device to round on, for example cpu; auto takes an accelerator where there is one."""

    force: bool = False
    """Replace an existing checkpoint folder."""

    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Write the checkpoint and print what it is."""
    from mogul.core.log import say
    from mogul.core.table import Table
    from mogul.core.units import show_bytes

    say(f"loading {options.model}")
    from mogul.models.load import find_folder, named_device
    from mogul.models.quantised_write import quantise_checkpoint
    from mogul.serve.kv_scales import carry_scales, measured_scales
    from mogul.serve.loading import find_stats

    device = named_device(options.device)
    source = find_folder(options.model)
    scales = measured_scales(source)  # of other weights: refused before anything is written
    report = quantise_checkpoint(
        source,
        options.out,
        options.to,
        importance=find_stats(source, options.statistics),
        device=device,
        force=options.force,
    )
    if scales is not None:
        carry_scales(scales, report.folder)
    is_table = options.format == "table"
    before, after = report.source_bytes, report.num_bytes
    columns = ("folder", "weights", "layers of experts", "linear layers", "bytes before", "bytes")
    sizes = [show_bytes(size) if is_table else size for size in (before, after)]
    row = (str(report.folder), report.format, report.experts, report.linears, *sizes)
    Table(f"quantised {options.model}", columns, [row]).show(options.format)
    return 0
