"""Which steps are captured, and that a step laid out for a graph says what it says by itself."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mogul.core.errors import ConfigError
from mogul.serve import SamplingParams
from mogul.serve.graphs import (
    LADDER,
    MIXED,
    MOST_GUESSING,
    Ladder,
    guessing_rungs,
    rungs_up_to,
    take_recorders_off,
)
from mogul.serve.inputs import Entry, Layout
from mogul.serve.options import PROMPT_TOKENS, EngineOptions


@pytest.mark.parametrize("most", [1, 3, 16, 64, 100, 300])
def test_steps_with_guesses_are_captured_for_every_batch_at_most_twice_too_wide(most: int) -> None:
    few = guessing_rungs(rungs_up_to(most))
    assert len(few) <= 7
    for batch in range(1, min(most, MOST_GUESSING) + 1):
        assert any(batch <= rung <= max(2 * batch, 1) for rung in few), batch


def test_sizes_that_were_asked_for_are_kept() -> None:
    assert guessing_rungs((24,)) == [24]
    assert guessing_rungs((1, 4, 16, 64, 96)) == [1, 4, 16, 64]
    assert guessing_rungs(LADDER) == [1, 2, 4, 8, 16, 32, 64]


def test_no_captured_step_is_larger_than_the_largest() -> None:
    runner: Any = SimpleNamespace()
    limits = Layout(tokens=70, sequences=64, rows=70, pages=9, max_query_len=70)
    ladder = Ladder(runner, (1, 16, 64), limits, guesses=4)
    assert max(sequences * width for sequences, width in ladder.rungs) <= 70
    assert {(1, 5), (16, 4), (64, 1)} <= set(ladder.rungs)
    assert ladder.layout((16, 4)) == Layout(64, 16, 64, 9, 4)


class OnHost(Ladder):
    """Runs a step as it is laid out for a graph, where there are no graphs."""

    def __init__(self, engine: Any, *args: Any) -> None:
        super().__init__(engine.runner, *args)
        nothing: Any = ()
        self._graphs = {rung: nothing for rung in self.rungs + self.mixed}  # noqa: C420
        self.used: list[tuple[int, int]] = []

    def replay(self, rung: tuple[int, int], count: int) -> Any:
        self.used.append(rung)
        return self.runner.forward(self.runner.arena.views(self.layout(rung)))[:count]


def step_of(*counts: tuple[int, int, int]) -> list[Entry]:
    nobody: Any = None
    return [Entry(nobody, 0, count, rows, draws) for count, rows, draws in counts]


def test_steps_with_prompts_take_the_smallest_graph_that_holds_them() -> None:
    engine: Any = SimpleNamespace(runner=SimpleNamespace())
    limits = Layout(tokens=600, sequences=8, rows=600, pages=9, max_query_len=600)
    ladder = OnHost(engine, (1, 4, 8), limits, 2, (64, 512, 2048))
    assert ladder.mixed == [(64, MIXED), (512, MIXED)], "none larger than the largest step"
    prompt, decode, guess = (40, 1, 1), (1, 1, 1), (3, 3, 3)
    for entries, rung in (
        ((prompt,), (64, MIXED)),
        ((prompt, prompt), (512, MIXED)),
        ((decode,) * 3, (4, 1)),
        ((guess,) * 3, (4, 3)),
        ((prompt, decode, guess), (64, MIXED)),
        (((64, 0, 0),), (64, MIXED)),
        (((513, 1, 1),), None),
        (((40, 40, 1),), None),
        ((prompt, *(decode,) * 8), None),
    ):
        assert ladder.rung_of(step_of(*entries)) == rung, entries
    layout = ladder.layout((512, MIXED))
    assert (layout.tokens, layout.sequences, layout.rows) == (512, 8, 8)


def test_prompts_are_captured_where_steps_are() -> None:
    assert EngineOptions().captured_prompts == PROMPT_TOKENS
    assert EngineOptions(graphs=False).captured_prompts == ()
    assert EngineOptions(prompt_sizes=(32,)).captured_prompts == (32,)


@pytest.mark.parametrize("name", ["graph_sizes", "prompt_sizes"])
@pytest.mark.parametrize("size", [0, -3, "8"])
def test_steps_that_hold_nothing_are_refused(name: str, size: Any) -> None:
    options: dict[str, Any] = {name: (4, size)}
    with pytest.raises(ConfigError, match=f"{name} .* is no size of a step"):
        EngineOptions(**options)


@pytest.mark.parametrize("sizes", [0, 512, "64,512"])
def test_sizes_that_are_no_list_are_refused(sizes: Any) -> None:
    with pytest.raises(ConfigError, match=r"prompt_sizes .* is no list"):
        EngineOptions(prompt_sizes=sizes)


def test_steps_laid_out_for_graphs_say_what_they_say_by_themselves(tiny: Any, family: str) -> None:
    prompts = tiny.prompts(3, 30, 11, 50, 1, 22, 17)
    params = SamplingParams(max_tokens=12, temperature=0, logprobs=2)
    plain = tiny.engine(family).generate(prompts, params)
    engine = tiny.engine(family)
    ladder = OnHost(engine, (1, 2, 4), engine.sizes.largest_step, 0, (8, 24))
    engine.runner.ladder = ladder
    answers = engine.generate(prompts, params)
    engine.check()
    assert {width for _, width in ladder.used} == {1, MIXED}
    assert (8, MIXED) in ladder.used
    for answer, want in zip(answers, plain, strict=True):
        assert answer.token_ids == want.token_ids
        for record, other in zip(answer.logprobs, want.logprobs, strict=True):
            assert record.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_decodes_are_captured_where_prompts_cannot_be(monkeypatch: Any, caplog: Any) -> None:
    runner: Any = SimpleNamespace(device="cuda:0")
    limits = Layout(tokens=600, sequences=8, rows=600, pages=9, max_query_len=600)
    ladder = Ladder(runner, (1, 4), limits, 0, (64, 512))
    for name in ("graph_pool_handle", "synchronize"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda *_: None)
    seen: list[tuple[int, int]] = []

    def capture(rungs: list[tuple[int, int]], pool: Any, *, tune: bool) -> None:
        for rung in rungs:
            if rung == (64, MIXED):
                raise RuntimeError("no memory left")
            seen.append(rung)
            ladder._graphs[rung] = (None, None)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(ladder, "_capture", capture)
    ladder.capture(tune=False)
    assert ladder.mixed == []
    assert set(ladder._graphs) == {(1, 1), (4, 1)}
    assert "steps with prompts are not captured: RuntimeError: no memory left" in caplog.text
    assert ladder.rung_of(step_of((40, 1, 1))) is None
    assert ladder.rung_of(step_of((1, 1, 1))) == (1, 1)


@pytest.mark.parametrize("kind", ["qwen3_moe", "moge"])
def test_what_recorded_outputs_is_taken_off_and_comes_back(tiny: Any, kind: str) -> None:
    """Compiled layers would break at every hook that Transformers leaves behind."""
    model = copy.deepcopy(tiny.model(kind))
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([tiny.prompts(7)[0]])
    take_recorders_off(model)

    def hooks() -> int:
        return sum(len(module._forward_hooks) for module in model.modules())

    none = hooks()
    with torch.no_grad():
        want = model(ids, output_hidden_states=True).hidden_states
        assert hooks() > none
        take_recorders_off(model)
        assert hooks() == none
        got = model(ids, output_hidden_states=True).hidden_states
    assert len(got) == len(want) == model.config.num_hidden_layers + 1
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)
