"""Each sampling option against Transformers' processor of it; draws against their distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation import logits_process as hf

from mogul.serve.params import SamplingParams, SamplingRow
from mogul.serve.sampling import (
    Sampler,
    SamplingBatch,
    draw,
    uniform,
)

VOCAB = 50
PROMPT, OUTPUT = [3, 3, 7, 20], [7, 9, 9, 9, 30]
SAMPLER = Sampler()


def chi_square(observed, expected) -> float:
    """Probability of a worse fit by chance."""
    seen, want = (torch.as_tensor(x, dtype=torch.float64) for x in (observed, expected))
    worth = (seen - want).square().div(want).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2).double(), worth / 2))


def logits(rows: int = 1, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def row(params: SamplingParams, seed: int = 0, **more) -> SamplingRow:
    return SamplingRow(params, seed, **{"prompt_ids": PROMPT, "output_ids": OUTPUT, **more})


def scores(params: SamplingParams, score_SV: torch.Tensor, **more) -> torch.Tensor:
    return SAMPLER.scores(score_SV, SamplingBatch.build([row(params, **more)] * len(score_SV)))


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        (SamplingParams(temperature=0.7), [hf.TemperatureLogitsWarper(0.7)]),
        (SamplingParams(top_k=5), [hf.TopKLogitsWarper(5)]),
        (SamplingParams(top_k=500), [hf.TopKLogitsWarper(500)]),
        (SamplingParams(top_p=0.8), [hf.TopPLogitsWarper(0.8)]),
        (SamplingParams(top_p=1e-6), [hf.TopPLogitsWarper(1e-6)]),
        (SamplingParams(min_p=0.1), [hf.MinPLogitsWarper(0.1)]),
        (SamplingParams(repetition_penalty=1.3), [hf.RepetitionPenaltyLogitsProcessor(1.3)]),
        (
            SamplingParams(logit_bias={4: 3.0, 9: -100.0, 4000: 1.0}),
            [hf.SequenceBiasLogitsProcessor({(4,): 3.0, (9,): -100.0})],
        ),
        (
            SamplingParams(min_tokens=6),
            [hf.MinNewTokensLengthLogitsProcessor(len(PROMPT), 6, [2, 5], device="cpu")],
        ),
        (
            SamplingParams(
                repetition_penalty=0.8, temperature=1.5, top_k=20, top_p=0.9, min_p=0.05
            ),
            [
                hf.RepetitionPenaltyLogitsProcessor(0.8),
                hf.TemperatureLogitsWarper(1.5),
                hf.TopKLogitsWarper(20),
                hf.TopPLogitsWarper(0.9),
                hf.MinPLogitsWarper(0.05),
            ],
        ),
    ],
    ids=lambda value: "" if isinstance(value, list) else str(value)[:1],
)
def test_every_option_equals_transformers(params: SamplingParams, processors: list) -> None:
    score_SV = logits(rows=6)
    want_SV = score_SV.clone()
    history = torch.tensor([PROMPT + OUTPUT] * 6)
    for processor in processors:
        want_SV = processor(history, want_SV)
    got_SV = scores(params, score_SV, end_ids=(2, 5))
    assert torch.equal(got_SV.isinf(), want_SV.isinf())
    torch.testing.assert_close(got_SV, want_SV)


def test_a_tie_with_the_last_of_top_k_stays() -> None:
    score_SV = torch.tensor([[5.0, 4.0, 4.0, 1.0]])
    assert scores(SamplingParams(top_k=2), score_SV).isfinite().tolist() == [
        [True, True, True, False]
    ]


def test_presence_and_frequency_count_the_answer_only() -> None:
    score_SV = torch.zeros(1, VOCAB)
    got_V = scores(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), score_SV)[0]
    want_V = torch.zeros(VOCAB)
    want_V[7], want_V[30], want_V[9] = -0.75, -0.75, -1.25
    torch.testing.assert_close(got_V, want_V)


def test_the_end_may_come_once_the_answer_is_long_enough() -> None:
    params = SamplingParams(min_tokens=len(OUTPUT))
    assert scores(params, logits(), end_ids=(2,)).isfinite().all()


def test_a_structure_forbids_and_decides_over_the_end() -> None:
    allowed_V = torch.zeros(VOCAB - 4, dtype=torch.bool)
    allowed_V[2] = True
    params = SamplingParams(min_tokens=20)
    got_V = scores(params, logits(), end_ids=(2,), allowed_V=allowed_V)[0]
    assert got_V.isfinite().nonzero().flatten().tolist() == [2]


@given(st.lists(st.floats(0.05, 1), min_size=2, max_size=6), st.integers(0, 99))
def test_filters_of_a_row_know_no_neighbour(top_p: list[float], seed: int) -> None:
    score_SV = logits(len(top_p), seed)
    params = [
        SamplingParams(top_p=p, top_k=i * 7, temperature=0.5 + i) for i, p in enumerate(top_p)
    ]
    together = SAMPLER.scores(score_SV, SamplingBatch.build([row(one) for one in params]))
    for s, one in enumerate(params):
        alone = SAMPLER.scores(score_SV[s : s + 1], SamplingBatch.build([row(one)]))
        torch.testing.assert_close(together[s], alone[0])


def test_tokens_of_a_seed_are_the_same_in_any_company() -> None:
    score_SV = logits(8)
    mixed = [
        SamplingParams(temperature=t, top_p=p) for t, p in ((0, 1), (1, 1), (2, 0.9), (0.3, 1))
    ] * 2
    rows = [row(params, seed=s) for s, params in enumerate(mixed)]
    together = SAMPLER.sample(score_SV, SamplingBatch.build(rows)).ids
    for s in range(8):
        alone = SAMPLER.sample(score_SV[s : s + 1], SamplingBatch.build(rows[s : s + 1])).ids
        assert alone[0] == together[s]


@pytest.mark.parametrize("vocab", [50, 1024, 3000])
def test_draws_follow_their_distribution(vocab: int) -> None:
    count = 20_000
    probability_V = (logits(vocab=vocab)[0] / (1 if vocab == 50 else 4)).softmax(-1)
    probability_V[::7] = 0
    goal_S = torch.from_numpy(uniform([5] * count, range(count)))
    found = torch.cat([draw(probability_V.expand(len(u), -1), u) for u in goal_S.split(1000)])
    seen = torch.bincount(found, minlength=vocab).numpy()
    want = (probability_V / probability_V.sum()).double().numpy() * count
    assert (seen[want == 0] == 0).all()
    big = want >= 5
    observed = np.append(seen[big], seen[~big].sum())
    expected = np.append(want[big], want[~big].sum())
    keep = expected > 0
    assert chi_square(observed[keep], expected[keep] * count / expected.sum()) > 1e-3


def test_the_edges_of_a_draw_choose_tokens_that_exist() -> None:
    probability_V = torch.zeros(2100)
    probability_V[[1, 1030]] = 0.5
    goal_S = torch.tensor([0.0, 0.49999, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probability_V.expand(4, -1), goal_S).tolist() == [1, 1, 1030, 1030]


def test_random_streams_are_uniform_and_apart() -> None:
    first, second = uniform([1] * 20_000, range(20_000)), uniform([2] * 20_000, range(20_000))
    assert uniform([1], [7])[0] == first[7]
    for numbers in (first, second, uniform(range(20_000), [0] * 20_000)):
        assert 0 <= numbers.min() <= numbers.max() < 1
        assert chi_square(np.histogram(numbers, 50, (0, 1))[0], [len(numbers) / 50] * 50) > 1e-3
    for numbers in (second, first[1:]):
        assert abs(np.corrcoef(first[: len(numbers)], numbers)[0, 1]) < 0.03


def test_logprobs_are_the_models_own() -> None:
    score_SV = logits(3)
    params = [
        SamplingParams(temperature=0.5, top_k=2, logprobs=3, logit_bias={1: 50.0}),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=0),
    ]
    done = SAMPLER.sample(score_SV, SamplingBatch.build([row(one) for one in params]))
    want_SV = score_SV.log_softmax(-1)
    assert done.ids[0] == 1
    assert done.logprobs is not None
    assert done.top_ids is not None
    assert done.top_logprobs is not None
    torch.testing.assert_close(done.logprobs, want_SV.gather(1, done.ids[:, None])[:, 0])
    assert done.top_ids.tolist() == want_SV.topk(3).indices.tolist()
    torch.testing.assert_close(done.top_logprobs, want_SV.topk(3).values)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_broken_row_harms_no_other(temperature: float) -> None:
    score_SV = logits(3)
    params = SamplingParams(temperature=temperature)
    rows = [row(params, seed=s) for s in range(3)]
    want = SAMPLER.sample(score_SV, SamplingBatch.build(rows))
    score_SV[1, 4] = float("nan")
    done = SAMPLER.sample(score_SV, SamplingBatch.build(rows))
    assert done.is_valid.tolist() == [True, False, True]
    assert done.ids[[0, 2]].tolist() == want.ids[[0, 2]].tolist()
    assert 0 <= done.ids[1] < VOCAB


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 1e-300])
def test_however_cold_the_likeliest_is_drawn(temperature: float) -> None:
    logits = torch.tensor([[3.0, 50.0, -7.0, 49.0]])
    row = SamplingRow(SamplingParams(temperature=temperature), seed=3)
    sampled = Sampler().sample(logits, SamplingBatch.build([row]))
    assert sampled.ids.tolist() == [1]
    assert sampled.is_valid.all()
