"""Trained models on real text: nano always, SmolLM2 dense and upcycled in the full run.

Every way a request can be computed gives what Transformers' `generate` gives token by token, or
differs first where the two likeliest tokens are within 1e-4; log-probabilities are those of one
plain forward within 1e-4.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch

from mogul.models import load_model, load_tokenizer
from mogul.serve import Engine, SamplingParams
from mogul.serve.options import EngineOptions
from mogul.serve.speculate import DraftLength, NgramProposer, Speculator
from mogul.serve.speculate.mtp import MtpProposer
from mogul.train.data import shipped_text

CLOSE = 1e-4
LENGTHS, NEW = (50, 20, 33, 90), 16


@dataclass
class Case:
    """A model, prompts of real text, and what Transformers says to them."""

    model: Any
    prompts: list[list[int]]
    new: int
    said: dict[int, list[int]] = field(default_factory=dict)

    def expected(self, index: int) -> list[int]:
        """Greedy tokens of `generate`, asked once."""
        if index not in self.said:
            ids = torch.tensor([self.prompts[index]])
            with torch.inference_mode():
                out = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=self.new,
                    min_new_tokens=self.new, do_sample=False, pad_token_id=0,
                )  # fmt: skip
            self.said[index] = out[0, ids.shape[1] :].tolist()
        return self.said[index]

    @torch.inference_mode()
    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """[L, V] of one plain forward."""
        return self.model(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def check(self, index: int, said: tuple[int, ...]) -> None:
        wanted, prompt = self.expected(index), self.prompts[index]
        assert len(said) == self.new
        for i, (ours, theirs) in enumerate(zip(said, wanted, strict=True)):
            if ours != theirs:
                top = self.logprobs([*prompt, *wanted[:i]])[-1].topk(2).values
                assert float(top[0] - top[1]) < CLOSE, f"prompt {index}: token {i}"
                return

    def engine(self, speculator: Speculator | None = None, **options: Any) -> Engine:
        small = {"max_sequences": 4, "step_tokens": 64, "cache_tokens": 1024, "page_size": 16}
        # `shallow`: another module over the same weights, with an attention of its own
        return Engine(
            shallow(self.model), None, EngineOptions(**{**small, **options}), speculator=speculator
        )


def shallow(model: Any) -> Any:
    """A copy of a model that shares its weights."""
    shared = {id(p): p for p in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def case_of(model: Any, name: Any, lengths: tuple[int, ...], new: int) -> Case:
    ids = load_tokenizer(name)(shipped_text().held_out[0][:20_000])["input_ids"]
    prompts, at = [], 0
    for length in lengths:
        prompts.append(ids[at : at + length])
        at += length
    prompts.append(prompts[0] + prompts[1])  # begins like the first
    return Case(model, prompts, new)


@cache
def nano() -> Case:
    return case_of(load_model("nano", dtype="float32"), "nano", LENGTHS, NEW)


@cache
def smollm2(kind: str) -> Case:
    from mogul.bench.smollm2 import smollm2_checkpoint
    from mogul.models.upcycle import upcycle

    folder = smollm2_checkpoint()
    model = load_model(folder)
    if kind == "upcycled":
        model = upcycle(model, num_experts=16, num_groups=4).eval()
    return case_of(model, folder, LENGTHS, NEW)


FULL = [pytest.mark.full, pytest.mark.timeout(1800)]


@pytest.fixture(
    params=["nano", pytest.param("dense", marks=FULL), pytest.param("upcycled", marks=FULL)]
)
def case(request: pytest.FixtureRequest) -> Case:
    return nano() if request.param == "nano" else smollm2(request.param)


def run(engine: Engine, case: Case, params: SamplingParams) -> Iterator[Any]:
    """Answers to all prompts together, the books checked after every step."""
    numbers = [engine.add(prompt, params) for prompt in case.prompts]
    answers = {}
    while engine.has_work:
        answers |= {c.id: c.answer for c in engine.step() if c.answer is not None}
        engine.check()
    engine.close()
    return (answers[number] for number in numbers)


def guesser(kind: str) -> Speculator | None:
    proposers = {
        "ngram": NgramProposer,
        "mtp": MtpProposer,
        "chain": lambda: MtpProposer(follow=True),
    }
    return Speculator(proposers[kind](), DraftLength(3, fixed=True)) if kind else None


WAYS = {
    "together": {},
    "in chunks": {"step_tokens": 13},
    "giving way": {"cache_tokens": 144, "reuse_prefix": False},
    "one by one": {"max_sequences": 1},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guesses", ["", "ngram"])
def test_greedy_tokens_are_those_of_transformers(case: Case, way: str, guesses: str) -> None:
    engine = case.engine(guesser(guesses), **WAYS[way])
    params = SamplingParams(max_tokens=case.new, temperature=0, ignore_eos=True)
    answers = list(run(engine, case, params))
    for index, answer in enumerate(answers):
        case.check(index, answer.token_ids)
    if not guesses:  # whose steps fit by chance
        assert (engine.stats.num_preemptions > 0) == (way == "giving way")
    if way == "one by one":
        assert answers[-1].cached_tokens >= 48, "it begins like the first"
    if guesses:
        assert engine.speculator is not None
        assert engine.speculator.stats.num_steps > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("guesses", ["mtp", "chain"])
def test_nanos_own_guesses_change_nothing_and_stand(way: str, guesses: str) -> None:
    case = nano()
    engine = case.engine(guesser(guesses), **WAYS[way])
    params = SamplingParams(max_tokens=case.new, temperature=0, ignore_eos=True)
    for index, answer in enumerate(run(engine, case, params)):
        case.check(index, answer.token_ids)
    assert engine.speculator is not None
    first, second, _ = engine.speculator.stats.acceptance
    assert first > 0.4
    assert second > 0.2


@pytest.mark.parametrize("guesses", ["", "ngram"])
def test_logprobs_are_those_of_one_plain_forward(case: Case, guesses: str) -> None:
    asked = SamplingParams(
        max_tokens=8, temperature=0, logprobs=3, prompt_logprobs=0, ignore_eos=True
    )
    engine = case.engine(guesser(guesses), step_tokens=40)
    for prompt, answer in zip(case.prompts, run(engine, case, asked), strict=True):
        tokens = [*prompt, *answer.token_ids]
        want = case.logprobs(tokens)
        for i, record in enumerate([*answer.prompt_logprobs[1:], *answer.logprobs]):
            assert record.token == tokens[i + 1]
            assert record.logprob == pytest.approx(float(want[i, record.token]), abs=CLOSE)
        for i, record in enumerate(answer.logprobs, len(prompt) - 1):
            assert [p for _, p in record.top] == pytest.approx(
                want[i].topk(3).values.tolist(), abs=CLOSE
            )
