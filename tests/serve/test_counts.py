"""Experts' tokens, counted on the device: what the routers picked, in every way a step is run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mogul.core.errors import BackendError, ConfigError
from mogul.serve import Engine, SamplingParams
from mogul.serve.attention import running
from mogul.serve.counts import CountedExperts, ExpertCounts
from mogul.serve.graphs import compile_layers

GREEDY = SamplingParams(max_tokens=6, temperature=0)


def counted(picks: Any) -> np.ndarray:
    """Tokens of each of 8 experts among picks [T, layers, K]."""
    layers = picks.transpose(0, 1).flatten(1)
    return np.stack([np.bincount(ids[ids >= 0], minlength=8) for ids in layers.numpy()])


@pytest.mark.parametrize(
    ("kind", "compiled"),
    [("qwen3_moe", False), ("glm4_moe", False), ("moge", False), ("moge", True)],
)
def test_counts_are_the_routers_picks(tiny: Any, kind: str, compiled: bool) -> None:
    prompts = tiny.prompts(3, 30, 11)
    recorder = tiny.engine(kind, record_experts=True)
    numbers = [recorder.add(prompt, GREEDY) for prompt in prompts]
    want: Any = 0
    while recorder.has_work:
        recorder.step()
        for picks in recorder.last_picks or ():
            want = want + counted(picks)
    plain = [recorder.take(number)[-1].answer for number in numbers]
    engine = tiny.engine(kind, count_experts=True)
    if compiled:
        torch._dynamo.reset()
        compile_layers(engine.runner.model)
    torch._dynamo.utils.counters.clear()
    answers = engine.generate(prompts, GREEDY)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2, "layers share their code"
    assert [one.token_ids for one in answers] == [one.token_ids for one in plain]
    counts = engine.expert_counts()
    assert counts.sum() > 0
    assert np.array_equal(counts, want)


def test_experts_are_put_back_and_weights_stay_listed(tiny: Any) -> None:
    engine = tiny.engine("qwen3_moe", count_experts=True)
    model = engine.runner.model
    before = dict(tiny.model("qwen3_moe").named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(before)
    assert sum(isinstance(one, CountedExperts) for one in model.modules()) == 2
    engine.close()
    assert not any(isinstance(one, CountedExperts) for one in model.modules())


@pytest.mark.parametrize("first", [0, 1])
def test_two_that_count_on_one_model_leave_it_as_it_was(tiny: Any, first: int) -> None:
    model = tiny.engine("qwen3_moe").runner.model
    both = [ExpertCounts(model, torch.device("cpu"), owner) for owner in (1, 2)]
    both.pop(first).close()
    assert sum(isinstance(one, CountedExperts) for one in model.modules()) == 2
    both.pop().close()
    assert not any(isinstance(one, CountedExperts) for one in model.modules())


def test_padding_and_null_picks_are_nobodys(tiny: Any) -> None:
    counts = ExpertCounts(tiny.engine("qwen3_moe").runner.model, torch.device("cpu"), 7)
    row, owner = counts._counts_LE[0], torch.tensor(7)
    picks = torch.tensor([[1, 8], [2, 3], [1, -1]])
    slots = torch.tensor([5, -1, 7])
    for number, seen in ((8, 0), (7, 2)):
        state: Any = SimpleNamespace(slots_T=slots, owner=number)
        with running(state):
            torch.ops.mogul.count_picks(picks, row, owner)
        assert counts.read()[0].tolist() == [0, seen, 0, 0, 0, 0, 0, 0]
    counts.close()


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.full)])
def test_every_engine_of_a_model_counts_its_own_steps(tiny: Any, compiled: bool) -> None:
    prompts = tiny.prompts(9, 14)
    want = []
    for prompt in prompts:
        alone = tiny.engine("moge", count_experts=True)
        alone.generate([prompt], GREEDY)
        want.append(alone.expert_counts())
    first = tiny.engine("moge", count_experts=True)
    options = replace(first.options, count_experts=True)
    second = Engine(first.runner.model, options=options)
    if compiled:
        torch._dynamo.reset()
        compile_layers(first.runner.model)
    numbers = [
        one.add(prompt, GREEDY) for one, prompt in zip((first, second), prompts, strict=True)
    ]
    while first.has_work or second.has_work:
        first.step()
        second.step()
    assert first.take(numbers[0])[-1].answer.finish == "length"
    assert np.array_equal(first.expert_counts(), want[0])
    assert np.array_equal(second.expert_counts(), want[1])


def test_picks_of_another_engines_step_are_not_taken(tiny: Any) -> None:
    asked = SamplingParams(max_tokens=6, temperature=0, routed_experts=True)
    (prompt,) = tiny.prompts(9)
    want = tiny.engine("moge").generate([prompt], asked)[0].routed_experts
    first = tiny.engine("moge")
    other = Engine(first.runner.model, options=first.options)
    other.add([5, 6, 7], SamplingParams(max_tokens=40))
    first.steps.observer = lambda _entries: other.step()  # between the step and its reading
    assert np.array_equal(first.generate([prompt], asked)[0].routed_experts, want)


def test_only_engines_that_count_are_asked(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="does not count"):
        tiny.engine("qwen3_moe").expert_counts()
    with pytest.raises(BackendError, match="no experts"):
        tiny.engine("llama", count_experts=True)
