import pytest

from mogul.core.errors import BackendError
from mogul.core.registry import Registry


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
