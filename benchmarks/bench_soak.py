"""Does an engine lose anything in minutes of random adds and aborts, and does it grow?

nano on this machine's accelerator or processor, a cache too small for everybody, greedy and drawn
requests mixed; --guess mtp or ngram adds guesses. Any failed request or lost page ends the run; a
run that hangs prints where every thread is and ends.

    python benchmarks/bench_soak.py [CHECKPOINT] [--seconds 600] [--guess mtp] [--record]
"""

from __future__ import annotations

import argparse
import faulthandler
from pathlib import Path

import torch

from mogul.bench import ledger
from mogul.bench.calibrate_timing import device_name
from mogul.bench.soak import soak
from mogul.core.log import say
from mogul.models import load_model
from mogul.models.load import default_device
from mogul.serve import Engine
from mogul.serve.options import EngineOptions
from mogul.serve.speculate import make_speculator


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="nano")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--guess", default="", help="ngram or mtp")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--record", nargs="?", const=str(ledger.LEDGER), help="append to a ledger")
    args = parser.parse_args()
    model = load_model(args.model, dtype=args.dtype, device=args.device)
    speculator = make_speculator(args.guess, guesses=3) if args.guess else None
    options = EngineOptions(
        max_sequences=16, max_length=200, cache_tokens=1200, step_tokens=512, seed=0
    )
    engine = Engine(model, None, options, speculator=speculator)
    faulthandler.dump_traceback_later(1.5 * args.seconds + 60, exit=True)  # compiling included
    found = soak(engine, args.seconds, prompt_tokens=120, answer_tokens=60)
    faulthandler.cancel_dump_traceback_later()
    stats = speculator.stats if speculator is not None else None
    engine.close()
    say(f"{found}")
    if stats is not None:
        say(f"guesses that stood, by position: {stats.acceptance}")
    if not args.record:
        return
    row = ledger.row(
        device_name(torch.device(args.device)), bench="soak",
        case=f"{Path(args.model).name}, {args.guess or 'no guesses'}, random adds and aborts",
        metric="growth of resident memory", unit="MB/min", runs=1,
        value=round(found.resident_mb_min, 4), device_mb_min=round(found.device_mb_min, 4),
        seconds=found.seconds, steps=found.steps, finished=found.finished, aborted=found.aborted,
        preemptions=found.preemptions, drafted=list(stats.drafted) if stats else [],
    )  # fmt: skip
    ledger.append([row], Path(args.record))


if __name__ == "__main__":
    main()
