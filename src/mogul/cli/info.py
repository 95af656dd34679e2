"""`mogul info`: what a model weighs and where it is balanced, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

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

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder, config.json, preset:NAME or hub id; `preset:` alone lists the presets."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print: a table for people; json and csv in base units (bytes, counts)."""

    devices: tuple[int, ...] = ()
    """Device counts to judge. Default: the balanced ones and powers of two up to 64 that fit."""


def run(options: Options) -> int:
    """Print what is known about the model."""
    # imported here: `mogul info --help` must not wait for numpy and pydantic
    from mogul.cli.find_config import PRESET, find_config
    from mogul.cli.info_facts import collect, list_presets
    from mogul.cli.info_tables import model_tables, preset_table
    from mogul.core.table import Table

    if options.model == PRESET:
        preset_table(list_presets()).show(options.format)
        return 0
    spec, facts = collect(find_config(options.model), options.devices)
    if options.format == "json":
        Table("", (), (), data=facts).show("json")
    elif options.format == "csv":
        Table("", ("key", "value"), _flat(facts)).show("csv")
    else:
        for table in model_tables(spec, facts):
            table.show()
    return 0


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        items = [(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(f"{prefix}.{index}", item) for index, item in enumerate(value)]
    else:
        return [(prefix, value)]
    return [row for key, item in items for row in _flat(item, key)]
