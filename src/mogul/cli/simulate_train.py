"""`mogul simulate train`: one training step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mogul.cli.simulate_options import Deployment

if TYPE_CHECKING:
    from mogul.simulate.engines import Overlap
    from mogul.simulate.train_plan import TrainPlan

EXAMPLES = """
examples:
  mogul simulate train preset:qwen3-235b-a22b --device h100 --devices 256 --tp 2 --dp 16 --ep 32 \\
      --pp 8 --virtual-stages 4 --global-batch 2048 --tokens 1e12
"""


@dataclass(frozen=True, kw_only=True)
class Options(Deployment):
    """Predict time, memory, bubble and MFU of a training step.

    tp x dp is the group of devices the experts are spread over; the rest of --devices are copies.
    """

    devices: int = 8
    """Devices of the whole training."""

    sequence: int = 4096
    """Tokens a sequence."""

    global_batch: int = 256
    """Sequences a step."""

    micro_batch: int = 1
    """Sequences of one forward."""

    virtual_stages: int = 1
    """Parts of the pipeline that one device holds (interleaved 1F1B)."""

    schedule: Literal["1f1b", "dualpipe"] = "1f1b"
    """Order of forwards and backwards in the pipeline."""

    context_parallel: int = 1
    """Devices one sequence is cut over."""

    recompute: Literal["auto", "none", "selective", "experts", "full"] = "auto"
    """What is computed again in the backward pass; auto is as little as fits."""

    graphs: Literal["none", "partial", "full"] = "none"
    """What is replayed from captured graphs: nothing; attention and router; everything."""

    mtp: int = 0
    """Layers that predict further tokens."""

    fsdp: bool = False
    """Gather weights layer by layer instead of holding them."""

    balanced: bool = False
    """Every expert gets as many rows as any other, whatever the router says."""

    tokens: float | None = None
    """Training tokens: also prints the days."""

    html: Path | None = None
    """Write a report page."""

    format: Literal["table", "json"] = "table"
    """How to print; json in base units."""


def plan_of(options: Options, overlap: Overlap) -> TrainPlan:
    """How the options train."""
    from mogul.cli.flags import named_by_flags
    from mogul.simulate.train_plan import TrainPlan

    names = {"sequence_tokens": "sequence", "mtp_layers": "mtp"}
    with named_by_flags(options, **names):
        return TrainPlan(
            sequence_tokens=options.sequence,
            global_batch=options.global_batch,
            micro_batch=options.micro_batch,
            devices=options.devices,
            virtual_stages=options.virtual_stages,
            schedule=options.schedule,
            context_parallel=options.context_parallel,
            graphs=options.graphs,
            mtp_layers=options.mtp,
            is_balanced=options.balanced,
            recompute=options.recompute,
            shards_weights=options.fsdp,
            overlap=overlap,
        )


def run(options: Options) -> int:
    """Print the step."""
    from mogul.cli.simulate_options import refuse_unused, setting_of, write_page
    from mogul.core.errors import ConfigError
    from mogul.core.table import Table
    from mogul.simulate.tables import train_data, train_tables
    from mogul.simulate.train import predict_training

    serving = ("input", "output", "batch", "together", "prefix_hit", "drafts", "engine")
    refuse_unused(options, "train", *serving, "max_ttft_ms", "max_tpot_ms", "shared_tp")
    if options.tokens is not None and not 0 < options.tokens < float("inf"):
        raise ConfigError(f"--tokens {options.tokens:g} take no time", fix="give more than 0")
    setting = setting_of(options)
    found = predict_training(
        setting.model,
        setting.device,
        setting.parallel,
        plan_of(options, setting.engine.overlap),
        quant=setting.quant,
        routing=setting.routing,
        calibration=setting.calibration,
    )
    if options.format == "json":
        Table("", (), (), data=train_data(found, options.tokens)).show("json")
    else:
        for table in train_tables(found, options.tokens):
            table.show()
    write_page(options.html, f"Training {setting.title}", train_tables(found, options.tokens))
    return 0 if found.memory.fits else 1
