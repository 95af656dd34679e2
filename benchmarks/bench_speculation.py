"""Does guessing tokens pay? Time per output token with and without, on real text.

Prompts are windows of the shipped text's held-out part (or of --text), greedy, no stop. Plain and
guessing engines of the same model take turns; medians count. The number of guesses adapts unless
--fixed. Guessing may change no token: the share of answers that are equal stands beside the times.
In 16 bits a wider step may round a near tie differently: where a greedy answer first differs, one
plain forward in fp32 says how far apart the two tokens' logits are, and the largest such gap stands
beside the share.

    python benchmarks/bench_speculation.py CHECKPOINT --proposers ngram mtp draft=SMALL --record
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from mogul.bench import ledger
from mogul.bench.calibrate_timing import device_name
from mogul.core.log import say
from mogul.core.table import Table
from mogul.models import load_model, load_tokenizer
from mogul.models.load import default_device
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions
from mogul.serve.speculate import make_speculator
from mogul.train.data import shipped_text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--proposers", nargs="+", default=["ngram"], help="ngram, mtp, draft=PATH")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens")
    parser.add_argument("--most", type=int, default=4, help="guesses a request at most")
    parser.add_argument("--fixed", action="store_true", help="always guess --most tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--text", type=Path, help="real text of another kind")
    parser.add_argument("--record", nargs="?", const=str(ledger.LEDGER), help="append to a ledger")
    options = parser.parse_args()
    device = default_device()
    model = load_model(options.model, dtype=options.dtype, device=device)
    ties = Ties(options.model, device)
    text = options.text.read_text() if options.text else "\n\n".join(shipped_text().held_out)
    tokenizer: Any = load_tokenizer(options.model)
    ids = tokenizer(text)["input_ids"]
    if len(ids) < options.prompt * max(options.batches):
        parser.error(f"the text has {len(ids)} tokens, too few for these prompts")
    rows = []
    settings = EngineOptions(
        max_sequences=max(options.batches),
        max_length=options.prompt + options.new + 8,
        reuse_prefix=False,
        seed=0,
        memory_share=0.45,
        graph_sizes=tuple(sorted(options.batches)),
    )
    for name in options.proposers:
        plain = Engine(model, None, settings)
        speculator = make_speculator(
            name.removeprefix("draft="),
            guesses=options.most,
            fixed=options.fixed,
            dtype=options.dtype,
            device=device,
        )
        guessing = Engine(model, None, settings, speculator=speculator)
        for batch in options.batches:
            prompts = [ids[i * options.prompt : (i + 1) * options.prompt] for i in range(batch)]
            row, entry = compare(name, batch, plain, guessing, prompts, ties, options)
            rows.append(row)
            print(json.dumps(entry), flush=True)
            if options.record:
                ledger.append([entry], Path(options.record))
        guessing.close()
        plain.close()
    Table(
        f"{Path(options.model).name}, {options.prompt} + {options.new} tokens, "
        f"{device_name(torch.device(device))}",
        (
            "guesses by",
            "batch",
            "plain ms",
            "guessing ms",
            "times",
            "tokens a step",
            "stood",
            "equal",
            "gap",
        ),
        rows,
    ).show()


def compare(
    name: str,
    batch: int,
    plain: Engine,
    guessing: Engine,
    prompts: list[list[int]],
    ties: Ties,
    options: argparse.Namespace,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Let both engines take turns on the same prompts."""
    params = [
        SamplingParams(
            max_tokens=options.new, temperature=options.temperature, ignore_eos=True, seed=i
        )
        for i in range(batch)
    ]
    times: dict[str, list[float]] = {"plain": [], "guessing": []}
    said: dict[str, list[tuple[int, ...]]] = {}
    assert guessing.speculator is not None
    before = guessing.speculator.stats
    for run in range(options.runs + 1):
        for kind, engine in (("plain", plain), ("guessing", guessing)):
            answers = engine.generate(prompts, params)
            said[kind] = [answer.token_ids for answer in answers]
            each = [np.ptp(a.token_times_s) / (len(a.token_ids) - 1) * 1e3 for a in answers]
            if run:  # the first run warms up and teaches the number of guesses
                times[kind].append(float(median(each)))
        if run == 0:
            before = guessing.speculator.stats
    stats = guessing.speculator.stats
    steps = stats.num_steps - before.num_steps
    gained = (stats.num_tokens - before.num_tokens) / steps if steps else 0.0
    drafted = np.subtract(stats.drafted, before.drafted)
    stood = np.subtract(stats.accepted, before.accepted) / np.maximum(drafted, 1)
    plain_ms, guessing_ms = median(times["plain"]), median(times["guessing"])
    pairs = list(zip(prompts, said["plain"], said["guessing"], strict=True))
    equal = sum(a == b for _, a, b in pairs) / batch
    gaps = [] if options.temperature else [ties.gap(*pair) for pair in pairs if pair[1] != pair[2]]
    say(f"{name} batch {batch}: {plain_ms:.3f} -> {guessing_ms:.3f} ms")
    shares = " ".join(f"{share:.2f}" for share in stood)
    row = (
        name, batch, round(plain_ms, 3), round(guessing_ms, 3), round(plain_ms / guessing_ms, 3),
        round(gained, 2), shares, f"{equal:.0%}", f"{max(gaps):.4f}" if gaps else "",
    )  # fmt: skip
    entry = ledger.row(
        device_name(torch.device(default_device())),
        bench="speculation",
        case=f"{Path(options.model).name}, {name.split('=')[0]}, at most {options.most}"
        f"{' always' if options.fixed else ''}, batch {batch}, {options.prompt} + {options.new} "
        f"tokens of real text, temperature {options.temperature:g}",
        metric="time per output token",
        unit="ms",
        value=round(guessing_ms, 4),
        spread=[round(min(times["guessing"]), 4), round(max(times["guessing"]), 4)],
        runs=options.runs,
        baseline="the same engine without guesses, same run",
        baseline_value=round(plain_ms, 4),
        ratio=round(plain_ms / guessing_ms, 4),
        tokens_a_step=round(gained, 3),
        drafted=drafted.tolist(),
        acceptance=[round(float(share), 3) for share in stood],
        equal_answers=equal,
        gaps_where_answers_part=sorted(round(gap, 4) for gap in gaps),
    )
    return row, entry


class Ties:
    """Weighs two answers' first different tokens by the model in fp32, read when first asked."""

    def __init__(self, model: str, device: str) -> None:
        self._read = partial(load_model, model, dtype="float32", device=device)
        self._model: Any = None

    def gap(self, prompt: list[int], plain: tuple[int, ...], other: tuple[int, ...]) -> float:
        """How much higher the logit of the likelier of both tokens is where the answers part."""
        at = next(i for i, (a, b) in enumerate(zip(plain, other, strict=True)) if a != b)
        self._model = self._model or self._read()
        said = torch.tensor([[*prompt, *plain[:at]]], device=self._model.device)
        with torch.inference_mode():
            logits = self._model(said, logits_to_keep=1, use_cache=False).logits[0, -1].float()
        return float((logits[plain[at]] - logits[other[at]]).abs())


if __name__ == "__main__":
    main()
