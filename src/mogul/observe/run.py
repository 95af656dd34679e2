"""One calibration pass: batches through a model, a trace folder out, safe against a kill.

The folder is written whole every half minute and at the end; until the end it says
`is_complete: false`. What an earlier run left there stays until the first whole state replaces it.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from mogul.core.errors import ArtifactError, ConfigError, MogulError
from mogul.core.files import check_writable
from mogul.core.log import progress
from mogul.observe import tokens
from mogul.observe.data import Calibration, position_major
from mogul.observe.tokens import TokenWriter
from mogul.observe.tracer import Batch, Level, Tracer
from mogul.spec.trace import META_FILE, ModelStamp, Trace


@dataclass(frozen=True, kw_only=True)
class TraceSettings:
    """How a calibration pass runs."""

    level: Level = "routing"
    batch: int = 8
    """Sequences in a forward."""
    per_token: bool = False
    """Also write every token's picks as Parquet."""
    seed: int = 0
    save_every_s: float = 30.0
    measure_overhead: bool = True
    """Run the first batch three times more, bare and traced, to say what tracing costs."""

    def __post_init__(self) -> None:
        """Refuse a batch of nothing."""
        if self.batch < 1:
            raise ConfigError(f"{self.batch} sequences in a forward", fix="use 1 or more")


@dataclass(frozen=True)
class TraceRun:
    """What a pass gave."""

    trace: Trace
    seconds: float
    overhead: float | None
    """Traced over bare forward, minus 1; None where it was not measured."""
    num_token_rows: int


def run_trace(
    model: nn.Module,
    stamp: ModelStamp,
    data: Calibration,
    out: str | Path,
    settings: TraceSettings,
) -> TraceRun:
    """Run all data through the model and write its trace.

    Raises:
        ConfigError: The data holds no tokens.
        ArtifactError: `out` holds something that is no trace.
        MogulError: NaN or infinite router scores, naming the layers; the folder stays as it was.
    """
    folder = Path(out)
    _check(data, folder)
    start_s = last_save_s = time.monotonic()
    with _open(model, stamp, data, settings) as tracer, torch.no_grad():
        overhead = _overhead(tracer, data, settings) if settings.measure_overhead else None
        writer = None
        done_rows = 0
        with progress("tracing", total=data.num_tokens) as bar:
            for ids_BL, real_B, task_B in data.batches(settings.batch):
                _forward(tracer, ids_BL, real_B, task_B)
                if settings.per_token:
                    writer = writer or _writer(folder, tracer)
                    _write_tokens(writer, tracer, ids_BL, real_B, task_B, done_rows)
                done_rows += len(ids_BL)
                bar.advance(int(real_B.sum()))
                if time.monotonic() - last_save_s > settings.save_every_s:
                    tracer.trace(is_complete=False, data=data.names).save(folder)
                    last_save_s = time.monotonic()
        trace = tracer.trace(data=data.names)
        trace.save(folder)
        if writer:
            writer.finish()
    seconds = time.monotonic() - start_s
    return TraceRun(trace, seconds, overhead, writer.num_rows if writer else 0)


def _check(data: Calibration, folder: Path) -> None:
    if not data.num_tokens:
        raise ConfigError("the data holds no tokens", fix="give a file with some text")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder)):
        raise ArtifactError(
            f"{folder} exists and is no trace", fix="choose another folder for --out"
        )
    check_writable(folder)


def _is_ours(folder: Path) -> bool:
    names = {file.name for file in folder.iterdir()}
    return META_FILE in names or names <= {tokens.FOLDER, tokens.DRAFT_FOLDER}


def _open(
    model: nn.Module, stamp: ModelStamp, data: Calibration, settings: TraceSettings
) -> Tracer:
    return Tracer(
        model,
        stamp,
        level=settings.level,
        tasks=data.tasks,
        seed=settings.seed,
        salt=" ".join(data.names),
    )


def _forward(tracer: Tracer, ids_BL: np.ndarray, real_B: np.ndarray, task_B: np.ndarray) -> None:
    order = position_major(real_B, ids_BL.shape[1])
    tracer.next_batch = Batch(order, task_B[order // ids_BL.shape[1]])
    _bare_forward(tracer.model, ids_BL)


def _bare_forward(model: nn.Module, ids_BL: np.ndarray) -> None:
    """Padding stands on the right of a causal model: it changes no real token."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in _arguments(type(model)) else {}
    ids = torch.from_numpy(ids_BL).to(next(model.parameters()).device)
    model(input_ids=ids, use_cache=False, **last_only)


@lru_cache
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    return frozenset(inspect.signature(kind.forward).parameters)


def _overhead(tracer: Tracer, data: Calibration, settings: TraceSettings) -> float | None:
    """What tracing adds to a forward of the first batch: the least of three each, in turn."""
    ids_BL, real_B, task_B = next(data.batches(settings.batch))
    bare_s, traced_s = [], []
    for _ in range(3):
        bare_s.append(_timed(tracer, lambda: _bare_forward(tracer.model, ids_BL), is_bare=True))
        traced_s.append(_timed(tracer, lambda: _forward(tracer, ids_BL, real_B, task_B)))
    tracer.reset()
    bare, traced = min(bare_s), min(traced_s)
    return traced / bare - 1 if bare else None


def _timed(tracer: Tracer, run: Callable[[], None], *, is_bare: bool = False) -> float:
    if is_bare:
        tracer.pause()
    try:
        start_s = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter() - start_s
    finally:
        if is_bare:
            tracer.resume()


def _writer(folder: Path, tracer: Tracer) -> TokenWriter:
    return TokenWriter(folder, tracer.stamp, tracer.layers, tracer.tasks)


def _write_tokens(
    writer: TokenWriter,
    tracer: Tracer,
    ids_BL: np.ndarray,
    real_B: np.ndarray,
    task_B: np.ndarray,
    first_seq: int,
) -> None:
    if tracer.last_ids is None:
        raise MogulError("no forward was seen")
    order = position_major(real_B, ids_BL.shape[1])
    sequence, position = np.divmod(order, ids_BL.shape[1])
    weights = tracer.last_weights
    writer.add(
        tracer.last_ids.cpu().numpy(),
        None if weights is None else weights.float().cpu().numpy(),
        seq=sequence + first_seq,
        pos=position,
        token_id=ids_BL.reshape(-1)[order],
        task=task_B[sequence],
    )
