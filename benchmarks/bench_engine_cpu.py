"""Eight requests together on the processor, against Transformers' `generate` one by one.

SmolLM2-135M dense and upcycled, the same weights and dtype on both sides, greedy, no stop. The
baseline runs with the fastest of its experts implementations. The byte ceiling of the upcycled
model says how many fewer weight bytes eight tokens read together than one by one, when their picks
are as spread as was counted in this run.

    python benchmarks/bench_engine_cpu.py --record
"""

from __future__ import annotations

import argparse
import copy
import time
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from mogul.bench import ledger
from mogul.bench.smollm2 import smollm2_checkpoint
from mogul.core.log import say
from mogul.core.table import Table
from mogul.models import load_model, load_tokenizer
from mogul.models.upcycle import upcycle
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions
from mogul.serve.routed import distinct_experts
from mogul.train.data import shipped_text

BARS = {"dense": 3.0, "upcycled": 2.0}
IMPLEMENTATIONS = ("mogul", "eager", "grouped_mm", "batched_mm")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=48, help="new tokens")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--models", nargs="+", default=["dense", "upcycled"])
    parser.add_argument("--record", action="store_true", help="append to the ledger")
    options = parser.parse_args()
    folder = smollm2_checkpoint()
    dense = load_model(folder, dtype=torch.float32)
    ids = load_tokenizer(folder)(shipped_text().held_out[0][:40000])["input_ids"]
    prompts = [ids[i * options.prompt : (i + 1) * options.prompt] for i in range(options.requests)]
    models = {"dense": dense}
    if "upcycled" in options.models:
        models["upcycled"] = upcycle(
            dense, num_experts=options.experts, num_groups=options.groups
        ).eval()
    rows, entries = [], []
    for name in options.models:
        row, entry = compare(name, models[name], prompts, options)
        say(" | ".join(row))
        rows.append(row)
        entries.append(entry)
    Table(
        f"{options.requests} requests of {options.prompt} + {options.new} tokens, fp32, "
        f"{torch.get_num_threads()} threads, new tokens/s",
        ("model", "one by one", "together", "ratio", "of CPU time", "bar", "byte ceiling"),
        rows,
        notes=("medians of interleaved runs; prompts included on both sides",),
    ).show()
    if options.record:
        ledger.append(entries)


def compare(
    name: str, model: PreTrainedModel, prompts: list[list[int]], options: Any
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Let both sides take turns on one model."""
    alone = shallow(model)
    best = fastest(alone, prompts[0], options.new) if name == "upcycled" else "none"
    engine = Engine(
        model,
        None,
        EngineOptions(max_sequences=options.requests, reuse_prefix=False, max_length=1024),
    )
    params = SamplingParams(max_tokens=options.new, temperature=0, ignore_eos=True)
    ceiling = byte_ceiling(engine, prompts, params) if name == "upcycled" else len(prompts)
    engine.generate(prompts, params)
    together_s, alone_s, together_cpu_s, alone_cpu_s = [], [], [], []
    for _ in range(options.runs):
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        answers = engine.generate(prompts, params)
        together_s.append(time.perf_counter() - start_s)
        together_cpu_s.append(time.process_time() - start_cpu_s)
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        said = [generate(alone, prompt, options.new) for prompt in prompts]
        alone_s.append(time.perf_counter() - start_s)
        alone_cpu_s.append(time.process_time() - start_cpu_s)
    same = sum(list(a.token_ids) == b for a, b in zip(answers, said, strict=True))
    say(f"{name}: {same} of {len(prompts)} answers equal token by token")
    tokens = len(prompts) * options.new
    ratio = median(alone_s) / median(together_s)
    cpu_ratio = median(alone_cpu_s) / median(together_cpu_s)
    entry = ledger.row(
        bench="engine_cpu", case=f"SmolLM2-135M {name} fp32, {len(prompts)} requests of "
        f"{options.prompt} + {options.new} tokens", metric="together over one by one",
        unit="ratio", value=round(ratio, 3), runs=options.runs, floor=round(float(ceiling), 2),
        together_tokens_per_s=round(tokens / median(together_s), 2),
        alone_tokens_per_s=round(tokens / median(alone_s), 2), alone_experts=best,
        cpu_time_ratio=round(cpu_ratio, 3), equal_answers=same, threads=torch.get_num_threads(),
    )  # fmt: skip
    row = (
        name, f"{tokens / median(alone_s):.1f}", f"{tokens / median(together_s):.1f}",
        f"{ratio:.2f}", f"{cpu_ratio:.2f}", f"{BARS[name]}", f"{ceiling:.2f}",
    )  # fmt: skip
    return row, entry


def shallow(model: PreTrainedModel) -> PreTrainedModel:
    """Another module over the same weights, free to have its own attention and experts."""
    config = copy.deepcopy(model.config)
    with torch.device("meta"):
        twin = type(model)(config).to(model.dtype)
    twin.load_state_dict(model.state_dict(), assign=True)
    twin.tie_weights()
    for ours, theirs in zip(model.modules(), twin.modules(), strict=True):
        for key, buffer in ours.named_buffers(recurse=False):
            setattr(theirs, key, buffer)
    twin.generation_config = model.generation_config
    return twin.eval()


@torch.inference_mode()
def generate(model: Any, prompt: list[int], new: int) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, pad_token_id=0,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def fastest(model: Any, prompt: list[int], new: int) -> str:
    """Set the model to its fastest experts implementation and name it."""
    times = {}
    for name in IMPLEMENTATIONS:
        try:
            model.set_experts_implementation(name)
            generate(model, prompt, 4)
            start_s = time.perf_counter()
            generate(model, prompt, new)
            times[name] = time.perf_counter() - start_s
        except (RuntimeError, ValueError, KeyError) as error:
            say(f"{name} cannot run here: {error}")
    best = min(times, key=times.__getitem__)
    say("one by one: " + ", ".join(f"{k} {v:.2f} s" for k, v in times.items()) + f"; {best}")
    model.set_experts_implementation(best)
    return best


def byte_ceiling(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> float:
    """Weight bytes of single tokens over those of a step that computes one of every request."""
    engine.runner.tap.open()
    engine.options = copy.copy(engine.options)
    object.__setattr__(engine.options, "record_experts", True)
    for prompt in prompts:
        engine.add(prompt, params)
    counts = []
    while engine.has_work:
        engine.step()
        counts += [
            distinct_experts(picks.numpy(), len(prompts)).mean()
            for picks in engine.last_picks or []
            if len(picks) == len(prompts)
        ]
    engine.runner.tap.close()
    object.__setattr__(engine.options, "record_experts", False)
    model: Any = engine.runner.model
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - experts
    num, picks = model.config.num_experts, model.config.num_experts_per_tok
    single = rest + experts * picks / num
    step = rest + experts * (sum(counts) / len(counts)) / num
    return len(prompts) * single / step


if __name__ == "__main__":
    main()
