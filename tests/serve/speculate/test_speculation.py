"""Speculation changes no token: greedy, sampled and in distribution it is plain decoding."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mogul.serve.params import SamplingParams, SamplingRow
from mogul.serve.sampling import Sampler, SamplingBatch
from mogul.serve.speculate import (
    DraftLength,
    NgramProposer,
    Speculator,
    count_tokens,
    draft_rows,
)

VOCAB = 12
SAMPLER = Sampler()
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(3)) * 1.5


def chi_square(observed, expected) -> float:
    """Probability of a worse fit by chance."""
    seen, want = (torch.as_tensor(x, dtype=torch.float64) for x in (observed, expected))
    worth = (seen - want).square().div(want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), worth / 2))


@dataclass
class Fake:
    """A request without an engine."""

    id: int
    params: SamplingParams
    tokens: list[int]
    seed: int = 0
    prompt: int = 0
    drafts: int = 0
    draft_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def emitted(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def output_tokens(self) -> int:
        return self.params.max_tokens

    def row(self) -> SamplingRow:
        output = self.tokens[self.prompt :]
        return SamplingRow(self.params, self.seed, self.tokens[: self.prompt], output, (0,))


class Noise:
    """Guesses anything, often more wrong than right."""

    def __init__(self, seed: int) -> None:
        self.dice = torch.Generator().manual_seed(seed)

    def propose(self, requests, counts):
        return [torch.randint(VOCAB, (count,), generator=self.dice).tolist() for count in counts]

    def forget(self, request_id: int) -> None:
        pass

    def skip(self) -> None:
        pass


def model(tokens: list[int]) -> torch.Tensor:
    """Logits from the last two tokens."""
    return TABLE[tokens[-1]] + 0.5 * TABLE[tokens[-2]].flip(0)


def step(requests: list[Fake]) -> list[int]:
    """One step of an engine: verify the guesses of every request; returns tokens gained."""
    logits, rows = [], []
    for one in requests:
        rows += draft_rows(one.row(), one.draft_ids)
        logits += [model(one.tokens + one.draft_ids[:i]) for i in range(len(one.draft_ids) + 1)]
    sampled = SAMPLER.sample(torch.stack(logits), SamplingBatch.build(rows))
    counts = count_tokens(sampled.ids.tolist(), [one.draft_ids for one in requests])
    at, gained = 0, []
    for one, count in zip(requests, counts, strict=True):
        one.tokens += sampled.ids[at : at + count].tolist()
        at += len(one.draft_ids) + 1
        gained.append(count)
    return gained


def decode(requests: list[Fake], speculator: Speculator | None = None) -> list[list[int]]:
    """Run to the end."""
    running = list(requests)
    while running:
        if speculator is not None:
            speculator.wish(running)
            speculator.guess(running)
        gained = step(running)
        if speculator is not None:
            speculator.learn(running, gained)
            speculator.timed(len(running), is_pure=True)
        running = [one for one in running if one.emitted < one.output_tokens]
    return [one.tokens[: one.prompt + one.output_tokens] for one in requests]


KINDS = {
    "greedy": SamplingParams(temperature=0, max_tokens=30),
    "sampled": SamplingParams(temperature=1, max_tokens=30),
    "filtered": SamplingParams(temperature=0.7, top_p=0.9, top_k=8, max_tokens=30),
    "penalised": SamplingParams(
        repetition_penalty=1.3, frequency_penalty=0.4, min_tokens=20, max_tokens=30
    ),
}


def requests(params: list[SamplingParams]) -> list[Fake]:
    return [Fake(i, one, [1, 2, 3 + i, 1, 2], seed=i) for i, one in enumerate(params)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("proposer", ["noise", "ngram"])
def test_tokens_are_those_of_plain_decoding(name: str, proposer: str) -> None:
    params = [KINDS[name]] * 4
    guesser = Noise(1) if proposer == "noise" else NgramProposer(shortest=1)
    speculator = Speculator(guesser, DraftLength(4, fixed=True))
    assert decode(requests(params), speculator) == decode(requests(params))
    if name == "greedy" and proposer == "ngram":
        assert speculator.stats.tokens_a_step > 1.5
    assert speculator.stats.drafted[0] > 10


def test_company_and_kinds_may_mix() -> None:
    params = list(KINDS.values())
    together = decode(requests(params), Speculator(NgramProposer(), DraftLength(3, fixed=True)))
    assert together == decode(requests(params))


@pytest.mark.parametrize("params", [KINDS["sampled"], KINDS["filtered"]], ids=["all", "filtered"])
def test_the_distribution_is_the_models(params: SamplingParams) -> None:
    """Two tokens after a fixed text, over many seeds, against their exact probabilities."""
    count = 3000
    tokens = [4, 5]

    def shares(text: list[int]) -> torch.Tensor:
        row = SamplingRow(params, 0)
        return SAMPLER.scores(model(text)[None], SamplingBatch.build([row])).double().softmax(-1)[0]

    first = shares(tokens)
    want = {
        (a, b): float(first[a] * p)
        for a in range(VOCAB)
        if first[a] > 0
        for b, p in enumerate(shares([*tokens, a]))
    }
    guess = Noise(5)
    seen: Counter[tuple[int, ...]] = Counter()
    batch = [Fake(i, params, list(tokens), seed=i) for i in range(count)]
    for one, ids in zip(batch, guess.propose(batch, [2] * count), strict=True):
        one.draft_ids = ids
    step(batch)
    for one in batch:
        one.draft_ids = []
    step(batch)
    for one in batch:
        seen[tuple(one.tokens[2:4])] += 1
    assert all(want.get(pair, 0) > 0 for pair in seen)
    big = [pair for pair, p in want.items() if p * count >= 5]
    rest = max(count - sum(want[pair] * count for pair in big), 1e-9)
    observed = [seen[pair] for pair in big] + [count - sum(seen[pair] for pair in big)]
    expected = [want[pair] * count for pair in big] + [rest]
    if rest < 1:
        observed, expected = observed[:-1], expected[:-1]
    scale = sum(observed) / sum(expected)
    assert chi_square(observed, [x * scale for x in expected]) > 1e-3


@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 3), max_size=4), st.integers(0, 4)),
        min_size=1,
        max_size=5,
    )
)
def test_counts_are_leading_agreements(cases: list[tuple[list[int], int]]) -> None:
    ids, want = [], []
    for drafts, agree in cases:
        agree = min(agree, len(drafts))
        drawn = drafts[:agree] + [9] * (len(drafts) + 1 - agree)
        ids += drawn
        want.append(agree + 1)
    assert count_tokens(ids, [drafts for drafts, _ in cases]) == want


def test_a_structure_is_walked_and_left_as_it_was() -> None:
    class Walker:
        """Allows the next number only."""

        def __init__(self) -> None:
            self.at = 0

        def allowed(self) -> torch.Tensor:
            return torch.arange(VOCAB) == self.at

        def count_allowed(self, tokens) -> int:
            return int(tokens[0] == self.at)

        def advance(self, token: int) -> None:
            assert token == self.at
            self.at += 1

        def back(self, count: int) -> None:
            self.at -= count

    walker = Walker()
    row = SamplingRow(KINDS["sampled"], 0, allowed_V=walker.allowed())
    rows = draft_rows(row, [0, 1, 7, 3], walker)  # type: ignore[arg-type]
    allowed = [one.allowed_V.nonzero().item() for one in rows if one.allowed_V is not None]
    assert allowed == [0, 1, 2, 2, 2]
    assert walker.at == 0


def test_ngram_takes_the_longest_and_latest_run() -> None:
    proposer = NgramProposer(longest=3, shortest=2)
    one = Fake(7, KINDS["greedy"], [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3])
    assert proposer.propose([one], [3]) == [[4, 9, 2]]
    one.tokens += [5, 8, 2, 3]
    assert proposer.propose([one], [2]) == [[5, 8]]
    assert proposer.propose([one], [0]) == [[]]
    assert proposer.propose([Fake(8, KINDS["greedy"], [1, 2, 3])], [4]) == [[]]
    proposer.forget(7)
    assert proposer._memories.keys() == {8}


def test_ngram_goes_on_with_a_repetition() -> None:
    one = Fake(1, KINDS["greedy"], [5, 6, 7, 5, 6])
    assert NgramProposer().propose([one], [7]) == [[7, 5, 6, 7, 5, 6, 7]]


def drive(
    length: DraftLength, share: float, cost: float, steps: int = 400, found: float = 1.0
) -> list[int]:
    """Batches of 2 whose guesses stand with `share`, are found at all with `found`, and cost `cost`
    of a plain step each; steps behind one of another kind are not timed, as in an engine."""
    dice = torch.Generator().manual_seed(0)
    chosen = [-1]
    for _ in range(steps):
        count = length.choose(2)
        drafted, gained = [], []
        for _ in range(2):
            guesses = count if torch.rand(1, generator=dice) < found else 0
            stands = torch.rand(guesses, generator=dice) < share
            drafted.append(guesses)
            gained.append(1 + int(stands.to(torch.int64).cumprod(0).sum()))
        if count:
            length.record([count] * 2, drafted, gained)
        if count == chosen[-1]:
            length.time(2, count, 1 + cost * count)
        else:
            length.time_change(2, 2 + cost * count)
        chosen.append(count)
    return chosen[1:]


def test_cheap_good_guesses_are_many() -> None:
    chosen = drive(DraftLength(8), share=0.9, cost=0.05)
    assert sum(chosen[100:]) / 300 > 4


def test_guesses_that_do_not_pay_are_left_out() -> None:
    for share, cost, found in ((0.1, 0.3, 1.0), (0.6, 0.9, 1.0), (0.9, 0.3, 0.2)):
        chosen = drive(DraftLength(8), share=share, cost=cost, found=found)
        assert sum(1 for count in chosen[20:] if count) <= 16


def test_batches_of_one_size_are_off_and_others_unknown() -> None:
    length = DraftLength(4)
    drive(length, share=0.1, cost=0.3, steps=30)
    assert length.is_off(2)
    assert not length.is_off(9)
    assert not DraftLength(4, fixed=True).is_off(2)


def test_trying_again_costs_its_share_at_most() -> None:
    """Guesses that cost ten steps each: what trying them later loses stays within its share."""
    length = DraftLength(4)
    chosen = drive(length, share=0.1, cost=9.0, steps=20_000)
    lost = sum(9.0 * count for count in chosen[20:])
    assert 0 < lost < 0.007 * 20_000


def test_what_begins_to_pay_is_found_out() -> None:
    length = DraftLength(4)
    drive(length, share=0.1, cost=0.3, steps=30)
    assert length.choose(2) == 0
    assert sum(drive(length, share=0.95, cost=0.02, steps=6000)[-100:]) / 100 > 2


def test_acceptance_is_told_by_position() -> None:
    length = DraftLength(3)
    length.record([3, 3, 0], [3, 2, 0], [3, 1, 1])
    found = length.stats
    assert found.drafted == (2, 2, 1)
    assert found.accepted == (1, 1, 0)
    assert found.acceptance == (0.5, 0.5, 0.0)
    assert found.tokens_a_step == 2
    length.record([3], [3], [4])
    later = length.stats.since(found)
    assert later.acceptance == (1.0, 1.0, 1.0)
    assert later.tokens_a_step == 4


def test_no_guess_goes_past_the_last_token() -> None:
    speculator = Speculator(Noise(0), DraftLength(4, fixed=True))
    one = Fake(0, SamplingParams(max_tokens=3), [1, 2])
    speculator.wish([one])
    assert one.drafts == 2
    one.tokens += [1, 1]
    speculator.wish([one])
    assert one.drafts == 0
