"""Experts' tokens, counted on the device: what the routers picked, in every way a step is run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mogul.core.errors import BackendError, ConfigError
from mogul.serve import SamplingParams
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
    both = [ExpertCounts(model, torch.device("cpu")) for _ in range(2)]
    both.pop(first).close()
    assert sum(isinstance(one, CountedExperts) for one in model.modules()) == 2
    both.pop().close()
    assert not any(isinstance(one, CountedExperts) for one in model.modules())


def test_padding_and_null_picks_are_nobodys(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = ExpertCounts(tiny.engine("qwen3_moe").runner.model, torch.device("cpu"))
    row = counts._counts_LE[0]
    slots = torch.tensor([5, -1, 7])
    monkeypatch.setattr("mogul.serve.attention.running_slots", lambda: slots)
    torch.ops.mogul.count_picks(torch.tensor([[1, 8], [2, 3], [1, -1]]), row)
    assert counts.read()[0].tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    counts.close()


def test_only_engines_that_count_are_asked(tiny: Any) -> None:
    with pytest.raises(ConfigError, match="does not count"):
        tiny.engine("qwen3_moe").expert_counts()
    with pytest.raises(BackendError, match="no experts"):
        tiny.engine("llama", count_experts=True)
