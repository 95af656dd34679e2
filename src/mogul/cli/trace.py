"""`mogul trace`: a model and some text in, a `trace/` folder out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mogul.cli.generation import TORCH_NAMES, Dtype

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mogul.core.table import Table
    from mogul.observe.run import TraceRun

BUILTIN = "builtin:english"

EXAMPLES = """
examples:
  mogul trace ./moge --out trace/
  mogul trace ./Qwen3-30B-A3B --data code.jsonl chat.jsonl --max-tokens 200000 --out trace/
  mogul trace ./moge --data chat.jsonl --per-token --out trace/
  mogul trace --merge monday/ tuesday/ --out week/
"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Record once what the experts of a model do, for `report`, `place` and `regroup`.

    Data are .jsonl files with "text" (and "task" where tasks matter) or plain text files. The
    trace folder stays readable when the run is killed.
    """

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = ""
    """Folder of a mixture-of-experts checkpoint, nano or nano-topk (carried), or a hub id."""
    out: Path
    """Folder of the trace; an earlier trace there is replaced at the first save."""
    data: tuple[str, ...] = (BUILTIN,)
    """Files to run; `builtin:english` is the text mogul ships."""
    merge: tuple[Path, ...] = ()
    """Add these traces of one model instead of running it."""
    level: Literal["routing", "activations"] = "routing"
    """`activations` also measures what the experts answer (for pruning and quantisation)."""
    max_tokens: int = 100_000
    """Tokens to trace at most."""
    length: int = 1024
    """Tokens in a sequence."""
    batch: int = 4
    """Sequences in a forward."""
    per_token: bool = False
    """Also write every token's picks as Parquet files."""
    device: str = "auto"
    """Device to run on, for example cpu; auto takes an accelerator where there is one."""
    dtype: Dtype = "auto"
    """Compute in this dtype; auto takes the checkpoint's."""
    experts: str = "mogul"
    """Implementation of the experts: mogul, or one of Transformers' (eager, grouped_mm...)."""
    seed: int = 0
    """Seed of the order of the data and of the sample."""
    format: Literal["table", "json", "csv"] = "table"
    """How the result is printed."""


def run(options: Options) -> int:
    """Trace, or merge traces, and print what was seen."""
    from mogul.core.errors import ConfigError

    if bool(options.model) == bool(options.merge):
        raise ConfigError(
            "give a model to trace, or --merge with traces to add, and not both",
            fix="mogul trace MODEL --out trace/",
        )
    if options.merge:
        return _merge(options)
    done = _trace(options)
    _summary(options, done).show(options.format)
    return 0


def _merge(options: Options) -> int:
    from functools import reduce

    from mogul.core.errors import ConfigError
    from mogul.core.log import say
    from mogul.spec.trace import load_trace, merge

    if options.out.resolve() in [folder.resolve() for folder in options.merge]:
        raise ConfigError(f"--out {options.out} is one of the traces", fix="choose another folder")
    total = reduce(merge, [load_trace(folder) for folder in options.merge])
    total.save(options.out)
    say(f"{options.out}: {total.meta.num_tokens:,} tokens of {len(options.merge)} traces")
    return 0


def _trace(options: Options) -> TraceRun:
    from mogul.core.log import say

    say(f"loading {options.model}")
    from mogul.models.load import find_folder, load_model, load_tokenizer, named_device
    from mogul.observe.data import calibration, check_ids
    from mogul.observe.run import TraceSettings, run_trace
    from mogul.spec.fingerprint import stamp_of_folder

    folder, device = find_folder(options.model), named_device(options.device)
    stamp = stamp_of_folder(folder).replace(name=str(options.model))
    if options.per_token:
        from mogul.observe.tokens import require_pyarrow

        require_pyarrow()
    sources = read_sources(options.data)
    tokenizer = load_tokenizer(folder)
    data = calibration(
        sources,
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        length=options.length,
        max_tokens=options.max_tokens,
        seed=options.seed,
    )
    model = load_model(
        folder,
        dtype=TORCH_NAMES[options.dtype],
        experts=options.experts,
        device=device,
    )
    check_ids(data, model)
    settings = TraceSettings(
        level=options.level, batch=options.batch, per_token=options.per_token, seed=options.seed
    )
    return run_trace(model, stamp, data, options.out, settings)


def read_sources(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """(task, text) of every document, by the name of its source."""
    from mogul.observe.data import read_texts

    sources: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if name == BUILTIN:
            from mogul.train.data import shipped_text

            sources[name] = [("english", text) for text in shipped_text().train]
        else:
            sources[name] = read_texts(Path(name))
    return sources


def _summary(options: Options, done: TraceRun) -> Table:
    from mogul.core.table import Table
    from mogul.core.units import show_s
    from mogul.observe.numbers import summary

    table = summary(done.trace)
    notes = [f"{done.trace.meta.num_tokens:,} tokens in {show_s(done.seconds)} -> {options.out}"]
    if done.overhead is not None:
        notes.append(
            f"tracing added {100 * done.overhead:.1f} % to a forward (level {options.level})"
        )
    if done.num_token_rows:
        notes.append(f"{done.num_token_rows:,} rows of picks in {options.out / 'tokens'}")
    notes.append(f"next: mogul report {options.out}")
    return Table(table.title, table.columns, table.rows, [*table.notes, *notes], table.data)
