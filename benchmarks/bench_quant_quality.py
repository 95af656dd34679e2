"""How much worse does a model get with fp8 or int4 experts?

SmolLM2-135M and its upcycled form (32 experts in 8 groups), on held-out text; int4 with and
without the mean squares of the experts' inputs, measured on training text. Any machine; minutes.

    python benchmarks/bench_quant_quality.py [--windows 16] [--record]
"""

from __future__ import annotations

import argparse

from mogul.bench import ledger
from mogul.bench.quant_quality import Quality, qualities
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.table import Table
from mogul.models import load_model, load_tokenizer
from mogul.train.data import shipped_text, token_windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 256 tokens")
    parser.add_argument("--calibration", type=int, default=16, help="training windows")
    parser.add_argument("--formats", default="fp8,int4-32,int4-64,int4-128")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    args = parser.parse_args()
    checkpoint = smollm2_checkpoint()
    dense, tokenizer, text = load_model(checkpoint), load_tokenizer(checkpoint), shipped_text()
    held_out = token_windows(text.held_out, tokenizer, 256).spread(args.windows)
    calibration = token_windows(text.train, tokenizer, 256).spread(args.calibration)
    found = []
    for quality in qualities(dense, held_out, calibration, formats=args.formats.split(",")):
        print(quality, flush=True)
        found.append(quality)
    columns = ["model", "format", "calibrated", "bits/byte", "worse by %", "same top-1 %",
               "same picks %", "bits a weight"]  # fmt: skip
    Table("Quality of quantised experts", columns, [row(q) for q in found]).show()
    if args.record:
        ledger.append(ledger_row(q, args) for q in found if q.format != "none")


def row(q: Quality) -> list:
    picks = "" if q.same_picks is None else f"{100 * q.same_picks:.2f}"
    return [q.model, q.format, "yes" if q.calibrated else "", f"{q.bits_per_byte:.4f}",
            f"{100 * q.loss:+.2f}", f"{100 * q.same_top1:.1f}", picks,
            f"{q.expert_bits:.2f}"]  # fmt: skip


def ledger_row(q: Quality, args: argparse.Namespace) -> dict:
    how = " with input statistics" if q.calibrated else ""
    return ledger.row(
        bench="quant_quality", case=f"SmolLM2-135M {q.model} {q.format}{how}",
        metric="bits per byte", unit="bit", value=round(q.bits_per_byte, 5), runs=1,
        worse_by=round(q.loss, 5), same_top1=round(q.same_top1, 4),
        same_picks=None if q.same_picks is None else round(q.same_picks, 4),
        expert_bits=round(q.expert_bits, 3), tokens=256 * args.windows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
