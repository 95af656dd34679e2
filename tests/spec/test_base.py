"""A record's refusal ends with what would be right."""

from typing import Literal

import pytest
from pydantic import Field

from mogul.core.errors import ConfigError
from mogul.spec.base import Spec


class Pot(Spec):
    kind: Literal["clay", "iron"] = "clay"
    litres: float = Field(default=1.0, gt=0, le=20)
    handles: int = Field(default=2, ge=0, lt=5)
    lids: tuple[str, ...] = Field(default=("flat",), min_length=1)
    is_hot: bool = False


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("litres", 0, "use more than 0"),
        ("litres", 21, "use at most 20"),
        ("litres", float("nan"), "use a finite number"),
        ("litres", "much", "give a number"),
        ("handles", -1, "use 0 or more"),
        ("handles", 5, "use less than 5"),
        ("handles", "two", "give a whole number"),
        ("lids", (), "give at least 1"),
        ("kind", "glass", "use 'clay' or 'iron'"),
        ("lids", 5, "give a list"),
        ("is_hot", "maybe", "give true or false"),
        ("litre", 1, "did you mean 'litres'?"),
    ],
)
def test_a_wrong_value_says_how_to_mend_it(key, value, fix):
    with pytest.raises(ConfigError, match=f"pot: .*{key}") as caught:
        Pot.parse({key: value}, where="pot")
    assert caught.value.__notes__ == [f"fix: {fix}"]
