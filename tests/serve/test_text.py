"""Text, structures and guesses through the whole engine."""

from __future__ import annotations

import re

import pytest

from mogul.core.errors import ConfigError
from mogul.serve import SamplingParams, Structure
from mogul.serve.speculate import DraftLength, NgramProposer, Speculator

GREEDY = SamplingParams(max_tokens=30, temperature=0)


def guesses(most: int = 4) -> Speculator:
    return Speculator(NgramProposer(longest=3, shortest=1), DraftLength(most, fixed=True))


class Oracle(NgramProposer):
    """Guesses what is going to be said, wrong at every third place."""

    def __init__(self, texts: list[list[int]]) -> None:
        super().__init__()
        self.texts = texts

    def propose(self, requests, counts):
        found = []
        for one, count in zip(requests, counts, strict=True):
            said = list(one.tokens)
            text = next(t for t in self.texts if t[: len(said)] == said)
            guess = text[len(said) : len(said) + count]
            found.append([(t + (len(said) + i) % 3 // 2) % 90 for i, t in enumerate(guess)])
        return found


def test_chunks_make_the_text_and_the_text_makes_sense(tiny):
    engine = tiny.engine("moge", tokenizer=tiny.letters())
    chunks = list(engine.stream("Hello there", GREEDY))
    answer = chunks[-1].answer
    assert answer.text == "".join(chunk.text for chunk in chunks)
    assert answer.text == tiny.letters().decode(answer.token_ids, skip_special_tokens=True)
    assert answer.prompt_ids == tuple(tiny.letters()("Hello there")["input_ids"])


def test_a_stop_string_ends_the_answer_before_it(tiny):
    engine = tiny.engine("moge", tokenizer=tiny.letters())
    whole = engine.generate("Hello there", GREEDY)[0].text
    stop = next(whole[i : i + 2] for i in range(4, 20) if whole.index(whole[i : i + 2]) == i)
    params = SamplingParams(max_tokens=30, temperature=0, stop=(stop,))
    chunks = list(engine.stream("Hello there", params))
    answer = chunks[-1].answer
    assert answer.finish == "stop"
    assert answer.text == whole[: whole.index(stop)]
    assert answer.text == "".join(chunk.text for chunk in chunks)
    engine.check()


def test_a_structure_shapes_the_answer(tiny):
    pytest.importorskip("llguidance")
    engine = tiny.engine("moge", tokenizer=tiny.letters())
    number = SamplingParams(max_tokens=30, seed=1, structure=Structure("regex", "[0-9]{3}-[a-f]+z"))
    answers = engine.generate(["Give:", "more", "x"], [number, GREEDY, number])
    for answer in (answers[0], answers[2]):
        assert answer.finish == "stop" or len(answer.token_ids) == 30
        assert re.fullmatch("[0-9]{3}-[a-f]+z?", answer.text)
    assert answers[1].text == engine.generate("more", GREEDY)[0].text
    with pytest.raises(ConfigError, match="regex cannot be read"):
        engine.add("x", SamplingParams(structure=Structure("regex", "[")))
    engine.check()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(max_tokens=30, seed=3, temperature=0.7),
        SamplingParams(max_tokens=30, temperature=0, repetition_penalty=1.3, logprobs=1),
    ],
)
def test_guesses_change_speed_alone(tiny, family, params):
    prompts = [[t % 90 for t in prompt] for prompt in tiny.prompts(8, 21, 33)]
    plain = tiny.engine(family).generate(prompts, params)
    texts = [[*p, *a.token_ids] for p, a in zip(prompts, plain, strict=True)]
    for proposer in (NgramProposer(longest=3, shortest=1), Oracle(texts)):
        speculator = Speculator(proposer, DraftLength(4, fixed=True))
        engine = tiny.engine(family, speculator=speculator)
        numbers = [engine.add(prompt, params) for prompt in prompts]
        answers = {}
        while engine.has_work:
            answers |= {c.id: c.answer for c in engine.step() if c.answer is not None}
            engine.check()
        assert [answers[n].token_ids for n in numbers] == [a.token_ids for a in plain]
    stats = speculator.stats
    assert stats.drafted[0] > 0
    assert 0 < sum(stats.accepted) < sum(stats.drafted)
    assert engine.stats.num_steps < 3 * 30


def test_guesses_with_tight_pages_and_structures(tiny):
    pytest.importorskip("llguidance")
    structure = SamplingParams(max_tokens=30, seed=1, structure=Structure("regex", "(ab|cd)+!"))
    options = {"tokenizer": tiny.letters(), "cache_tokens": 64, "reuse_prefix": False}
    plain = tiny.engine("qwen3_moe", **options)
    quick = tiny.engine("qwen3_moe", speculator=guesses(), **options)
    prompts, params = ["abcdabcd", "ab", "one two"], [structure, GREEDY, structure]
    want, got = plain.generate(prompts, params), quick.generate(prompts, params)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert sum(quick.speculator.stats.accepted) > 0
    quick.check()


def test_routed_experts_of_guessed_tokens(tiny):
    prompts = tiny.prompts(12, 20)
    asked = SamplingParams(max_tokens=16, temperature=0, routed_experts=True)
    plain = tiny.engine("moge").generate(prompts, asked)
    texts = [[*p, *a.token_ids] for p, a in zip(prompts, plain, strict=True)]
    speculator = Speculator(Oracle(texts), DraftLength(3, fixed=True))
    quick = tiny.engine("moge", speculator=speculator).generate(prompts, asked)
    for a, b in zip(plain, quick, strict=True):
        assert a.token_ids == b.token_ids
        assert (a.routed_experts == b.routed_experts).all()
