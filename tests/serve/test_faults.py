"""What goes wrong hits those it concerns, and nobody else."""

from __future__ import annotations

import pkgutil

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mogul.bench.soak import Soak, slope, soak
from mogul.serve import SamplingParams
from mogul.serve.speculate import DraftLength, NgramProposer, Speculator

GREEDY = SamplingParams(max_tokens=10, temperature=0)
MARK = 77
"""A token that makes the tests' runner fail."""


def break_steps(monkeypatch, engine, how):
    """Let `how(entries, logits)` see every computed step; it may raise or change the logits."""
    run = engine.runner.run

    def breaking(entries, *rest):
        return how(entries, run(entries, *rest))

    monkeypatch.setattr(engine.runner, "run", breaking)


def is_marked(entry) -> bool:
    return MARK in entry.request.prompt_ids


def marked_prompts(tiny) -> list[list[int]]:
    prompts = [[t for t in p if t != MARK] for p in tiny.prompts(9, 12, 7, 10)]
    prompts[2][3] = MARK
    return prompts


def check_others(tiny, engine, prompts, answers, words):
    assert [answer.finish for answer in answers] == ["length", "length", "error", "length"]
    assert words in answers[2].error
    for i in (0, 1, 3):
        tiny.assert_greedy("moge", prompts[i], answers[i].token_ids, 10)
    engine.check()
    assert engine.stats.free_pages + engine.stats.cached_pages == engine.stats.num_pages


@pytest.mark.parametrize(
    "error", [RuntimeError("kernel broke"), torch.OutOfMemoryError("no memory left")]
)
def test_a_failing_step_ends_only_the_request_that_breaks_it(tiny, monkeypatch, error):
    engine = tiny.engine("moge")

    def fail(entries, logits):
        if any(map(is_marked, entries)):
            raise error
        return logits

    break_steps(monkeypatch, engine, fail)
    prompts = marked_prompts(tiny)
    answers = engine.generate(prompts, GREEDY)
    check_others(tiny, engine, prompts, answers, str(error))


def test_a_failure_that_passes_ends_nobody(tiny, monkeypatch):
    engine = tiny.engine("moge")
    left = [3]

    def fail(_entries, logits):
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("for once")
        return logits

    break_steps(monkeypatch, engine, fail)
    prompts = tiny.prompts(9, 12, 7)
    for prompt, answer in zip(prompts, engine.generate(prompts, GREEDY), strict=True):
        tiny.assert_greedy("moge", prompt, answer.token_ids, 10)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_end_only_their_request(tiny, monkeypatch, temperature):
    engine = tiny.engine("moge")

    def poison(entries, logits):
        at = 0
        for entry in entries:
            if is_marked(entry) and len(entry.request.output_ids) == 4:
                logits[at : at + entry.rows] = float("nan")
            at += entry.rows
        return logits

    break_steps(monkeypatch, engine, poison)
    prompts = marked_prompts(tiny)
    params = [GREEDY] * 4
    params[2] = SamplingParams(max_tokens=10, temperature=temperature)
    answers = engine.generate(prompts, params)
    check_others(tiny, engine, prompts, answers, "no finite number")
    assert len(answers[2].token_ids) == 4


def test_pages_of_a_failed_request_poison_nobody(tiny, monkeypatch):
    engine = tiny.engine("moge", cache_tokens=40)
    with torch.inference_mode():
        for cache in engine.runner.caches:
            cache.key.fill_(float("nan"))
            cache.value.fill_(float("nan"))
    (prompt,) = tiny.prompts(9)
    tiny.assert_greedy("moge", prompt, engine.generate([prompt], GREEDY)[0].token_ids, 10)


def test_an_answer_that_cannot_be_read_ends_only_its_request(tiny, monkeypatch):
    engine = tiny.engine("moge", tiny.letters())
    prompts = marked_prompts(tiny)
    numbers = [engine.add(prompt, GREEDY) for prompt in prompts]

    def push(_token):
        raise ValueError("half a letter")

    monkeypatch.setattr(engine._live[numbers[2]].stream, "push", push)
    answers = {c.id: c.answer for _ in range(40) for c in engine.step() if c.answer is not None}
    check_others(tiny, engine, prompts, [answers[n] for n in numbers], "half a letter")


@pytest.mark.parametrize("guesses", [False, True], ids=["plain", "guessing"])
@pytest.mark.parametrize(
    "place",
    [
        "mogul.serve.engine.take",
        "mogul.serve.steps.Steps.launch",
        "mogul.schedule.policy.Scheduler.advance",
    ],
)
def test_a_step_broken_off_is_done_again(tiny, monkeypatch, place, guesses):
    """Ctrl-C anywhere in a step: who goes on with the engine gets the same answers."""
    speculator = Speculator(NgramProposer(shortest=1), DraftLength(3, fixed=True))
    engine = tiny.engine("moge", cache_tokens=48, speculator=speculator if guesses else None)
    path, name = place.rsplit(".", 1)
    whole, calls = pkgutil.resolve_name(f"{path}:{name}" if name == "take" else place), [0]

    def broken(*args):
        calls[0] += 1
        if calls[0] % 4 == 0:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(place, broken)
    sampled = SamplingParams(max_tokens=10, temperature=1, seed=3, prompt_logprobs=0)
    prompts = tiny.prompts(9, 12, 7)
    each = zip(prompts, (GREEDY, sampled, GREEDY), strict=True)
    numbers = [engine.add(prompt, params) for prompt, params in each]
    breaks = 0
    for _ in range(300):
        try:
            engine.step()
        except KeyboardInterrupt:
            breaks += 1
        engine.check()
    assert breaks
    assert not engine.has_work
    monkeypatch.undo()
    answers = [engine.take(number)[-1].answer for number in numbers]
    for i in (0, 2):
        tiny.assert_greedy("moge", prompts[i], answers[i].token_ids, 10)
    alone = tiny.engine("moge").generate([prompts[1]], sampled)[0]
    assert answers[1].token_ids == alone.token_ids
    assert len(answers[1].prompt_logprobs) == 12
    assert engine.stats.free_pages + engine.stats.cached_pages == engine.stats.num_pages


class Life(RuleBasedStateMachine):
    """Requests come, run, are aborted; the books stand after every step and answers are right."""

    tiny = None

    def __init__(self) -> None:
        super().__init__()
        self.engine = self.tiny.engine(
            "llama", cache_tokens=48, max_sequences=3, step_tokens=9, max_length=40
        )
        self.prompts: dict[int, list[int]] = {}
        self.running: list[int] = []

    @rule(
        kind=st.integers(0, 2),
        length=st.integers(1, 25),
        tokens=st.integers(1, 12),
        priority=st.integers(0, 1),
    )
    def come(self, kind: int, length: int, tokens: int, priority: int) -> None:
        prompt = self.tiny.prompts(30, seed=kind)[0][:length]
        params = SamplingParams(max_tokens=tokens, temperature=0)
        number = self.engine.add(prompt, params, priority=priority)
        self.prompts[number] = prompt
        self.running.append(number)

    @rule(steps=st.integers(1, 6))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            for chunk in self.engine.step():
                if chunk.answer is not None:
                    self.running.remove(chunk.id)
                    said = chunk.answer.token_ids
                    assert chunk.answer.finish == "length"
                    self.tiny.assert_greedy("llama", self.prompts[chunk.id], said, len(said))

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(self.running))
        assert self.engine.abort(number)
        self.running.remove(number)

    @invariant()
    def books_stand(self) -> None:
        self.engine.check()
        if not self.running:
            stats = self.engine.stats
            assert stats.free_pages + stats.cached_pages == stats.num_pages


def test_any_life(tiny):
    from hypothesis.stateful import run_state_machine_as_test

    Life.tiny = tiny
    count = settings.default.max_examples // 3
    run_state_machine_as_test(
        Life, settings=settings(max_examples=count, stateful_step_count=20, deadline=None)
    )


def run_soak(tiny, seconds: float, speculator: Speculator | None = None) -> Soak:
    engine = tiny.engine(
        "moge", cache_tokens=600, max_sequences=8, max_length=200, speculator=speculator
    )
    return soak(engine, seconds, prompt_tokens=120, answer_tokens=60)


def guessing() -> Speculator:
    return Speculator(NgramProposer(shortest=1), DraftLength(3, fixed=True))


@pytest.mark.parametrize("speculator", [lambda: None, guessing], ids=["plain", "guessing"])
def test_a_short_soak_loses_nothing(tiny, speculator):
    for seconds in (2.0, 8.0, 32.0):  # a machine under load ends few requests in little time
        found = run_soak(tiny, seconds, speculator())
        if found.finished > 5:
            break
    assert found.finished > 5
    assert found.device_mb_min == 0


def test_a_soak_finds_what_is_lost(tiny, monkeypatch):
    monkeypatch.setattr(tiny, "engine", lossy(tiny.engine))
    with pytest.raises(AssertionError, match="readers are miscounted"):
        run_soak(tiny, 3.0)


def lossy(make):
    """Engines that forget a page of every request that ends."""

    def engine(*args, **kind):
        made = make(*args, **kind)
        give_back = made.pool.give_back
        made.pool.give_back = lambda pages: give_back(pages[1:])
        return made

    return engine


def test_growth_is_the_slope_of_a_line():
    assert slope([(0.0, 5.0), (1.0, 7.0), (2.0, 9.0)]) == pytest.approx(2.0)
    assert slope([(1.0, 5.0)]) == 0.0


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("speculator", [None, guessing()], ids=["plain", "guessing"])
def test_ten_minutes_of_random_add_and_abort(tiny, speculator):
    found = run_soak(tiny, 600.0, speculator)
    print(found)
    assert found.finished > 1000
    assert found.resident_mb_min < 1.0
