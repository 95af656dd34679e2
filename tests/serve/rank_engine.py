"""What a rank of one engine does, importable by spawned processes."""

from __future__ import annotations

from typing import Any

import torch

SIZES = {
    "vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "max_position_embeddings": 256, "initializer_range": 0.3,
    "router_n_groups": 2, "shared_expert_intermediate_size": 24, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def make_model() -> Any:
    """The same weights on every rank."""
    from mogul.models import MogeConfig, MogeForCausalLM

    torch.manual_seed(0)
    model = MogeForCausalLM(MogeConfig(**SIZES)).eval()
    model.config._experts_implementation = "mogul"
    return model


def answers(world: Any, layout: dict[str, int] | None) -> Any:
    """Greedy and sampled answers of an engine over the ranks of `layout`, or over none."""
    from mogul.serve import Engine, SamplingParams
    from mogul.serve.options import EngineOptions
    from mogul.spec.parallel import Parallel

    model = make_model()
    small = EngineOptions(max_sequences=4, step_tokens=24, cache_tokens=120, page_size=4)
    parallel = Parallel(**layout) if layout else None
    engine = Engine(model, None, small, parallel=parallel)
    dice = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 120, (n,), generator=dice).tolist() for n in (5, 30, 11, 40)]
    found = []
    for params in (
        SamplingParams(max_tokens=10, temperature=0, logprobs=0),
        SamplingParams(max_tokens=10, seed=3, top_p=0.9, logprobs=0),
        SamplingParams(max_tokens=10),  # seeds of its own
    ):
        found += engine.generate(prompts, params)
    engine.check()
    guessed = measured_guesses(layout, prompts) if layout else ([], [])
    told = [(one.token_ids, [x.logprob for x in one.logprobs or ()]) for one in found]
    return told, engine.runner.token_bytes, engine.stats.num_preemptions, guessed


def measured_guesses(layout: dict[str, int], prompts: list[list[int]]) -> tuple[list[int], Any]:
    """Guesses that an adapting engine asked for on a rank whose clock goes as it likes."""
    import time

    import torch.distributed as dist

    from mogul.serve import Engine, SamplingParams
    from mogul.serve.options import EngineOptions
    from mogul.serve.speculate import DraftLength, NgramProposer, Speculator
    from mogul.spec.parallel import Parallel

    speculator = Speculator(NgramProposer(shortest=1), DraftLength(3))
    options = EngineOptions(max_sequences=4, step_tokens=64, cache_tokens=400, page_size=4)
    engine = Engine(make_model(), None, options, parallel=Parallel(**layout), speculator=speculator)
    dice = torch.Generator().manual_seed(dist.get_rank())
    launch, chosen = engine.steps.launch, []

    def slowly(plan: Any) -> Any:
        chosen.append(speculator.asked)
        time.sleep(0.004 * float(torch.rand(1, generator=dice)) * (1 + dist.get_rank()))
        return launch(plan)

    engine.steps.launch = slowly  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=60, temperature=0)
    found = engine.generate(prompts, params)
    engine.check()
    return chosen, [one.token_ids[:10] for one in found]


PROMPTS = ("The package", "To install a server, first", "A file that", "This manual")


def captured_answers(world: Any, layout: dict[str, int] | None) -> dict[str, Any]:
    """Greedy answers of `nano` in bf16 on this rank's GPU, over the ranks of `layout` or alone."""
    from mogul.models import load_model, load_tokenizer
    from mogul.parallel.window import open_window
    from mogul.serve import Engine, SamplingParams
    from mogul.serve.options import EngineOptions
    from mogul.spec.parallel import Parallel

    model = load_model("nano", dtype="bfloat16", device=world.device, experts="mogul")
    tokenizer = load_tokenizer("nano")
    options = EngineOptions(
        max_sequences=4, max_length=256, cache_tokens=2048, compile=False, seed=0
    )
    engine = Engine(model, None, options, parallel=Parallel(**layout) if layout else None)
    prompts = [tokenizer(text).input_ids for text in PROMPTS]
    params = SamplingParams(max_tokens=48, temperature=0, logprobs=0, ignore_eos=True)
    found = engine.generate(prompts, params)
    window = torch.distributed.group.WORLD and open_window(torch.distributed.group.WORLD, "auto")
    told = {
        "ids": [list(one.token_ids) for one in found],
        "logprobs": [[x.logprob for x in one.logprobs or ()] for one in found],
        "is_captured": engine.runner.ladder is not None,
        "has_window": window is not None,
    }
    engine.close()
    return told


def alone_and_together(world: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The answers of this GPU alone, then of both."""
    return captured_answers(world, None), captured_answers(world, {"tp": 2, "ep": 2})
