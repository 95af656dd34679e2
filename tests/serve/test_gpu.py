"""On a device: captured and compiled steps say what plain ones say."""

from __future__ import annotations

import copy
from itertools import takewhile
from typing import Any

import pytest
import torch

from mogul.serve import SamplingParams

pytestmark = pytest.mark.gpu


def device_engine(tiny, family, dtype, **options):
    from mogul.serve.engine import Engine
    from mogul.serve.options import EngineOptions

    small = {"max_sequences": 6, "step_tokens": 64, "cache_tokens": 1600, "page_size": 16}
    model = copy.deepcopy(tiny.model(family)).to("cuda", dtype)
    return Engine(model, None, EngineOptions(**{**small, "seed": 0, **options}))


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_answers_fit_the_models_own_logits(tiny, family, graphs, compiled):
    engine = device_engine(tiny, family, torch.bfloat16, graphs=graphs, compile=compiled)
    assert (engine.runner.ladder is not None) == graphs
    prompts = tiny.prompts(3, 30, 11, 100, 64, 7, 90)
    params = SamplingParams(max_tokens=20, temperature=0, logprobs=0)
    for prompt, answer in zip(prompts, engine.generate(prompts, params), strict=True):
        assert answer.finish == "length", answer.error
        want = tiny.logprobs(family, [*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
        got = torch.tensor([record.logprob for record in answer.logprobs])
        picked = want.gather(1, torch.tensor(answer.token_ids)[:, None])[:, 0]
        assert float((want.amax(-1) - picked).median()) < 0.05, "not the likeliest tokens"
        assert float((got - picked).abs().median()) < 0.05
    engine.check()


def test_running_ahead_changes_nothing(tiny):
    prompts = tiny.prompts(3, 30, 11, 40, seed=3)
    for params in (
        SamplingParams(max_tokens=30, temperature=0),
        SamplingParams(max_tokens=30, seed=4, top_p=0.9),
        SamplingParams(max_tokens=30, temperature=0, repetition_penalty=1.2),
        SamplingParams(max_tokens=30, temperature=0, stop_token_ids=tuple(range(20))),
    ):
        engine = device_engine(tiny, "llama", torch.float32, compile=False)
        ahead = [answer.token_ids for answer in engine.generate(prompts, params)]
        engine.check()
        engine._may_overlap = lambda: False
        behind = [answer.token_ids for answer in engine.generate(prompts, params)]
        assert ahead == behind


def test_requests_that_give_way_lose_nothing(tiny):
    prompts = tiny.prompts(20, 25, 30, 22)
    params = SamplingParams(max_tokens=20, temperature=0)
    roomy = device_engine(tiny, "moge", torch.float32, compile=False)
    tight = device_engine(
        tiny, "moge", torch.float32, compile=False, cache_tokens=96, reuse_prefix=False
    )
    want = [answer.token_ids for answer in roomy.generate(prompts, params)]
    got = [answer.token_ids for answer in tight.generate(prompts, params)]
    assert tight.stats.num_preemptions > 0
    assert sum(a == b for a, b in zip(want, got, strict=True)) >= 3, "near ties aside"


def test_captured_prompts_say_what_uncaptured_ones_say(tiny):
    prompts = tiny.prompts(3, 30, 11, 100, 64, 7, 90)
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=0)
    answers = []
    for sizes in ((), (16, 32, 64)):
        engine = device_engine(tiny, "moge", torch.bfloat16, compile=False, prompt_sizes=sizes)
        assert engine.runner.ladder is not None
        assert [tokens for tokens, _ in engine.runner.ladder.mixed] == list(sizes)
        answers.append(engine.generate(prompts, params))
        engine.check()
    same = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
    assert sum(same) >= 6, "near ties aside"
    for plain, captured in zip(*answers, strict=True):
        pairs = zip(plain.logprobs[:1], captured.logprobs[:1], strict=True)
        assert all(abs(a.logprob - b.logprob) < 0.05 for a, b in pairs)


@pytest.mark.parametrize("compiled", [True, False])
def test_experts_are_counted_in_captured_steps(tiny, compiled):
    prompts = tiny.prompts(3, 30, 11, 40)
    params = SamplingParams(max_tokens=9, temperature=0)
    engine = device_engine(tiny, "moge", torch.bfloat16, compile=compiled, count_experts=True)
    assert engine.runner.ladder is not None
    before = engine.expert_counts()  # warming up and capturing computed nobody's tokens
    assert before.sum() == 0
    answers = engine.generate(prompts, params)
    computed = sum(len(p) + len(a.token_ids) - 1 for p, a in zip(prompts, answers, strict=True))
    late = engine.expert_counts().sum(1) - computed * engine.runner.model.config.num_experts_per_tok
    assert ((late >= 0) & (late <= 2 * len(prompts))).all(), "steps launched ahead of an end count"


@pytest.mark.parametrize("kind", ["compiled", "plain", "guesses"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_flashinfer_says_what_our_kernels_say(tiny, kind, kv_dtype):
    pytest.importorskip("flashinfer")
    from transformers import LlamaConfig, LlamaForCausalLM

    from mogul.serve.engine import Engine
    from mogul.serve.options import EngineOptions
    from mogul.serve.speculate import DraftLength, NgramProposer, Speculator

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=128,
        num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    model: Any = LlamaForCausalLM(config)
    model = model.to("cuda", torch.bfloat16)
    sizes = {"max_sequences": 6, "step_tokens": 128, "cache_tokens": 1600, "seed": 0}
    prompts = tiny.prompts(3, 30, 11, 100, 64, 7, 90)
    if kind == "guesses":
        prompts = [2 * prompt for prompt in prompts]
    params = SamplingParams(max_tokens=8, temperature=0, logprobs=0)
    answers = []
    for attention in ("auto", "flashinfer"):
        options = {"attention": attention, "compile": kind == "compiled", "kv_dtype": kv_dtype}
        guesser = None
        if kind == "guesses":
            guesser = Speculator(NgramProposer(shortest=1), DraftLength(3, fixed=True))
        settled = EngineOptions(**sizes, **options)
        engine = Engine(copy.deepcopy(model), None, settled, speculator=guesser)
        assert engine.runner.ladder is not None
        assert engine.runner.ladder.mixed, "steps with prompts are captured, too"
        answers.append(engine.generate(prompts, params))
        assert guesser is None or guesser.stats.drafted[0] > 0
        engine.check()
        engine.close()
    assert not any(answer.error for answer in answers[1])
    same = [a.token_ids == b.token_ids for a, b in zip(*answers, strict=True)]
    assert sum(same) >= 4, "near ties aside"
    for ours, theirs in zip(*answers, strict=True):
        pairs = zip(ours.logprobs, theirs.logprobs, strict=True)
        alike = list(takewhile(lambda pair: pair[0].token == pair[1].token, pairs))
        assert all(abs(a.logprob - b.logprob) < 0.05 for a, b in alike)
