"""How much worse does a model get with fp8 or int4 weights, and with an fp8 cache?

SmolLM2-135M, its upcycled form (32 experts in 8 groups) and nano, on held-out text; weights with
and without the mean squares of the experts' inputs, measured on training text; the cache with
scale 1 and with scales measured on training text. Any machine; minutes, of the upcycled form more.

    python benchmarks/bench_quant_quality.py [--models dense upcycled nano] [--record]
"""

from __future__ import annotations

import argparse
from typing import Any

from mogul.bench import ledger
from mogul.bench.kv_quality import KvQuality, kv_qualities
from mogul.bench.quant_quality import Quality, Subject, qualities, subjects_of
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.table import Table
from mogul.models import load_model, load_tokenizer
from mogul.train.data import Windows, shipped_text, token_windows

LENGTH, KV_LENGTH = 256, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--windows", type=int, default=16, help="held-out windows of 256 tokens")
    parser.add_argument("--calibration", type=int, default=16, help="training windows")
    parser.add_argument("--models", nargs="+", default=["dense", "upcycled", "nano"])
    parser.add_argument("--formats", nargs="*", default=FORMATS)
    parser.add_argument("--calibrated", choices=("yes", "no", "both"), default="both")
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    args = parser.parse_args()
    found: list[Any] = []
    calibrated = {"yes": (True,), "no": (False,), "both": (True, False)}[args.calibrated]
    weights = [name for name in args.formats if name != "kv"]
    for subject in subjects(args, LENGTH) if weights else ():
        for quality in qualities(subject, formats=weights, calibrated=calibrated):
            print(quality, flush=True)
            if quality.format != "none":
                found.append(quality)
    for subject in subjects(args, KV_LENGTH) if "kv" in args.formats else ():
        for quality in kv_qualities(subject):
            print(quality, flush=True)
            found.append(quality)
    columns = ["model", "format", "calibrated", "bits/byte", "worse by %", "same top-1 %",
               "same picks %", "bits a weight"]  # fmt: skip
    Table("Quality of quantised weights and caches", columns, [row(q) for q in found]).show()
    if args.record:
        ledger.append(ledger_row(q, args) for q in found)


FORMATS = ["fp8", "fp8-w8a16", "fp8+linears", "int4-32", "int4-64", "int4-128", "kv"]


def subjects(args: argparse.Namespace, length: int) -> list[Subject]:
    """The models asked for, each with windows by its own tokenizer."""
    scale = LENGTH / length  # the same number of tokens
    counts = [max(1, round(count * scale)) for count in (args.windows, args.calibration)]
    found = []
    if {"dense", "upcycled"} & set(args.models):
        checkpoint = smollm2_checkpoint()
        found += subjects_of(load_model(checkpoint), *text(checkpoint, length, counts))
    if "nano" in args.models:
        parts = text("nano", length, counts)
        build = lambda: load_model("nano", dtype="float32")  # noqa: E731
        found.append(Subject("nano", build, *parts, has_router=True))
    return [subject for subject in found if subject.name in args.models]


def text(model: Any, length: int, counts: list[int]) -> tuple[Windows, Windows]:
    """Held-out and training windows as a model's tokenizer cuts them."""
    tokenizer, corpus = load_tokenizer(model), shipped_text()
    held_out, train = (
        token_windows(part, tokenizer, length).spread(count)
        for part, count in zip((corpus.held_out, corpus.train), counts, strict=True)
    )
    return held_out, train


def row(q: Quality | KvQuality) -> list:
    how = "yes" if q.calibrated else ""
    if isinstance(q, KvQuality):
        worse, same = f"{100 * q.loss:+.3f}", f"{100 * q.same_top1:.1f}"
        return [q.model, "fp8 cache", how, f"{q.bits_per_byte:.4f}", worse, same, "", ""]
    picks = "" if q.same_picks is None else f"{100 * q.same_picks:.2f}"
    return [q.model, q.format, how, f"{q.bits_per_byte:.4f}", f"{100 * q.loss:+.2f}",
            f"{100 * q.same_top1:.1f}", picks, f"{q.expert_bits:.2f}"]  # fmt: skip


def ledger_row(q: Quality | KvQuality, args: argparse.Namespace) -> dict:
    model = q.model if q.model == "nano" else f"SmolLM2-135M {q.model}"
    common: dict[str, Any] = {
        "bench": "quant_quality", "metric": "bits per byte", "unit": "bit", "runs": 1,
        "value": round(q.bits_per_byte, 5), "worse_by": round(q.loss, 5),
        "same_top1": round(q.same_top1, 4), "tokens": LENGTH * args.windows,
    }  # fmt: skip
    if isinstance(q, KvQuality):
        how = "measured scales" if q.calibrated else "scale 1"
        return ledger.row(case=f"{model} fp8 cache, {how}", **common)
    how = " with input statistics" if q.calibrated else ""
    picks = None if q.same_picks is None else round(q.same_picks, 4)
    return ledger.row(
        case=f"{model} {q.format}{how}", same_picks=picks,
        expert_bits=round(q.expert_bits, 3), **common,
    )  # fmt: skip


if __name__ == "__main__":
    main()
