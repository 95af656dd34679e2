"""`mogul upcycle`: a dense checkpoint folder in, a grouped-expert checkpoint folder out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

EXAMPLES = """
examples:
  mogul upcycle ./SmolLM2-135M-Instruct --experts 32 --groups 8 --out ./moge
  mogul upcycle ./Qwen3-0.6B --experts 64 --groups 8 --noise 0.5 --out ./moge-noisy
"""


NOISY = "not the dense function: noise was added, train before use"
EQUAL = "computes the dense model's function; train it to make the experts differ"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Turn a dense checkpoint into a mixture of grouped experts that computes the same function.

    Every FFN is cut in as many shards as there are groups; the experts of a group are copies of
    one shard, and a token picks one of them with weight 1. Llama, Mistral, Qwen2 and Qwen3.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Folder of the dense checkpoint (config.json and safetensors), or a hub id."""
    experts: int
    """Experts in every layer."""
    groups: int
    """Groups the experts stand in; divides the experts and the FFN width."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    seed: int = 0
    """Seed of the router rows and of the noise."""
    noise: float = 0.0
    """Share (0..1) of each expert's inner columns drawn anew; above 0 the function changes."""
    force: bool = False
    """Replace an existing checkpoint folder."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Write the checkpoint and print what it is."""
    from mogul.cli.flags import named_by_flags
    from mogul.core.log import say
    from mogul.core.table import Table
    from mogul.core.units import show_bytes, show_count

    say(f"loading {options.model}")
    from mogul.models.upcycle import upcycle_checkpoint

    with named_by_flags(options, num_experts="experts", num_groups="groups"):
        report = upcycle_checkpoint(
            options.model,
            options.out,
            num_experts=options.experts,
            num_groups=options.groups,
            seed=options.seed,
            noise=options.noise,
            force=options.force,
        )
    note = NOISY if options.noise else EQUAL
    plan, is_table = report.plan, options.format == "table"
    Table(
        f"upcycled {options.model}",
        ("folder", "experts", "groups", "expert width", "parameters", "active", "bytes"),
        [
            (
                str(report.folder),
                plan.num_experts,
                plan.num_groups,
                report.expert_width,
                show_count(report.params) if is_table else report.params,
                show_count(report.active_params) if is_table else report.active_params,
                show_bytes(report.num_bytes) if is_table else report.num_bytes,
            )
        ],
        notes=(note,),
    ).show(options.format)
    return 0
