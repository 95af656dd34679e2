"""An engine with guesses: the families' tokens, the model's distribution, failures."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mogul.serve import SamplingParams
from mogul.serve.speculate import DraftLength, NgramProposer, Speculator
from mogul.serve.speculate.draft_model import DraftModelProposer

GREEDY = SamplingParams(max_tokens=20, temperature=0)
CLOSE = 1e-4


def lookup() -> Speculator:
    return Speculator(NgramProposer(shortest=1), DraftLength(3, fixed=True))


def repeating(tiny) -> list[list[int]]:
    return [prompt * 3 for prompt in tiny.prompts(7, 4, 12, 9)]


@pytest.mark.parametrize(
    "options", [{}, {"step_tokens": 7}, {"cache_tokens": 100, "reuse_prefix": False}]
)
def test_tokens_are_those_of_transformers(tiny, family, options):
    """Also in chunks, and where requests give way to each other."""
    engine = tiny.engine(family, speculator=lookup(), **options)
    prompts = repeating(tiny)
    numbers = [engine.add(prompt, GREEDY) for prompt in prompts]
    answers = {}
    while engine.has_work:
        answers |= {c.id: c.answer for c in engine.step() if c.answer is not None}
        engine.check()
    for number, prompt in zip(numbers, prompts, strict=True):
        tiny.assert_greedy(family, prompt, answers[number].token_ids, 20)
    assert engine.speculator.stats.num_steps >= 5
    assert (engine.stats.num_preemptions > 0) == ("cache_tokens" in options)
    hits = engine.generate([prompts[2]], GREEDY)[0]
    assert (hits.cached_tokens > 0) == ("cache_tokens" not in options)
    tiny.assert_greedy(family, prompts[2], hits.token_ids, 20)


def test_logprobs_are_those_of_one_plain_forward(tiny, family):
    asked = SamplingParams(max_tokens=12, temperature=0, logprobs=2)
    engine = tiny.engine(family, speculator=lookup())
    prompts = repeating(tiny)
    for prompt, answer in zip(prompts, engine.generate(prompts, asked), strict=True):
        want = tiny.logprobs(family, [*prompt, *answer.token_ids])[len(prompt) - 1 :]
        for row, record in zip(want, answer.logprobs, strict=False):
            assert record.logprob == pytest.approx(float(row[record.token]), abs=CLOSE)
            assert [p for _, p in record.top] == pytest.approx(
                row.topk(2).values.tolist(), abs=CLOSE
            )
    assert engine.speculator.stats.num_steps > 0


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """Probability of a worse fit by chance; rare outcomes are taken together."""
    common = expected >= 5
    seen, want = (
        torch.cat((x[common], x[~common].sum()[None])).double() for x in (observed, expected)
    )
    worth = (seen - want).square().div(want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), worth / 2))


@torch.inference_mode()
def exact(model, prompt: list[int], temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the first token and of the second, whatever the first was."""

    def shares(texts: list[list[int]]) -> torch.Tensor:
        return (model(torch.tensor(texts)).logits[:, -1].double() / temperature).softmax(-1)

    first = shares([prompt])[0]
    second = first @ shares([[*prompt, token] for token in range(len(first))])
    return first, second


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("temperature", [1.3])
def test_drawn_tokens_follow_the_models_distribution(tiny, guesses, temperature):
    """Over 800 seeds, by chi-square; the guesser is a model that is nearly the same."""
    model, speculator = tiny.model("moge"), None
    if guesses:
        near = copy.deepcopy(model)
        with torch.no_grad():
            near.lm_head.weight += 0.05 * torch.randn(near.lm_head.weight.shape)
        speculator = Speculator(DraftModelProposer(near), DraftLength(2, fixed=True))
    engine = tiny.engine("moge", speculator=speculator, max_sequences=150, cache_tokens=3000)
    prompt, count = [5, 9], 800
    params = [
        SamplingParams(max_tokens=3, temperature=temperature, seed=seed) for seed in range(count)
    ]
    answers = engine.generate([prompt] * count, params)
    said = torch.tensor([answer.token_ids for answer in answers])
    for place, want in enumerate(exact(model, prompt, temperature)):
        seen = torch.bincount(said[:, place], minlength=tiny.vocab)
        assert chi_square(seen, want * count) > 1e-3
    if guesses:
        assert speculator.stats.drafted[0] > 300
        assert 0.2 < speculator.stats.acceptance[0] < 1


@pytest.mark.parametrize("how", ["error", "memory", "nan"])
def test_what_goes_wrong_hits_only_those_it_concerns(tiny, monkeypatch, how):
    engine = tiny.engine("moge", speculator=lookup())
    prompts = repeating(tiny)
    marked = prompts[2]
    run = engine.runner.run

    def broken(entries, *rest):
        logits, ends = run(entries, *rest), itertools.accumulate(e.rows for e in entries)
        for entry, end in zip(entries, ends, strict=True):
            if list(entry.request.prompt_ids) == marked and len(entry.request.output_ids) > 4:
                if how == "error":
                    raise RuntimeError("kernel broke")
                if how == "memory":
                    raise torch.OutOfMemoryError("no memory left")
                logits[end - entry.rows : end] = float("nan")
        return logits

    monkeypatch.setattr(engine.runner, "run", broken)
    answers = engine.generate(prompts, GREEDY)
    assert [answer.finish for answer in answers] == ["length", "length", "error", "length"]
    words = {"error": "kernel broke", "memory": "no memory left", "nan": "no finite number"}
    assert words[how] in answers[2].error
    for i in (0, 1, 3):
        tiny.assert_greedy("moge", prompts[i], answers[i].token_ids, 20)
    engine.check()
    assert engine.stats.free_pages + engine.stats.cached_pages == engine.stats.num_pages
