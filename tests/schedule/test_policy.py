import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mogul.core.errors import ConfigError
from mogul.schedule.policy import Limits, Request, Scheduler

requests = st.lists(
    st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 40)), min_size=1, max_size=25
)


def drain(scheduler, limits, most_steps=5000):
    """Run to the end; check every step against the limits."""
    done = []
    for _ in range(most_steps):
        plan = scheduler.plan()
        if plan.is_empty:
            return done
        assert plan.prompt_tokens + len(plan.decodes) <= max(limits.step_tokens, len(plan.decodes))
        assert scheduler.num_running <= limits.sequences
        ids = [one.id for one in plan.decodes] + [one.id for one, _ in plan.prompts]
        assert len(ids) == len(set(ids))
        done += scheduler.finish(plan)
        held = sum(one.computed for one in scheduler.prompting + scheduler.decoding)
        assert scheduler.held_tokens == held <= limits.cache_tokens
    raise AssertionError("the scheduler never came to an end")


@given(requests, st.integers(8, 64), st.integers(1, 8), st.integers(100, 400))
@settings(max_examples=60, deadline=None)
def test_everyone_gets_exactly_what_was_asked(given_requests, budget, sequences, cache):
    limits = Limits(step_tokens=budget, sequences=sequences, cache_tokens=cache)
    scheduler = Scheduler(limits)
    asked = [
        Request(i, prompt, out, float(i), min(found, prompt))
        for i, (prompt, out, found) in enumerate(given_requests)
    ]
    for one in asked:
        scheduler.add(one)
    done = drain(scheduler, limits)
    assert sorted(one.id for one in done) == list(range(len(asked)))
    assert all(one.emitted == one.output_tokens for one in asked)
    assert scheduler.held_tokens == 0


def test_long_prompts_are_cut_and_decodes_go_first():
    scheduler = Scheduler(Limits(step_tokens=10))
    scheduler.add(Request(0, 8, 5))
    scheduler.finish(scheduler.plan())
    scheduler.add(Request(1, 25, 2))
    chunks = []
    for _ in range(3):
        plan = scheduler.plan()
        assert [one.id for one in plan.decodes] == [0]
        chunks.append(plan.prompt_tokens)
        scheduler.finish(plan)
    assert chunks == [9, 9, 7]


def test_first_come_first_served():
    scheduler = Scheduler(Limits(step_tokens=100, sequences=2))
    for i in range(3):
        scheduler.add(Request(i, 10, 3, float(i)))
    assert [one.id for one, _ in scheduler.plan().prompts] == [0, 1]


def test_the_youngest_gives_way_when_the_cache_is_full():
    limits = Limits(step_tokens=100, cache_tokens=30, watermark=0.0)
    scheduler = Scheduler(limits)
    for i in range(2):
        scheduler.add(Request(i, 12, 15, float(i)))
    done = drain(scheduler, limits)
    assert [one.id for one in done] == [0, 1]
    assert scheduler.num_preemptions == 1
    assert done[1].num_preempted == 1


def test_a_cached_prefix_needs_no_computing():
    scheduler = Scheduler(Limits(step_tokens=100))
    scheduler.add(Request(0, 50, 1, cached_prefix=40))
    plan = scheduler.plan()
    assert plan.prompt_tokens == 10
    assert scheduler.finish(plan)[0].emitted == 1


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_kept_free_is_a_share(share):
    with pytest.raises(ConfigError, match="watermark"):
        Limits(watermark=share)


def test_what_can_never_fit_is_refused():
    with pytest.raises(ConfigError, match="can never fit a cache of 10"):
        Scheduler(Limits(cache_tokens=10)).add(Request(0, 8, 8))
