import math

import pytest

from mogul.core.errors import ConfigError
from mogul.simulate.compare import at_equal_tpot, with_groups
from mogul.simulate.laws import fine_grained_loss, leverage, quality
from mogul.simulate.routing import Routing, layer_loads
from mogul.simulate.run import Setting
from mogul.simulate.shape import Ranges, Target, study
from mogul.simulate.sweep import front, layouts, search
from mogul.spec.families import model_spec
from mogul.spec.hardware import hardware
from mogul.spec.parallel import Parallel
from mogul.spec.presets import config
from mogul.spec.workload import Workload

H100, H200 = hardware("h100"), hardware("h200")
QWEN = model_spec(config("qwen3-30b-a3b"))
PANGU = model_spec(config("pangu-pro-moe-72b"))


def test_layouts_are_legal_and_hold_the_papers():
    found = list(layouts(PANGU, 8))
    assert all(one.devices == 8 for one in found)
    assert Parallel(tp=4, dp=2, ep=4, moe_tp=2, shared_tp=8) in found
    assert len(found) == len(set(map(str, found)))


def test_the_front_is_not_beaten():
    found = search(QWEN, H200, Workload(max_tpot_s=0.03), device_counts=(1, 2))
    assert found.points
    for one in found.front:
        assert one.tpot_s <= 0.03
        assert not any(
            other.tokens_per_s_per_device > one.tokens_per_s_per_device
            and other.tokens_per_s_per_user > one.tokens_per_s_per_user
            for other in found.points
            if other.meets_targets()
        )
    assert found.front == front([one for one in found.points if one.meets_targets()])
    assert found.disaggregated[0].tpot_s <= 0.03


def test_a_search_without_room_says_what_is_missing():
    with pytest.raises(ConfigError, match="does not fit"):
        search(PANGU, hardware("rtx-4090"), Workload(), device_counts=(1,))


def test_equal_tpot_fills_the_batch():
    setting = Setting(QWEN, H100)
    point = at_equal_tpot(setting, Workload(arrival="together"), 0.02)
    assert point.tpot_s <= 0.02
    assert point.workload.batch > 4
    with pytest.raises(ConfigError, match="even alone"):
        at_equal_tpot(setting, Workload(arrival="together"), 0.001)
    with pytest.raises(ConfigError, match="no experts to group"):
        with_groups(model_spec(config("qwen3-32b")), 4)


def test_laws_reproduce_published_facts():
    assert leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.05)
    assert leverage(0.034, 12, 1e22) == pytest.approx(6.96, abs=0.05)
    best = max(range(2, 60), key=lambda g: leverage(0.034, g, 1e22))
    assert 8 <= best <= 12
    assert leverage(1.0, 4, 1e20) == pytest.approx(1, abs=0.35)
    assert [round(fine_grained_loss(1e9, 2e10, g), 3) for g in (1, 8)] == [3.276, 3.140]
    assert quality(PANGU, 13e12).extrapolated
    assert quality(model_spec(config("qwen3-32b")), 1e12).leverage == 1


def test_a_small_shape_study():
    target = Target(device="ascend-910b", max_tpot_s=0.05)
    found = study(Ranges(), [target], num_candidates=4)
    assert len(found.candidates) == 4
    assert found.reference.score == 1
    assert [c.score for c in found.candidates] == sorted(c.score for c in found.candidates)[::-1]
    for one in found.candidates:
        assert 60e9 <= one.model.params() <= 80e9
    assert math.isnan(found.percentile_at_quality) or 0 <= found.percentile_at_quality <= 1


def test_a_cache_takes_its_time_from_pool_to_pool():
    load = Workload(input_tokens=8192, output_tokens=64)
    (pair, *_) = search(QWEN, H100, load, device_counts=(2,)).disaggregated
    whole = QWEN.kv_bytes(8192, 2.0)
    layout = pair.prompt.setting.parallel
    assert pair.transfer_s >= whole / layout.tp / 50e9
    assert pair.ttft_s == pytest.approx(1.4 * pair.prompt.prefill.seconds + pair.transfer_s)
    slow = H100.model_copy(update={"network_bytes_per_s": 1e9})
    (slower, *_) = search(QWEN, slow, load, device_counts=(2,)).disaggregated
    assert slower.tokens_per_s_per_device < pair.tokens_per_s_per_device


def test_shapes_may_have_other_groups_than_picks():
    ranges = Ranges(picks_per_group=(0, 2), experts=(64,), picks=(8,))
    found = study(ranges, (Target(device="ascend-910b", max_tpot_s=0.06),), num_candidates=6)
    groups = {one.shape["groups"] for one in found.candidates}
    assert groups == {1, 4}
    assert all(one.model.grouping.num_groups == one.shape["groups"] for one in found.candidates)


def test_more_ranks_than_experts_hold_copies():
    loads = layer_loads(Routing(), PANGU.moe.grouping, 4096, 80, 1, num_replicas=16)
    ((_, load),) = loads
    assert load.rows_D.sum() == pytest.approx(4096 * 8)
    assert load.rows_D.max() == pytest.approx(512)
    assert load.rows_D.min() == pytest.approx(256)
    skewed = Routing(kind="power_law", alpha=1.0)
    (_, plain), (_, spread) = (
        layer_loads(skewed, PANGU.moe.grouping, 65536, 16, 1, n)[0] for n in (0, 16)
    )
    assert spread.rho < plain.rho
    with pytest.raises(ConfigError, match="use 16 expert_replicas"):
        Parallel(tp=1, dp=80, ep=80, expert_replicas=8).check(PANGU)
    with pytest.raises(ConfigError, match="or give it expert_replicas"):
        Parallel(tp=1, dp=80, ep=80).check(PANGU)
