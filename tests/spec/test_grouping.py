import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogul.core.errors import ConfigError
from mogul.spec.grouping import Grouping, divisors, legal_groups

PANGU = Grouping(num_experts=64, num_groups=8, top_k=8)


def test_pangu_pro():
    assert (PANGU.group_size, PANGU.picks_per_group) == (8, 1)
    assert PANGU.legal_devices() == (1, 2, 4, 8)
    assert PANGU.slots_per_device(456, 4) == 912
    assert PANGU.device_of_expert(4).tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [3] * 16


@pytest.mark.parametrize(
    ("values", "problem", "fix"),
    [
        ({"num_experts": 64, "num_groups": 7, "top_k": 7}, "64 experts cannot stand in 7", "8, 16"),
        ({"num_experts": 64, "num_groups": 8, "top_k": 6}, "6 picks a token", "multiple of 8"),
        ({"num_experts": 4, "num_groups": 1, "top_k": 5}, "pick 5 of 4 experts", "lower"),
        ({"num_experts": 4, "top_k": 2, "num_group": 2}, "unknown key 'num_group'", "'num_groups'"),
        ({"num_expert": 4, "top_k": 2}, "unknown key 'num_expert'", "'num_experts'"),
    ],
)
def test_nonsense_is_refused_with_a_fix(values, problem, fix):
    with pytest.raises(ConfigError, match=problem) as caught:
        Grouping(**values)
    assert fix in caught.value.__notes__[0]


def test_missing_and_mistyped_keys_are_named():
    with pytest.raises(ConfigError, match=r"plan\.json: key 'top_k' is missing"):
        Grouping.parse({"num_experts": 4}, where="plan.json")
    with pytest.raises(ConfigError, match=r"num_experts: .*given: 'many'"):
        Grouping.parse({"num_experts": "many", "top_k": 1})
    with pytest.raises(ConfigError, match=r"num_groups: .*greater than or equal to 1"):
        Grouping(num_experts=4, num_groups=0, top_k=1)


def test_devices_that_split_a_group_are_refused_naming_the_legal_ones():
    with pytest.raises(ConfigError, match="3 devices cannot hold whole groups of 8") as caught:
        PANGU.check_devices(3)
    assert caught.value.__notes__ == ["fix: use 1, 2, 4 or 8 devices"]
    with pytest.raises(ConfigError):
        PANGU.slots_per_device(10, 16)


def test_a_record_is_frozen_and_replaced_as_a_whole():
    with pytest.raises(Exception, match="frozen"):
        PANGU.top_k = 16  # type: ignore[misc]
    assert PANGU.replace(top_k=16).picks_per_group == 2


@given(groups=st.integers(1, 12), size=st.integers(1, 6), data=st.data())
def test_every_legal_device_count_gets_equal_slots_and_experts(groups, size, data):
    picks = data.draw(st.integers(1, size))
    g = Grouping(num_experts=groups * size, num_groups=groups, top_k=groups * picks)
    for devices in g.legal_devices():
        counts = np.bincount(g.device_of_expert(devices), minlength=devices)
        assert (counts == g.num_experts // devices).all()
        assert g.slots_per_device(7, devices) * devices == 7 * g.top_k


def test_divisors():
    assert divisors(12) == (1, 2, 3, 4, 6, 12)
    assert legal_groups(64, 6) == (1, 2)
