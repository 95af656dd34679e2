"""`mogul bench serve`: how fast the engine answers here, and how near the limit that is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from mogul.cli.generation import TORCH_NAMES, Dtype, Quantise

EXAMPLES = """
examples:
  mogul bench serve ./moge                                1, 8 and 64 requests at once
  mogul bench serve ./moge --batch 1 16 --input 512 --output 64
  mogul bench serve ./moge --rate 4 --requests 200        requests arrive at random, 4 a second
  mogul bench serve preset:qwen3-30b-a3b --load random    a shape, weights at random
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Serve prompts of random tokens; print times to first and per token, floor and ratio."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """Checkpoint folder, or hub id; with --load random also preset:NAME or a config.json."""

    batch: tuple[int, ...] = (1, 8, 64)
    """Requests that stand ready together, one load each."""

    rate: float | None = None
    """Requests a second that arrive at random instead."""

    requests: int = 100
    """Requests of an open load."""

    input: int = 1024
    """Prompt tokens of a request."""

    output: int = 128
    """Output tokens of a request."""

    runs: int = 3
    """Runs of each load; medians count."""

    tokens: Literal["auto", "greedy", "random"] = "auto"
    """How tokens are chosen; auto is greedy, and random where that picks too few experts."""

    load: Literal["checkpoint", "random"] = "checkpoint"
    """Weights of the checkpoint, or random ones of its shape."""

    dtype: Dtype = "auto"
    """Compute in this dtype."""

    device: str | None = None
    """Device; default: an accelerator where there is one."""

    experts: str = "mogul"
    """Implementation of the experts."""

    quantise: Quantise = "no"
    """Quantise on loading: fp8 experts and linear layers, fp8-all the head too, others experts."""

    statistics: str | None = None
    """File or folder of `mogul calibrate`, where not the checkpoint's own."""

    set: tuple[str, ...] = ()
    """Options of the engine as NAME=VALUE, for example kv_dtype=fp8 page_size=64 graphs=false."""

    guess: str = ""
    """Guess tokens and verify them: ngram, mtp, or a draft model's folder."""

    guesses: int = 4
    """Guessed tokens a request at most; fewer where they do not pay."""

    record: bool = False
    """Append the results to the ledger."""

    record_to: Path | None = None
    """Append the results to this file."""

    format: Literal["table", "json", "csv"] = "table"
    """How to print."""


def run(options: Options) -> int:
    """Measure and print."""
    from tempfile import TemporaryDirectory

    from mogul.core.log import say

    say(f"loading {options.model}")
    from mogul.bench import ledger
    from mogul.bench.serve import open_and_measure
    from mogul.bench.serve_report import ledger_rows, table

    with TemporaryDirectory() as folder:
        result = open_and_measure(
            _path(options, Path(folder)),
            _request(options),
            load=options.load,
            dtype=TORCH_NAMES[options.dtype],
            device=options.device,
            experts=options.experts,
            name=options.model,
            quantise=None if options.quantise == "no" else options.quantise,
            statistics=options.statistics,
        )
    table(result).show(options.format)
    if options.record:
        ledger.append(ledger_rows(result))
    if options.record_to is not None:
        ledger.append(ledger_rows(result), options.record_to)
    return 0


def _request(options: Options) -> Any:
    from mogul.bench.serve import Request
    from mogul.bench.serve_load import FORCED_TEMPERATURE, Workload

    sizes = {
        "input_tokens": options.input,
        "output_tokens": options.output,
        "temperature": FORCED_TEMPERATURE if options.tokens == "random" else 0.0,
    }
    if options.rate is not None:
        workloads = (Workload(options.requests, rate=options.rate, **sizes),)
    else:
        workloads = tuple(Workload(count, **sizes) for count in options.batch)
    return Request(
        workloads,
        options.runs,
        options.tokens == "auto" and not options.guess,  # nobody guesses random tokens
        engine_options(options.set),
        options.guess,
        options.guesses,
    )


def engine_options(pairs: tuple[str, ...]) -> dict[str, Any]:
    """NAME=VALUE pairs as fields of `EngineOptions`.

    Raises:
        ConfigError: not a pair, or no field of that name.
    """
    from dataclasses import fields

    from mogul.core.errors import ConfigError, nearest
    from mogul.serve.options import EngineOptions

    known = [field.name for field in fields(EngineOptions)]
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise ConfigError(
                f"--set {pair} is not NAME=VALUE", fix="write for example --set kv_dtype=fp8"
            )
        if name not in known:
            raise ConfigError(f"the engine has no option {name!r}", fix=nearest(name, known))
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def _path(options: Options, folder: Path) -> str:
    """What the engine opens; for a bare config, a folder that holds it alone."""
    from mogul.cli.find_config import PRESET, find_config
    from mogul.core.errors import ConfigError

    is_config = options.model.startswith(PRESET) or Path(options.model).is_file()
    if not is_config:
        return options.model
    if options.load != "random":
        raise ConfigError(f"{options.model} has no weights", fix="add --load random")
    config = json.dumps(dict(find_config(options.model).config))
    (folder / "config.json").write_text(config, encoding="utf-8")
    return str(folder)
