"""Generation on one GPU: time a token and prompt speed of a model's shape, against its byte floor.

Random weights, distinct random prompts, no reuse, no stop; tokens are forced at random, so that the
experts touched are those of a varied text. TPOT is the time between tokens while every request of
the batch decodes; the floor reads every weight that is touched and all keys and values once.

    python benchmarks/gpu/bench_engine.py --preset qwen3-30b-a3b --record
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from engine_profile import profile_decode, profile_prompts
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mogul.bench import ledger
from mogul.bench.serve_floor import weights_of
from mogul.core.log import say
from mogul.serve.engine import Engine
from mogul.serve.graphs import decoder_layers
from mogul.serve.loading import random_model
from mogul.serve.options import EngineOptions
from mogul.serve.params import SamplingParams
from mogul.serve.routed import distinct_experts
from mogul.serve.sampling import Sampled, Sampler, SamplingBatch
from mogul.spec import presets

START_S = time.perf_counter()
VLLM = {"qwen3-30b-a3b": {1: 4.98, 8: 11.66, 16: 16.64, 64: 25.86, 96: 48.11}}
BARS = {"qwen3-30b-a3b": {1: 3.6, 8: 10.3, 16: 15.5, 64: 24.0, 96: 26.0}}
VLLM["pangu-pro-moe-72b"] = {1: 8.83, 8: 17.60, 64: 46.76, 228: 49.73}
BARS["pangu-pro-moe-72b"] = {1: 5.5, 8: 15.0, 64: 26.0, 228: 36.0}


class ForcedSampler(Sampler):
    """Chooses as usual and then says something else: any token, all alike."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def sample(self, logits_SV: torch.Tensor, batch: SamplingBatch) -> Sampled:
        """Tokens as if drawn evenly, at the cost of a greedy choice."""
        chosen = super().sample(logits_SV, batch)
        return Sampled(torch.randint_like(chosen.ids, self.vocab), chosen.is_valid)


def model_of(options: argparse.Namespace, name: str) -> Any:
    """The preset with its random weights; its configuration goes into a folder of that name."""
    folder = Path(options.out) / name
    folder.mkdir(parents=True, exist_ok=True)
    config = presets.config(options.preset)
    if options.layers:
        config["num_hidden_layers"] = options.layers
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    return random_model(
        folder, dtype="bfloat16", device="cuda", experts="mogul", quantise=options.quantise
    )


def main() -> None:
    options = read_options()
    start_s = time.perf_counter()
    model = model_of(options, "shape")
    torch.cuda.synchronize()
    note(options, kind="weights", seconds=time.perf_counter() - start_s)
    batches = options.batches
    length = max(options.input + options.output, *(n + 1 for n in options.first), 1)
    start_s = time.perf_counter()
    engine = Engine(
        model,
        None,
        EngineOptions(
            max_length=length,
            max_sequences=max(batches),
            step_tokens=options.step_tokens or None,
            cache_tokens=max(batches) * (length + options.page_size),
            page_size=options.page_size,
            reuse_prefix=False,
            compile=not options.no_compile,
            graphs=not options.no_graphs,
            kv_dtype=options.kv_dtype,
            attention=options.attention,
            graph_sizes=tuple(batches),
            prompt_sizes=() if options.most else None,
            fuse=not options.no_fuse,
            tune=options.tune,
        ),
    )
    note(options, kind="ready", seconds=time.perf_counter() - start_s)
    plain = engine.steps.sampler
    engine.steps.sampler = ForcedSampler(model.config.vocab_size)
    bandwidth = copy_bandwidth()
    note(options, kind="bandwidth", bytes_per_s=bandwidth)
    for batch in () if options.most else batches:
        attempt(options, measure, engine, batch, options, bandwidth)
    if options.first:
        attempt(options, first_tokens, engine, options)
    for batch in options.profile:
        prompts = prompts_of(batch, options, engine.runner.vocab_size, 7)
        attempt(options, profile_decode, engine, prompts, partial(note, options))
    if options.profile:
        prompts = prompts_of(8, options, engine.runner.vocab_size, 8)
        attempt(options, profile_prompts, engine, prompts, partial(note, options))
    if options.most:
        attempt(options, find_most, engine, options, bandwidth)
    engine.steps.sampler = plain
    if options.check:
        attempt(options, check, engine, options)
    if options.distinct:
        attempt(options, count_distinct, engine, options)


def attempt(options: Any, part: Any, *args: Any) -> None:
    """Let the other parts go on when one fails."""
    try:
        part(*args)
    except Exception as error:
        note(options, kind="failed", part=part.__name__, why=f"{type(error).__name__}: {error}")


def uncompile(engine: Engine) -> Any:
    """The model without compiled layers."""
    for layer in decoder_layers(engine.runner.model):
        layer._compiled_call_impl = None
    return engine.runner.model


def plain_attention(options: Any) -> str:
    """Transformers' attention; over keys and values rounded as fp8 pages of scale 1 hold them."""
    if options.kv_dtype != "fp8":
        return "sdpa"

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)

    def attend(module: Any, query: Any, key: Any, value: Any, *args: Any, **more: Any) -> Any:
        plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return plain(module, query, rounded(key), rounded(value), *args, **more)

    ALL_ATTENTION_FUNCTIONS.register("sdpa_fp8", attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register("sdpa_fp8", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return "sdpa_fp8"


def check(engine: Engine, options: Any) -> None:
    """Compare compiled, captured, paged answers with one plain forward of Transformers."""
    params = SamplingParams(max_tokens=24, temperature=0, logprobs=0, ignore_eos=True)
    prompts = prompts_of(3, options, engine.runner.vocab_size, 5)
    prompts = [prompts[0][:7], prompts[1][:333], prompts[2]]
    answers = engine.generate(prompts, params)
    engine.check()
    model = uncompile(engine)
    model.set_attn_implementation(plain_attention(options))
    for prompt, answer in zip(prompts, answers, strict=True):
        tokens = torch.tensor([[*prompt, *answer.token_ids]], device="cuda")
        with torch.inference_mode():
            logits = model(tokens, logits_to_keep=len(answer.token_ids) + 1).logits[0, :-1]
        want = logits.float().log_softmax(-1)
        got = torch.tensor([one.logprob for one in answer.logprobs or ()], device="cuda")
        picked = want.gather(1, tokens[0, len(prompt) :, None])[:, 0]
        note(
            options, kind="check", prompt=len(prompt), finish=answer.finish, error=answer.error,
            logprob_gap=round(float((got - picked).abs().max()), 4),
            regret=round(float((want.amax(-1) - picked).max()), 4),
            same_top=round(float((want.argmax(-1) == tokens[0, len(prompt) :]).float().mean()), 3),
        )  # fmt: skip
    model.set_attn_implementation("mogul_paged")


def read_options() -> Any:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--layers", type=int, default=0, help="0: all")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 16, 64, 96])
    parser.add_argument("--input", type=int, default=1024)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--first", type=int, nargs="*", default=[], help="time first tokens of such prompts alone"
    )
    parser.add_argument("--step-tokens", type=int, default=0, help="0: the engine's own choice")
    parser.add_argument("--page-size", type=int, default=16)
    parser.add_argument("--kv-dtype", "--kv", default="auto")
    parser.add_argument("--attention", choices=("auto", "flashinfer"), default="auto")
    parser.add_argument("--quantise", default=None, help="a name of models.quantise_load.WEIGHTS")
    parser.add_argument(
        "--most",
        type=float,
        default=0.0,
        help="only look which batch decodes most tokens a second in steps below so many ms",
    )
    parser.add_argument("--profile", type=int, nargs="*", default=[])
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-fuse", action="store_true")
    parser.add_argument("--tune", action="store_true", help="search tiles for single tokens")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--distinct", action="store_true", help="count the experts touched")
    parser.add_argument("--check", action="store_true", help="compare with a plain forward")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--out", default=".")
    options = parser.parse_args()
    if options.most and options.attention != "auto":
        parser.error("--most fills in a step on the device, which FlashInfer plans on the host")
    return options


def note(options: Any, **fields: Any) -> None:
    """Print a partial result and keep it, in case the rest never comes."""
    line = json.dumps({"at_s": round(time.perf_counter() - START_S, 1), **fields})
    say(line)
    with (Path(options.out) / "engine.jsonl").open("a") as file:
        file.write(line + "\n")


def copy_bandwidth() -> float:
    """Bytes a second that a large copy reads and writes."""
    size = 2**30
    a = torch.empty(size, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        start_s = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start_s)
    return 2 * size / min(times)


def prompts_of(batch: int, options: Any, vocab: int, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab, (batch, options.input), generator=generator).tolist()


def count_distinct(engine: Engine, options: Any) -> None:
    """Mean distinct experts a layer in decode steps of each batch size, tokens forced."""
    model = uncompile(engine)
    engine.close()
    vocab, most = model.config.vocab_size, max(options.batches)
    engine = Engine(
        model,
        None,
        EngineOptions(
            max_length=64, max_sequences=most, step_tokens=4096, cache_tokens=most * 80,
            reuse_prefix=False, record_experts=True, compile=False, graphs=False,
        ),
    )  # fmt: skip
    engine.steps.sampler = ForcedSampler(vocab)
    experts, picks_a_token = model.config.num_experts, model.config.num_experts_per_tok
    for batch in options.batches:
        for prompt in prompts_of(batch, options, vocab, batch):
            engine.add(prompt[:32], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True))
        counts: list[float] = []
        while engine.has_work:
            engine.step()
            for picks in engine.last_picks or []:
                if picks is not None and len(picks) == batch:
                    counts += distinct_experts(picks.cpu().numpy(), batch).tolist()
        even = experts * (1 - (1 - picks_a_token / experts) ** batch)
        found = sum(counts) / max(len(counts), 1)
        note(options, kind="distinct", batch=batch, experts=round(found, 2), even=round(even, 2))
    engine.close()


def measure(engine: Engine, batch: int, options: Any, bandwidth: float) -> None:
    """Run one batch size a few times and print its medians."""
    params = SamplingParams(max_tokens=options.output, temperature=0, ignore_eos=True)
    steady, own, prompt_s = [], [], []
    for run in range(options.runs + 1):
        prompts = prompts_of(batch, options, engine.runner.vocab_size, 1000 * batch + run)
        start_s = time.perf_counter()
        answers = engine.generate(prompts, params)
        bad = [answer.error for answer in answers if answer.finish != "length"]
        if bad:
            raise RuntimeError(bad[0])
        times = [answer.token_times_s for answer in answers]
        first, last = max(t[0] for t in times), min(t[-1] for t in times)
        steps = sum(1 for t in times[-1] if first < t <= last)
        if run:
            steady.append(1e3 * (last - first) / max(steps, 1))
            own.append(1e3 * median((t[-1] - t[0]) / (len(t) - 1) for t in times))
            prompt_s.append(first - start_s)
    floor = floor_ms(engine, batch, options, bandwidth)
    tpot = median(steady)
    model = "" if options.layers else options.preset  # bars and peers are of all layers
    fields: dict[str, Any] = {
        "tpot_ms": round(tpot, 3),
        "spread": [round(min(steady), 3), round(max(steady), 3)],
        "own_tpot_ms": round(median(own), 3),
        "floor_ms": round(floor, 3),
        "ratio": round(tpot / floor, 3),
        "prefill_tokens_per_s": round(batch * options.input / median(prompt_s)),
        "first_token_ms": round(1e3 * median(prompt_s), 2),
        "bar_ms": BARS.get(model, {}).get(batch),
        "vllm_ms": VLLM.get(model, {}).get(batch),
    }
    note(options, kind="measured", batch=batch, **fields)
    if options.record:
        record(engine, batch, options, fields)


def first_tokens(engine: Engine, options: Any) -> None:
    """Time prompts alone to their first token, captured and launched by the host in turns."""
    ladder = engine.runner.ladder
    assert ladder is not None
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
    ways = {"captured": ladder.mixed, "launched by the host": []}
    times: dict[tuple[str, int], list[float]] = {}
    for run in range(options.runs + 2):
        for way, ladder.mixed in ways.items():
            for length in options.first:
                draw = argparse.Namespace(input=length)
                prompt = prompts_of(1, draw, engine.runner.vocab_size, run)
                start_s = time.perf_counter()
                engine.generate(prompt, params)
                times.setdefault((way, length), []).append(time.perf_counter() - start_s)
    ladder.mixed = ways["captured"]
    rows = []
    for (way, length), seconds in times.items():
        spent = sorted(1e3 * one for one in seconds[2:])
        note(options, kind="first token", way=way, length=length, ms=round(median(spent), 2))
        rows.append(
            ledger.row(
                device=torch.cuda.get_device_name(), bench="engine",
                case=f"{case_of(engine, options)}, one prompt of {length} tokens, step {way}",
                metric="first token", unit="ms", value=round(median(spent), 2),
                spread=[round(spent[0], 2), round(spent[-1], 2)], runs=options.runs,
            )
        )  # fmt: skip
    if options.record:
        ledger.append(rows, Path(options.out) / "ledger.jsonl")


def case_of(engine: Engine, options: Any) -> str:
    """The model, its weights and its pages."""
    layers = engine.runner.model.config.num_hidden_layers
    kind = f"{options.quantise or 'bf16'} weights, KV {options.kv_dtype}"
    by = "" if options.attention == "auto" else f", attention by {options.attention}"
    return f"{options.preset} ({layers} layers), {kind}{by}"


def floor_ms(engine: Engine, batch: int, options: Any, bandwidth: float) -> float:
    """Least time of a decode step: weights touched by even picks, all keys and values, once."""
    weights = weights_of(engine.runner.model)
    context = options.input + options.output / 2
    kv = batch * context * engine.runner.token_bytes
    return 1e3 * (weights.step_bytes(weights.uniform_distinct(batch)) + kv) / bandwidth


def find_most(engine: Engine, options: Any, bandwidth: float) -> None:
    """The highest decode throughput of the given batches whose step stays below `--most` ms.

    Steps are timed with pages of random numbers in place of computed prompts, so that large batches
    cost seconds and no prefill.
    """
    best: dict[str, Any] = {}
    for cache in engine.runner.caches:  # numbers of text's size: zeros would flatter the clocks
        for pages in (cache.key, cache.value):
            if pages.itemsize == 1:
                pages.view(torch.uint8).random_(0, 256).bitwise_and_(0xBF)  # within 2, both signs
            else:
                pages.normal_()
    for batch in sorted(options.batches):
        tpot = step_ms(engine, batch, options)
        found = {
            "batch": batch,
            "tpot_ms": round(tpot, 3),
            "tokens_per_s": round(1e3 * batch / tpot),
        }
        found["floor_ms"] = round(floor_ms(engine, batch, options, bandwidth), 3)
        note(options, kind="replayed", **found)
        if tpot < options.most and found["tokens_per_s"] > best.get("tokens_per_s", 0):
            best = found
    note(options, kind="most", below_ms=options.most, **best)
    if options.record and best:
        record_most(engine, options, best)


def record_most(engine: Engine, options: Any, best: dict[str, Any]) -> None:
    """One ledger row: tokens a second, and what the floor allows at that batch."""
    floor = round(1e3 * best["batch"] / best["floor_ms"])
    kind = f"{options.quantise or 'bf16'} weights, KV {options.kv_dtype}"
    row = ledger.row(
        device=torch.cuda.get_device_name(), bench="engine_most",
        case=f"{options.preset}, {kind}, {options.input} + {options.output} tokens, one GPU",
        metric=f"decode throughput below {options.most:g} ms", unit="tokens/s",
        value=best["tokens_per_s"], runs=10, floor=floor,
        ratio=round(floor / best["tokens_per_s"], 3), batch=best["batch"],
        step_ms=best["tpot_ms"], note="captured steps replayed, sampling not counted",
    )  # fmt: skip
    ledger.append([row], Path(options.out) / "ledger.jsonl")


def step_ms(engine: Engine, batch: int, options: Any) -> float:
    """Device time of one captured decode step at mid-answer, as a median of replays."""
    ladder, arena = engine.runner.ladder, engine.runner.arena
    assert ladder is not None
    layout = ladder.layout((batch, 1))
    context = options.input + options.output // 2
    inputs = arena.views(layout)
    pages = -(-context // engine.runner.page_size)
    numbers = torch.arange(batch * pages, dtype=torch.int32, device="cuda").view(batch, pages)
    inputs.tables_SB.zero_()
    inputs.tables_SB[:, :pages] = numbers
    inputs.lengths_S.fill_(context)
    inputs.starts.copy_(torch.arange(batch + 1, dtype=torch.int32))
    inputs.positions_T.fill_(context - 1)
    last = numbers[:, (context - 1) // engine.runner.page_size].long()
    inputs.slots_T.copy_(last * engine.runner.page_size + (context - 1) % engine.runner.page_size)
    inputs.source_T.fill_(-1)
    inputs.keep_R.copy_(torch.arange(batch))
    times = []
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(12):
        inputs.ids_T.copy_(torch.randint(0, engine.runner.vocab_size, (batch,)))
        torch.cuda.synchronize()
        ladder.replay((batch, 1), batch)
        start.record()
        ladder.replay((batch, 1), batch)
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return median(times[2:])


def record(engine: Engine, batch: int, options: Any, fields: dict[str, Any]) -> None:
    """Ledger rows beside the notes."""
    sizes = f"batch {batch}, {options.input} + {options.output} tokens"
    kind = {"bench": "engine", "case": f"{case_of(engine, options)}, {sizes}, one GPU"}
    kind |= {"device": torch.cuda.get_device_name(), "runs": options.runs}
    peers = {"vllm 0.22.1 (another run)": fields["vllm_ms"]} if fields["vllm_ms"] else {}
    rows = [
        ledger.row(
            **kind, metric="TPOT", unit="ms", value=fields["tpot_ms"], spread=fields["spread"],
            floor=fields["floor_ms"], ratio=fields["ratio"], peers=peers,
        ),
        ledger.row(
            **kind, metric="prefill speed", unit="tokens/s", value=fields["prefill_tokens_per_s"]
        ),
    ]  # fmt: skip
    ledger.append(rows, Path(options.out) / "ledger.jsonl")


if __name__ == "__main__":
    main()
