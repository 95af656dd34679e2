import logging
from typing import NamedTuple

import pytest

from mogul.core.errors import BackendError
from mogul.core.registry import Registry, warn_of_reference


@pytest.fixture
def registry():
    made = Registry("moe_forward")
    made.add("fast", lambda: "fast", why_not=lambda **f: None if f.get("gpu") else "no GPU")
    made.add("slow", lambda: "slow")
    return made


def test_the_most_preferred_usable_one_is_chosen(registry):
    assert registry.choose(gpu=True)[0] == "fast"
    name, function = registry.choose(gpu=False)
    assert (name, function()) == ("slow", "slow")


def test_a_forced_backend_that_cannot_run_says_why(registry):
    with pytest.raises(BackendError, match=r"backend 'fast' cannot run here: no GPU") as caught:
        registry["fast"]
    assert caught.value.__notes__ == ["fix: use 'slow'"]


def test_an_unknown_backend_names_the_nearest(registry):
    with pytest.raises(BackendError, match="has no backend 'fsat'") as caught:
        registry.get("fsat")
    assert "did you mean 'fast'?" in caught.value.__notes__[0]


def test_when_none_can_run_every_reason_is_told():
    made = Registry("route")
    made.add("a", print, why_not=lambda **_: "too old")
    made.add("b", print, why_not=lambda **_: "too new")
    with pytest.raises(BackendError, match=r"a: too old; b: too new"):
        made.choose()
    assert made.reasons() == {"a": "too old", "b": "too new"}


def test_first_puts_an_implementation_before_the_others(registry):
    registry.add("best", print, first=True)
    assert registry.names() == ["best", "fast", "slow"]
    assert "best" in registry


class Facts(NamedTuple):
    gpu: bool
    device: str = "here"


def test_resolving_asks_once_and_tells_of_automatic_choices_alone():
    asked, told = [], []

    def why_not(*, gpu, **_facts):
        asked.append(gpu)
        return None if gpu else "no GPU"

    made = Registry("moe_forward", on_choice=lambda _, name, facts: told.append((name, facts)))
    made.add("fast", lambda: "fast", why_not=why_not)
    made.add("reference", lambda: "slow")
    assert [made.resolve("auto", Facts(False))[0] for _ in range(3)] == ["reference"] * 3
    assert asked == [False]
    assert made.resolve("reference", Facts(True))[1]() == "slow"
    assert told == [("reference", Facts(False))]
    with pytest.raises(BackendError, match="backend 'fast' cannot run here: no GPU"):
        made.resolve("fast", Facts(False))
    made.add("newcomer", lambda: "new", first=True)
    assert made.resolve("auto", Facts(False))[0] == "newcomer"


def test_a_slow_reference_is_a_visible_line_with_the_reasons(registry, caplog):
    registry.add("reference", lambda: "slow")
    with caplog.at_level(logging.WARNING, logger="mogul"):
        warn_of_reference(registry, "slow", Facts(False))
        assert caplog.text == ""
        warn_of_reference(registry, "reference", Facts(False))
    assert "moe_forward runs the slow reference backend on here (fast: no GPU)" in caplog.text
